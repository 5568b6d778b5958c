"""Types of command-line arguments."""

import argparse


def str_to_bool(text: str) -> bool:
    """Parse 'true' or 'false', in upper or lower case.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def type_multipliers(text: str) -> dict[str, float]:
    """Parse `q_proj=0.8,down_proj=1.2` into {"q_proj": 0.8, "down_proj": 1.2}.

    Raises:
        argparse.ArgumentTypeError: the text is not a list of NAME=NUMBER separated by commas.
    """
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of multipliers: give for instance q_proj=0.8,down_proj=1.2"
        ) from None
