"""The method's command-line flags, in the published spelling, for any argparse script.

Importing this module and building the parser does not load torch.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from alphadecay.cli.presets import METHOD_OPTIONS, METHOD_PRESETS
from alphadecay.cli.types import method, str_to_bool, type_multipliers
from alphadecay.constants import BATCHNORM_TYPES, FIT_METHODS, MAPS, METRICS, SCOPES

if TYPE_CHECKING:
    import torch.nn as nn
    from torch.optim import Optimizer

    from alphadecay.balancer import AlphaDecay
    from alphadecay.baselines.adadecay import AdaDecay
    from alphadecay.baselines.awd import AWD


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of AlphaDecay, of its baselines and of its controls.

    The script itself defines `--weight_decay` (eta), `--lr` and `--optimizer`.
    """
    group = parser.add_argument_group("module-wise weight decay (AlphaDecay)")
    group.add_argument(
        "--method",
        type=method,
        metavar="NAME",
        help="a method by its name, which sets the flags below that it stands for: "
        f"{', '.join(METHOD_PRESETS)}. Options are added by +, as in alphadecay+iso_budget: "
        f"{', '.join(METHOD_OPTIONS)} (default: the method that the flags below give)",
    )
    _add_switch(
        group,
        "--use_modulewise_wd",
        "give each module its own weight decay (default: --weight_decay everywhere)",
    )
    _add_switch(
        group,
        "--alpha_positively_with_WD",
        "the decay rises with the score (the method); without it the order is reversed (a control)",
    )
    group.add_argument(
        "--unbalancedWD_every",
        type=int,
        default=500,
        metavar="N",
        help="updates between two analyses of the weights (default 500)",
    )
    group.add_argument(
        "--esd_metric_for_tb",
        choices=METRICS,
        default="alpha",
        help="the statistic that modules are scored by (default alpha)",
    )
    group.add_argument(
        "--assign_func",
        choices=MAPS,
        default="tb_linear_map",
        help="the map from scores to weight decays (default tb_linear_map)",
    )
    group.add_argument(
        "--wd_min_ratio",
        type=float,
        default=0.6666,
        metavar="S1",
        help="linear map: the smallest decay is S1 * eta (default 0.6666)",
    )
    group.add_argument(
        "--wd_max_ratio",
        type=float,
        default=3.0,
        metavar="S2",
        help="linear map: the largest decay is S2 * eta (default 3)",
    )
    _add_analysis_flags(group)
    _add_baselines_and_controls(
        parser.add_argument_group("baselines and controls, see also --method")
    )


def _add_switch(group: argparse._ArgumentGroup, flag: str, help: str) -> None:
    """Add a flag that turns something on, and that also takes true and false."""
    group.add_argument(
        flag,
        type=str_to_bool,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help=help if "(default" in help else f"{help} (default false)",
    )


def _add_analysis_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how weights are analysed, which ones, and when."""
    group.add_argument(
        "--pl_fitting",
        choices=FIT_METHODS,
        default="median",
        help="how the power-law fit chooses its threshold (default median, as published)",
    )
    group.add_argument(
        "--xmin_pos",
        type=float,
        default=2.0,
        help="median fit: the threshold is eigenvalue number N / xmin_pos (default 2)",
    )
    group.add_argument(
        "--filter_zeros",
        type=str_to_bool,
        default=False,
        metavar="BOOL",
        help="leave eigenvalues up to 1e-5 out of the fit (default false)",
    )
    group.add_argument(
        "--remove_first_layer",
        type=str_to_bool,
        default=True,
        metavar="BOOL",
        help="do not balance the first module (default true)",
    )
    group.add_argument(
        "--remove_last_layer",
        type=str_to_bool,
        default=True,
        metavar="BOOL",
        help="do not balance the last module (default true)",
    )
    group.add_argument(
        "--batchnorm",
        type=str_to_bool,
        default=True,
        metavar="BOOL",
        help="BatchNorm2d takes the decay of its convolution (default true)",
    )
    group.add_argument(
        "--batchnorm_type",
        choices=BATCHNORM_TYPES,
        default="name",
        help="which convolution: the one of the same name with conv for bn, or (align) the "
        "nearest balanced module before it (default name)",
    )
    group.add_argument(
        "--balance_scope",
        choices=SCOPES,
        default="reference",
        help="which modules are balanced: all but the first and the last (reference, default), "
        "or every module inside a numbered block (all_blocks)",
    )
    _add_switch(
        group,
        "--esd_async",
        "analyse in the background while training goes on; the new decays take effect "
        "--esd_lag updates later",
    )
    group.add_argument(
        "--esd_lag",
        type=int,
        default=10,
        metavar="N",
        help="with --esd_async: updates until the new decays take effect (default 10)",
    )


def _add_baselines_and_controls(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the baselines, of the controls, and of AdamC and cautious decay."""
    _add_switch(
        group,
        "--use_AWD_NeurIPS2023",
        "baseline: adaptive weight decay (Ghiasi et al. 2023)",
    )
    _add_switch(
        group,
        "--use_AdaDecay",
        "baseline: a decay for each element at each step (Nakamura and Hong 2019)",
    )
    _add_switch(
        group,
        "--iso_budget",
        "rescale module-wise decays so that their mean, weighted by parameters, is --weight_decay",
    )
    _add_switch(
        group,
        "--one_shot",
        "control: freeze the decays after the first analysis during training",
    )
    _add_switch(
        group,
        "--shuffle_decays",
        "control: permute the decays over the modules, in a fixed random order",
    )
    group.add_argument(
        "--shuffle_seed",
        type=int,
        default=0,
        help="with --shuffle_decays: seed of the random order (default 0)",
    )
    _add_switch(
        group,
        "--type_constant",
        "control: one constant decay for each module type, without any spectrum",
    )
    group.add_argument(
        "--type_multipliers",
        type=type_multipliers,
        metavar="TYPE=X,...",
        help="with --type_constant: decay / eta of each module type, 1 for types that are not "
        "named, e.g. q_proj=0.8,down_proj=1.2 (default: the linear map of the alphas that "
        "Gaussian matrices of the modules' shapes have: for LLaMA S1 for attention and S2 for "
        "the MLP)",
    )
    _add_switch(
        group,
        "--adamc",
        "the weights of all layers but the last decay by lr^2 / peak lr (Defazio 2025)",
    )
    _add_switch(
        group,
        "--cautious_decay",
        "decay only the elements that the update also moves towards zero",
    )


