"""The method's command-line flags, in the spelling of the published commands, for any argparse script."""

import argparse

import torch.nn as nn
from torch.optim import Optimizer

from alphadecay.assignment import MAPS
from alphadecay.balancer import AlphaDecay
from alphadecay.baselines.adadecay import AdaDecay
from alphadecay.baselines.awd import AWD
from alphadecay.cli.presets import METHODS as METHODS_BY_NAME
from alphadecay.cli.types import str_to_bool, type_multipliers
from alphadecay.decay_hooks import install_decay_hooks
from alphadecay.modules import BATCHNORM_TYPES, SCOPES
from alphadecay.spectral.power_law import METHODS
from alphadecay.spectral.statistics import METRICS


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of AlphaDecay, its baselines and controls. `--weight_decay` (eta), `--lr` and `--optimizer` are the script's own."""
    g = parser.add_argument_group("module-wise weight decay (AlphaDecay)")
    g.add_argument(
        "--method",
        choices=METHODS_BY_NAME,
        help="a method by name: fills in the flags below that it stands for",
    )
    g.add_argument(
        "--use_modulewise_wd",
        action="store_true",
        help="give each module its own decay; absent: --weight_decay everywhere",
    )
    g.add_argument(
        "--alpha_positively_with_WD",
        action="store_true",
        help="decay rises with the score (the method); absent: the reverse, a control",
    )
    g.add_argument(
        "--unbalancedWD_every",
        type=int,
        default=500,
        metavar="N",
        help="updates between two analyses (default 500)",
    )
    g.add_argument(
        "--esd_metric_for_tb",
        choices=METRICS,
        default="alpha",
        help="the statistic modules are scored by (default alpha)",
    )
    g.add_argument(
        "--assign_func",
        choices=MAPS,
        default="tb_linear_map",
        help="score -> decay (default tb_linear_map)",
    )
    g.add_argument(
        "--wd_min_ratio",
        type=float,
        default=0.6666,
        metavar="S1",
        help="least decay / eta of the linear map (default 0.6666)",
    )
    g.add_argument(
        "--wd_max_ratio",
        type=float,
        default=3.0,
        metavar="S2",
        help="greatest decay / eta of the linear map (default 3)",
    )
    g.add_argument(
        "--pl_fitting",
        choices=METHODS,
        default="median",
        help="the power-law fit (default median, as published)",
    )
    g.add_argument(
        "--xmin_pos",
        type=float,
        default=2.0,
        help="median fit: N / xmin_pos is the threshold's index (default 2)",
    )
    g.add_argument(
        "--filter_zeros",
        type=str_to_bool,
        default=False,
        metavar="BOOL",
        help="fit without eigenvalues up to 1e-5",
    )
    g.add_argument(
        "--remove_first_layer",
        type=str_to_bool,
        default=True,
        metavar="BOOL",
        help="do not balance the first module",
    )
    g.add_argument(
        "--remove_last_layer",
        type=str_to_bool,
        default=True,
        metavar="BOOL",
        help="do not balance the last module",
    )
    g.add_argument(
        "--batchnorm",
        type=str_to_bool,
        default=True,
        metavar="BOOL",
        help="BatchNorm2d follows its convolution's decay",
    )
    g.add_argument(
        "--batchnorm_type",
        choices=BATCHNORM_TYPES,
        default="name",
        help="which one: of its name, or the nearest before it",
    )
    g.add_argument(
        "--balance_scope",
        choices=SCOPES,
        default="reference",
        help="all_blocks: every projection of every block",
    )
    g.add_argument(
        "--esd_async",
        action="store_true",
        help="analyse beside the training; the decays take effect --esd_lag updates later",
    )
    g.add_argument(
        "--esd_lag",
        type=int,
        default=10,
        metavar="N",
        help="of --esd_async: updates until the decays take effect (default 10)",
    )
    _add_controls(parser.add_argument_group("baselines and controls, see --method"))


