"""Methods by name: `--method NAME` stands for published flags, and nothing else."""

import argparse
from collections.abc import Sequence

# What kind of method it is, and its controls. A name settles all of them; what it does not name (the fit, the range, --iso_budget,
# --adamc, ...) stays free.
SWITCHES = (
    "use_modulewise_wd", "alpha_positively_with_WD", "use_AWD_NeurIPS2023", "use_AdaDecay", "one_shot", "shuffle_decays", "type_constant",
)  # fmt: skip


def _flags(*switches: str, **settings: object) -> dict[str, object]:
    return {name: name in switches for name in SWITCHES} | settings


_ALPHADECAY = ("use_modulewise_wd", "alpha_positively_with_WD")
METHODS = {
    "wd0": _flags(weight_decay=0.0),
    "uniform": _flags(),
    "awd": _flags("use_AWD_NeurIPS2023"),
    "adadecay": _flags("use_AdaDecay"),
    "adadecay-module": _flags(
        *_ALPHADECAY, esd_metric_for_tb="gradnorm", assign_func="layerwise_sigmoid"
    ),
    "alphadecay": _flags(*_ALPHADECAY),
    "inverted": _flags("use_modulewise_wd"),
    "shuffled": _flags(*_ALPHADECAY, "shuffle_decays"),
    "type_constant": _flags(*_ALPHADECAY, "type_constant"),
    "one_shot": _flags(*_ALPHADECAY, "one_shot"),
    "quantile": _flags(*_ALPHADECAY, assign_func="tb_quantile"),
    "gradnorm": _flags(*_ALPHADECAY, esd_metric_for_tb="gradnorm", assign_func="tb_linear_map"),
    "farms": _flags(*_ALPHADECAY, esd_metric_for_tb="alpha_farms"),
}


def parse_arguments(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> argparse.Namespace:
    """`parser.parse_args(words)` with the flags that `--method` stands for filled in; the parser's error where another flag contradicts it.

    The parser needs `--weight_decay` and what `add_flags` adds.
    """
    args = parser.parse_args(words)
    if args.method is None:
        return args
    flags = METHODS[args.method]
    parser.set_defaults(**flags)
    args = parser.parse_args(
        words
    )  # flags that were typed win over the new defaults, and so are found out
    for name, value in flags.items():
        if getattr(args, name) != value:
            parser.error(
                f"--method {args.method} means {name} {value}, but --{name} says {getattr(args, name)}: leave one of the two out"
            )
    return args