def decay_from_flags(
    args: argparse.Namespace, model: nn.Module, awd_factor: float
) -> AlphaDecay | AWD | AdaDecay | None:
    """Build the weight-decay method that the flags ask for.

    Args:
        args: parsed arguments with the flags of `add_flags` and `weight_decay`.
        model: the model to be trained.
        awd_factor: AWD's strength is awd_factor * eta (published: 100 for LLaMA, 50 for ViT).

    Returns:
        AlphaDecay or a baseline; None for the same decay everywhere.

    Raises:
        ValueError: the flags contradict each other or do not suit the model.
    """
    check_flags(args)
    if args.use_AWD_NeurIPS2023:
        from alphadecay.baselines.awd import AWD

        return AWD(model, awd_factor * args.weight_decay)
    if args.use_AdaDecay:
        from alphadecay.baselines.adadecay import AdaDecay

        return AdaDecay(model, args.weight_decay)
    if not args.use_modulewise_wd:
        return None
    from alphadecay.balancer import AlphaDecay
    from alphadecay.controls import Controls

    return AlphaDecay(
        model,
        args.weight_decay,
        args.wd_min_ratio,
        args.wd_max_ratio,
        args.unbalancedWD_every,
        metric=args.esd_metric_for_tb,
        mapping=args.assign_func,
        positive=args.alpha_positively_with_WD,
        fit_method=args.pl_fitting,
        xmin_pos=args.xmin_pos,
        filter_zeros=args.filter_zeros,
        scope=args.balance_scope,
        remove_first=args.remove_first_layer,
        remove_last=args.remove_last_layer,
        batchnorm=args.batchnorm,
        batchnorm_type=args.batchnorm_type,
        lag=args.esd_lag if args.esd_async else 0,
        controls=Controls(
            shuffle_seed=args.shuffle_seed if args.shuffle_decays else None,
            iso_budget=args.iso_budget,
            type_constant=args.type_constant,
            type_multipliers=args.type_multipliers,
            one_shot=args.one_shot,
        ),
    )


def register_decay_hooks(args: argparse.Namespace, optimizer: Optimizer) -> None:
    """Register the optimizer hooks for --adamc and --cautious_decay.

    Args:
        args: parsed arguments; `lr` is the peak learning rate.
        optimizer: an optimizer over the groups of `alphadecay.split_hidden`.

    Raises:
        ValueError: the optimizer does not support what the flags ask for.
    """
    if args.adamc or args.cautious_decay:
        from alphadecay.decay_hooks import install_decay_hooks

        install_decay_hooks(optimizer, args.lr if args.adamc else None, args.cautious_decay)


def check_flags(args: argparse.Namespace) -> None:
    """Check that the flags of `add_flags` can be combined.

    Raises:
        ValueError: two flags contradict each other, or one has no effect without another.
    """
    methods = [
        name
        for name in ("use_modulewise_wd", "use_AWD_NeurIPS2023", "use_AdaDecay")
        if getattr(args, name)
    ]
    if len(methods) > 1:
        raise ValueError(f"--{methods[0]} and --{methods[1]} exclude each other: give one of them")
    for name in ("iso_budget", "one_shot", "shuffle_decays", "type_constant"):
        if getattr(args, name) and not args.use_modulewise_wd:
            raise ValueError(
                f"--{name} concerns module-wise decays: give --use_modulewise_wd too, "
                "or leave it out"
            )
    if args.type_multipliers and not args.type_constant:
        raise ValueError(
            "--type_multipliers has no effect without --type_constant: give both, or leave it out"
        )
    for name in ("one_shot", "esd_async"):
        if args.type_constant and getattr(args, name):
            raise ValueError(f"--type_constant analyses no weights: leave --{name} out")
    for name in ("adamc", "cautious_decay"):
        if args.use_AdaDecay and getattr(args, name):
            raise ValueError(
                f"--use_AdaDecay applies its decays itself, element by element: leave --{name} out"
            )
