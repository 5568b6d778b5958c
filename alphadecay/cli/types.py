"""Types of command-line arguments."""

import argparse


def str_to_bool(text: str) -> bool:
    """A boolean that means what it says: true or false, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def type_multipliers(text: str) -> dict[str, float]:
    """`q_proj=0.8,down_proj=1.2` -> {"q_proj": 0.8, "down_proj": 1.2}."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of multipliers: give for instance q_proj=0.8,down_proj=1.2"
        ) from None
