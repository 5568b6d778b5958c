"""Methods by name: `--method NAME` stands for a set of published flags."""

import argparse
from collections.abc import Sequence
from typing import Any

from alphadecay.deprecated import renamed_attribute

# Flags that decide which method runs, and its controls. A preset sets all of them, those that it
# does not name to False. Every other flag (the fit, the range, --iso_budget, --adamc, ...) can be
# combined with any preset.
SWITCHES = (
    "use_modulewise_wd",
    "alpha_positively_with_WD",
    "use_AWD_NeurIPS2023",
    "use_AdaDecay",
    "one_shot",
    "shuffle_decays",
    "type_constant",
)


def _preset(*switches: str, **settings: object) -> dict[str, object]:
    """Return the flags of a preset: the named switches on, the others off, and `settings`."""
    return {name: name in switches for name in SWITCHES} | settings


_ALPHADECAY = ("use_modulewise_wd", "alpha_positively_with_WD")
METHOD_PRESETS = {
    "wd0": _preset(weight_decay=0.0),
    "uniform": _preset(),
    "awd": _preset("use_AWD_NeurIPS2023"),
    "adadecay": _preset("use_AdaDecay"),
    "adadecay-module": _preset(
        *_ALPHADECAY, esd_metric_for_tb="gradnorm", assign_func="layerwise_sigmoid"
    ),
    "alphadecay": _preset(*_ALPHADECAY),
    "inverted": _preset("use_modulewise_wd"),
    "shuffled": _preset(*_ALPHADECAY, "shuffle_decays"),
    "type_constant": _preset(*_ALPHADECAY, "type_constant"),
    "one_shot": _preset(*_ALPHADECAY, "one_shot"),
    "quantile": _preset(*_ALPHADECAY, assign_func="tb_quantile"),
    "gradnorm": _preset(*_ALPHADECAY, esd_metric_for_tb="gradnorm", assign_func="tb_linear_map"),
    "farms": _preset(*_ALPHADECAY, esd_metric_for_tb="alpha_farms"),
}


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse a command line and fill in the flags that `--method` stands for.

    If a flag on the command line contradicts `--method`, the parser's error names both.

    Args:
        parser: a parser with `--weight_decay` and the flags of `alphadecay.cli.flags.add_flags`.
        argv: the arguments; None: those of this process.

    Returns:
        The arguments, with the preset's flags set.
    """
    args = parser.parse_args(argv)
    if args.method is None:
        return args
    preset = METHOD_PRESETS[args.method]
    parser.set_defaults(**preset)
    # A flag that was typed overrides the preset's default, so that a conflict can be detected.
    args = parser.parse_args(argv)
    for name, value in preset.items():
        if getattr(args, name) != value:
            parser.error(
                f"--method {args.method} means {name} {value}, "
                f"but --{name} says {getattr(args, name)}: leave one of the two out"
            )
    return args


def __getattr__(name: str) -> Any:
    """Find a constant by the name that it had before."""
    today = renamed_attribute("cli.presets", name)
    if today is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[today]
