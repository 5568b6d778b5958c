"""Say in words and in a record which weight-decay method a run computes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alphadecay.cli.flags import check_flags, decay_from_flags
from alphadecay.cli.presets import method_name

if TYPE_CHECKING:
    import torch.nn as nn

    from alphadecay.modules import BalancedModule

# Settings of module-wise methods, by the flags that set them. Those of the power-law fit and of the
# map's range are left out where they have no effect.
_MODULEWISE_SETTINGS = (
    "esd_metric_for_tb",
    "assign_func",
    "alpha_positively_with_WD",
    "wd_min_ratio",
    "wd_max_ratio",
    "unbalancedWD_every",
    "pl_fitting",
    "xmin_pos",
    "filter_zeros",
    "balance_scope",
    "remove_first_layer",
    "remove_last_layer",
    "iso_budget",
    "one_shot",
    "shuffle_decays",
    "type_constant",
)
MAPS_WITH_RANGE = ("tb_linear_map", "tb_quantile")
SPECTRAL_FITS = ("alpha", "alphahat", "alpha_farms")  # scores that need a power-law fit


@dataclass(frozen=True)
class Coverage:
    """Which weight matrices of a model are balanced.

    Args:
        balanced: number of matrices with a weight decay of their own.
        matrices: number of matrices that have a spectrum.
        others: names of the matrices that keep eta.
        share: parameters whose decay is balanced, as a fraction of all parameters.
    """

    balanced: int
    matrices: int
    others: tuple[str, ...]
    share: float


@dataclass(frozen=True)
class MethodDescription:
    """The weight-decay method of a run.

    Args:
        name: its name, which `--method` takes.
        details: one line: coverage, range and interval of the decays.
        settings: the settings that the method depends on, by the names of their flags, `optimizer`
            and `coverage`.
        warnings: sentences that the user should read before training.
    """

    name: str
    details: str
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the entries of run.json: `method`, `method_details` and `method_settings`."""
        return {
            "method": self.name,
            "method_details": self.details,
            "method_settings": self.settings,
        }


def describe_method(
    args: argparse.Namespace, model: nn.Module, awd_factor: float
) -> MethodDescription:
    """Describe the method that the flags ask for, without analysing any weight.

    Args:
        args: parsed arguments with the flags of `add_flags`, `weight_decay` and `optimizer`.
        model: the model to be trained; it may be on the meta device.
        awd_factor: see `decay_from_flags`.

    Raises:
        ValueError: a weight has lost its shape (FSDP1, ZeRO-3).
    """
    name = method_name(vars(args))
    eta = args.weight_decay
    settings: dict[str, Any] = {"weight_decay": eta, "optimizer": args.optimizer}
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everywhere = f"all {_short_number(parameters)} parameters"
    if name == "wd0":
        details = f"no weight decay on {everywhere}"
    elif args.use_AWD_NeurIPS2023:
        settings["lambda_awd"] = awd_factor * eta
        details = (
            f"one decay for {everywhere}, renewed in each update: {awd_factor:g} x {eta:g} x norm "
            "of the gradient / norm of the weights"
        )
    elif args.use_AdaDecay:
        details = (
            f"a decay of its own for each element of {everywhere}, 0 to 2 x {eta:g}, renewed in "
            "each update from its gradient"
        )
    elif args.use_modulewise_wd:
        coverage = coverage_of(args, model)
        settings |= _settings_in_effect(args) | {"coverage": vars(coverage)}
        details = _modulewise_details(args, coverage)
    else:
        details = f"decay {eta:g} for {everywhere}"
    details += "".join(
        f"; {words}"
        for flag, words in (
            ("adamc", "AdamC: the decays of all layers but the last follow lr^2 / peak lr"),
            ("cautious_decay", "cautious: only elements decay that the update moves towards zero"),
        )
        if getattr(args, flag) and name != "wd0"
    )
    return MethodDescription(name, details, settings, _warnings(args, name))


def balanced_by_flags(args: argparse.Namespace, model: nn.Module) -> list[BalancedModule]:
    """Return the modules that the flags balance: those of the AlphaDecay that they build."""
    from alphadecay.modules import MIN_EIGENVALUES, balanced_modules

    return balanced_modules(
        model,
        args.balance_scope,
        args.remove_first_layer,
        args.remove_last_layer,
        # The gradient's norm does not need a spectrum.
        0 if args.esd_metric_for_tb == "gradnorm" else MIN_EIGENVALUES,
    )


