"""Types of command-line arguments."""

import argparse

from alphadecay.cli.presets import method_flags


def str_to_bool(text: str) -> bool:
    """Parse 'true' or 'false', in upper or lower case; an empty text is false.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text.lower() not in ("true", "false", ""):
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


def method(text: str) -> str:
    """Check a value of `--method`, such as `alphadecay` or `gradnorm+iso_budget`, and return it.

    Raises:
        argparse.ArgumentTypeError: the text is not the name of a method.
    """
    try:
        method_flags(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
