"""Methods by name: `--method NAME` stands for a set of published flags, and flags have a name."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from alphadecay.constants import MAPS, METRICS
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
# What can be added to a method's name with `+`: a control, another score or another map.
METHOD_OPTIONS: dict[str, dict[str, object]] = {
    "inverted": {"alpha_positively_with_WD": False},
    "one_shot": {"one_shot": True},
    "shuffled": {"shuffle_decays": True},
    "type_constant": {"type_constant": True},
    "iso_budget": {"iso_budget": True},
    "adamc": {"adamc": True},
    "cautious_decay": {"cautious_decay": True},
    **{name: {"esd_metric_for_tb": name} for name in METRICS if name != "alpha"},
    **{name: {"assign_func": name} for name in MAPS if name != "tb_linear_map"},
}
# The settings by which module-wise methods are told apart, with those of AlphaDecay itself.
_NAMING_SETTINGS: dict[str, object] = {
    "esd_metric_for_tb": "alpha",
    "assign_func": "tb_linear_map",
    "alpha_positively_with_WD": True,
    "one_shot": False,
    "shuffle_decays": False,
    "type_constant": False,
}
_ANY_METHOD = ("adamc", "cautious_decay")


def method_flags(name: str) -> dict[str, object]:
    """Return the flags that a method's name stands for.

    Args:
        name: a name of METHOD_PRESETS, with any names of METHOD_OPTIONS added by `+`, such as
            `alphadecay+iso_budget` or `gradnorm+tb_sqrt`.

    Raises:
        ValueError: a part of the name is unknown, or an option concerns module-wise decays and the
            method has none.
    """
    base, *options = name.split("+")
    if base not in METHOD_PRESETS:
        raise ValueError(
            f"{base!r} is not a method: choose from {', '.join(METHOD_PRESETS)}; options such as "
            "iso_budget are added as in alphadecay+iso_budget"
        )
    flags = dict(METHOD_PRESETS[base])
    for option in options:
        if option not in METHOD_OPTIONS:
            raise ValueError(
                f"{option!r} cannot be added to a method: choose from {', '.join(METHOD_OPTIONS)}"
            )
        if option not in _ANY_METHOD and not flags["use_modulewise_wd"]:
            raise ValueError(
                f"{name}: {option} concerns module-wise decays, which {base} does not have: "
                "leave it out"
            )
        flags |= METHOD_OPTIONS[option]
    return flags


def method_name(settings: Mapping[str, Any]) -> str:
    """Return the name of the method that is computed with these settings.

    It depends on the settings alone, however they were typed, and `--method` takes it.

    Args:
        settings: the flags of `alphadecay.cli.flags.add_flags` and `weight_decay`, by name.

    Returns:
        A name of METHOD_PRESETS, with names of METHOD_OPTIONS added by `+`: for settings that are
        no preset, the preset that needs the fewest of them.

    Raises:
        KeyError: a flag is missing.
    """
    modulewise = settings["use_modulewise_wd"]
    options: list[str] = []
    if settings["use_AWD_NeurIPS2023"]:
        base = "awd"
    elif settings["use_AdaDecay"]:
        base = "adadecay"
    elif modulewise:
        base, options = _modulewise_name(settings)
    else:
        base = "uniform"
    if not settings["weight_decay"]:  # every method scales it, so that nothing decays
        return "wd0"
    options += ["iso_budget"] * bool(modulewise and settings["iso_budget"])
    options += [name for name in _ANY_METHOD if settings[name]]
    return "+".join([base, *options])


def _modulewise_name(settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the preset of a module-wise method and the options that are added to it."""
    given = {name: settings[name] for name in _NAMING_SETTINGS}
    if given["type_constant"]:
        # The decays follow from the shapes: score, map and order are not used.
        given |= {name: _NAMING_SETTINGS[name] for name in list(_NAMING_SETTINGS)[:3]}
    candidates = []
    for base, preset in METHOD_PRESETS.items():
        if not preset["use_modulewise_wd"]:
            continue
        own = {name: preset.get(name, default) for name, default in _NAMING_SETTINGS.items()}
        changed = {name: value for name, value in given.items() if value != own[name]}
        options = [
            option for option, flags in METHOD_OPTIONS.items() if flags.items() <= changed.items()
        ]
        keeps_its_own = all(own[name] == _NAMING_SETTINGS[name] for name in changed)
        if keeps_its_own and len(options) == len(changed):  # every difference has a name
            candidates.append((base, options))
    # AlphaDecay itself is the first choice among methods that need equally many options.
    return min(candidates, key=lambda found: (len(found[1]), found[0] != "alphadecay"))


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
    preset = method_flags(args.method)
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
