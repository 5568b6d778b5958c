"""The method's command-line flags, in the spelling of the published commands, for any argparse script."""

import argparse

import torch.nn as nn

from alphadecay.assignment import MAPS
from alphadecay.balancer import AlphaDecay
from alphadecay.baselines import AWD
from alphadecay.modules import BATCHNORM_TYPES, SCOPES
from alphadecay.power_law import METHODS
from alphadecay.statistics import METRICS


def true_or_false(text: str) -> bool:
    """A boolean that means what it says: true or false, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of AlphaDecay and of its baseline AWD. `--weight_decay` (eta) is the script's own."""
    g = parser.add_argument_group("module-wise weight decay (AlphaDecay)")
    g.add_argument("--use_modulewise_wd", action="store_true", help="give each module its own decay; absent: --weight_decay everywhere")
    g.add_argument(
        "--alpha_positively_with_WD", action="store_true", help="decay rises with the score (the method); absent: the reverse, a control"
    )
    g.add_argument("--unbalancedWD_every", type=int, default=500, metavar="N", help="updates between two analyses (default 500)")
    g.add_argument("--esd_metric_for_tb", choices=METRICS, default="alpha", help="the statistic modules are scored by (default alpha)")
    g.add_argument("--assign_func", choices=MAPS, default="tb_linear_map", help="score -> decay (default tb_linear_map)")
    g.add_argument("--wd_min_ratio", type=float, default=0.6666, metavar="S1", help="least decay / eta of the linear map (default 0.6666)")
    g.add_argument("--wd_max_ratio", type=float, default=3.0, metavar="S2", help="greatest decay / eta of the linear map (default 3)")
    g.add_argument("--pl_fitting", choices=METHODS, default="median", help="the power-law fit (default median, as published)")
    g.add_argument("--xmin_pos", type=float, default=2.0, help="median fit: N / xmin_pos is the threshold's index (default 2)")
    g.add_argument("--filter_zeros", type=true_or_false, default=False, metavar="BOOL", help="fit without eigenvalues up to 1e-5")
    g.add_argument("--remove_first_layer", type=true_or_false, default=True, metavar="BOOL", help="do not balance the first module")
    g.add_argument("--remove_last_layer", type=true_or_false, default=True, metavar="BOOL", help="do not balance the last module")
    g.add_argument("--batchnorm", type=true_or_false, default=True, metavar="BOOL", help="BatchNorm2d follows its convolution's decay")
    g.add_argument("--batchnorm_type", choices=BATCHNORM_TYPES, default="name", help="which one: of its name, or the nearest before it")
    g.add_argument("--balance_scope", choices=SCOPES, default="reference", help="all_blocks: every projection of every block")
    g.add_argument("--esd_async", action="store_true", help="analyse beside the training; the decays take effect --esd_lag updates later")
    g.add_argument("--esd_lag", type=int, default=10, metavar="N", help="of --esd_async: updates until the decays take effect (default 10)")
    g.add_argument("--use_AWD_NeurIPS2023", action="store_true", help="baseline: adaptive weight decay (Ghiasi et al. 2023)")


def decay_from_flags(args: argparse.Namespace, model: nn.Module, awd_factor: float) -> AlphaDecay | AWD | None:
    """What the flags ask for: AlphaDecay, AWD (at awd_factor * eta), or None for uniform decay. Raises ValueError."""
    if args.use_AWD_NeurIPS2023:
        if args.use_modulewise_wd:
            raise ValueError("--use_modulewise_wd and --use_AWD_NeurIPS2023 exclude each other: give one of them")
        return AWD(model, awd_factor * args.weight_decay)
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
    )