def coverage_of(args: argparse.Namespace, model: nn.Module) -> Coverage:
    """Return which matrices of the model the flags balance."""
    from alphadecay.modules import spectral_modules

    balanced = balanced_by_flags(args, model)
    names = {module.name for module in balanced}
    matrices = spectral_modules(model)
    own = {p for module in balanced for p in module.module.parameters(recurse=False)}
    everything = sum(p.numel() for p in model.parameters())
    return Coverage(
        balanced=len(balanced),
        matrices=len(matrices),
        others=tuple(module.name for module in matrices if module.name not in names),
        share=sum(p.numel() for p in own) / everything,
    )


def _settings_in_effect(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a module-wise method without those that it does not read."""
    unused: set[str] = set()
    if args.type_constant:
        unused |= {"esd_metric_for_tb", "assign_func", "alpha_positively_with_WD"}
        unused |= {"unbalancedWD_every"}
    elif args.assign_func not in MAPS_WITH_RANGE:
        unused |= {"wd_min_ratio", "wd_max_ratio"}
    if args.type_constant or args.esd_metric_for_tb not in SPECTRAL_FITS:
        unused |= {"pl_fitting", "xmin_pos", "filter_zeros"}
    settings = {name: getattr(args, name) for name in _MODULEWISE_SETTINGS if name not in unused}
    if args.shuffle_decays:
        settings["shuffle_seed"] = args.shuffle_seed
    if args.type_constant:
        settings["type_multipliers"] = args.type_multipliers
    return settings


def _modulewise_details(args: argparse.Namespace, coverage: Coverage) -> str:
    """Return the line that describes a module-wise method."""
    eta = args.weight_decay
    parts = [
        f"{coverage.balanced} of {coverage.matrices} matrices balanced, "
        f"{coverage.share:.0%} of the parameters"
    ]
    if args.type_constant:
        parts.append(f"one constant decay for each module type, times {eta:g}")
    else:
        order = "" if args.alpha_positively_with_WD else ", in reversed order"
        score = f"by {args.esd_metric_for_tb}{order}"
        if args.assign_func in MAPS_WITH_RANGE:
            parts.append(f"decay {args.wd_min_ratio:.3g} to {args.wd_max_ratio:.3g} x {eta:g}")
            parts[-1] += f" {score}"
        else:
            parts.append(f"decay {args.assign_func} x {eta:g} {score}")
        parts.append(
            f"frozen after update {args.unbalancedWD_every}"
            if args.one_shot
            else f"renewed every {args.unbalancedWD_every} updates"
        )
    if args.iso_budget:
        parts.append(f"rescaled so that the mean is {eta:g}")
    if args.shuffle_decays:
        parts.append(f"permuted over the modules with seed {args.shuffle_seed}")
    return ", ".join(parts)


def _warnings(args: argparse.Namespace, name: str) -> tuple[str, ...]:
    """Return what the user should know before training."""
    found = []
    if (
        args.use_modulewise_wd
        and not (args.alpha_positively_with_WD or args.type_constant)
        and args.method is None
        and name != "wd0"
    ):
        found.append(
            "without --alpha_positively_with_WD the order of the decays is reversed: this run is "
            f"the control {name!r}, not AlphaDecay; add the flag, or type --method {name} to "
            "confirm it"
        )
    if name == "wd0" and args.use_modulewise_wd | args.use_AWD_NeurIPS2023 | args.use_AdaDecay:
        found.append(
            "--weight_decay 0 scales every decay to 0: nothing decays, whatever the method"
        )
    return tuple(found)


def _short_number(count: int) -> str:
    """Return for instance `58.1M` for 58,073,600."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def check_method(args: argparse.Namespace, model: nn.Module, awd_factor: float) -> None:
    """Check that `decay_from_flags` would accept the flags, without analysing any weight.

    Args:
        args, awd_factor: see `decay_from_flags`.
        model: the model to be trained; it may be on the meta device.

    Raises:
        ValueError: the flags contradict each other or do not suit the model.
    """
    check_flags(args)
    if not args.use_modulewise_wd:
        decay_from_flags(args, model, awd_factor)
    elif not balanced_by_flags(args, model):
        raise ValueError("the model has no module to balance: use a larger model")