def _add_controls(g) -> None:
    g.add_argument(
        "--use_AWD_NeurIPS2023",
        action="store_true",
        help="baseline: adaptive weight decay (Ghiasi et al. 2023)",
    )
    g.add_argument(
        "--use_AdaDecay",
        action="store_true",
        help="baseline: a decay for each element, each step (Nakamura & Hong 2019)",
    )
    g.add_argument(
        "--iso_budget",
        action="store_true",
        help="rescale module-wise decays to a parameter-weighted mean of --weight_decay",
    )
    g.add_argument(
        "--one_shot",
        action="store_true",
        help="control: freeze the decays after the first analysis during training",
    )
    g.add_argument(
        "--shuffle_decays",
        action="store_true",
        help="control: a fixed random permutation of the decays over the modules",
    )
    g.add_argument("--shuffle_seed", type=int, default=0, help="of --shuffle_decays (default 0)")
    g.add_argument(
        "--type_constant",
        action="store_true",
        help="control: one constant decay for each module type, no spectrum",
    )
    g.add_argument(
        "--type_multipliers", type=type_multipliers, metavar="TYPE=X,...",
        help="of --type_constant: decay / eta by module type, 1 where not named, e.g. q_proj=0.8,down_proj=1.2 (default: the linear map "
        "of the alphas that Gaussian matrices of the modules' shapes have: for LLaMA S1 for attention and S2 for the MLP)",
    )  # fmt: skip
    g.add_argument(
        "--adamc",
        action="store_true",
        help="weights of all layers but the last decay by lr^2 / peak lr (Defazio 2025)",
    )
    g.add_argument(
        "--cautious_decay",
        action="store_true",
        help="decay only where the update too moves the weight towards zero",
    )


def decay_from_flags(
    args: argparse.Namespace, model: nn.Module, awd_factor: float
) -> AlphaDecay | AWD | AdaDecay | None:
    """What the flags ask for: AlphaDecay, AWD (at awd_factor * eta), AdaDecay, or None for uniform decay. Raises ValueError."""
    check_flags(args)
    if args.use_AWD_NeurIPS2023:
        return AWD(model, awd_factor * args.weight_decay)
    if args.use_AdaDecay:
        return AdaDecay(model, args.weight_decay)
    if not args.use_modulewise_wd:
        return None
    return AlphaDecay(
        model,
        args.weight_decay,
        args.wd_min_ratio,
        args.wd_max_ratio,
        args.unbalancedWD_every,
        metric=args.esd_metric_for_tb,
        mapping=args.assign_func,
        positive=args.alpha_positively_with_WD,
        method=args.pl_fitting,
        xmin_pos=args.xmin_pos,
        filter_zeros=args.filter_zeros,
        scope=args.balance_scope,
        remove_first=args.remove_first_layer,
        remove_last=args.remove_last_layer,
        batchnorm=args.batchnorm,
        batchnorm_type=args.batchnorm_type,
        lag=args.esd_lag if args.esd_async else 0,
        one_shot=args.one_shot,
        shuffle_seed=args.shuffle_seed if args.shuffle_decays else None,
        iso_budget=args.iso_budget,
        type_constant=args.type_constant,
        type_multipliers=args.type_multipliers,
    )


def register_decay_hooks(args: argparse.Namespace, optimizer: Optimizer) -> None:
    """Have the decays reach the weights as --adamc and --cautious_decay ask. Raises ValueError where the optimizer cannot."""
    if args.adamc or args.cautious_decay:
        install_decay_hooks(optimizer, args.lr if args.adamc else None, args.cautious_decay)


def check_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together."""
    kinds = [
        name
        for name in ("use_modulewise_wd", "use_AWD_NeurIPS2023", "use_AdaDecay")
        if getattr(args, name)
    ]
    if len(kinds) > 1:
        raise ValueError(f"--{kinds[0]} and --{kinds[1]} exclude each other: give one of them")
    for name in ("iso_budget", "one_shot", "shuffle_decays", "type_constant"):
        if getattr(args, name) and not args.use_modulewise_wd:
            raise ValueError(
                f"--{name} concerns module-wise decays: give --use_modulewise_wd too, or leave it out"
            )
    if args.type_multipliers and not args.type_constant:
        raise ValueError(
            "--type_multipliers are those of --type_constant: give both, or leave it out"
        )
    for name in ("one_shot", "esd_async"):
        if args.type_constant and getattr(args, name):
            raise ValueError(f"--type_constant analyses nothing: leave --{name} out")
    for name in ("adamc", "cautious_decay"):
        if args.use_AdaDecay and getattr(args, name):
            raise ValueError(
                f"--use_AdaDecay applies its decays itself, element by element: leave --{name} out"
            )
