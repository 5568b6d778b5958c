"""Command-line arguments that both training scripts share: the parser class, argument types, argument groups, run names."""

import argparse
from typing import NoReturn

from peft_pretraining.errors import UserError
from peft_pretraining.optim.optimizer import OPTIMIZERS

DTYPES = ("bfloat16", "bf16_mixed", "float32")
ON_SAVE_ERROR = ("continue", "stop")
PARALLEL = ("ddp", "fsdp")


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one sentence, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def str_to_bool(text: str) -> bool:
    """A boolean that means what it says: true or false, in any case."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_optimizer(g, lr: float, weight_decay: float) -> None:
    """The optimizer's flags, with these defaults, to a group of a parser."""
    g.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adam",
        help="adam: the decay enters the moments (L2); adamw: decoupled; muon: torch's for the hidden matrices, adamw for the rest",
    )  # fmt: skip
    g.add_argument("--lr", type=float, default=lr, help=f"peak learning rate (default {lr:g})")
    g.add_argument(
        "--weight_decay",
        type=float,
        default=weight_decay,
        help=f"eta, the decay that is scaled for each module (default {weight_decay:g})",
    )
    g.add_argument(
        "--max_skipped_updates", type=int, default=10, metavar="N",
        help="updates whose loss or gradient is not finite are left out; after N in a row the run stops, with a checkpoint (default 10)",
    )  # fmt: skip


def add_records(g) -> None:
    """The flags of a run's name and records to a group of a parser."""
    g.add_argument(
        "--on_save_error", choices=ON_SAVE_ERROR, default="continue",
        help="when a checkpoint cannot be written, as on a full disk: continue and try again with the next (default), or stop",
    )  # fmt: skip
    g.add_argument(
        "--name",
        help="name of the run and its folder (default: --wandb_name, or made of the settings)",
    )
    g.add_argument("--wandb_name", help="name of the run in W&B (default: --name)")
    g.add_argument(
        "--no_wandb", action="store_true", help="keep the records in the run folder only"
    )
    g.add_argument("--tags", default="", help="W&B tags, separated by commas")
    g.add_argument(
        "--log_every",
        type=int,
        default=10,
        help="updates between two lines of metrics.jsonl (default 10)",
    )
    g.add_argument(
        "--profile",
        action="store_true",
        help="write a torch profiler trace of updates 4 to 6 of this process to RUN/profile/rank0.json.gz",
    )


def method_name(args: argparse.Namespace) -> str:
    """`alphadecay`, `gradnorm+iso_budget`: the method and what is added to it."""
    kinds = {
        "alphadecay": args.use_modulewise_wd,
        "awd": args.use_AWD_NeurIPS2023,
        "adadecay": args.use_AdaDecay,
        "uniform": True,
    }
    name = args.method or next(kind for kind, on in kinds.items() if on)
    # A method's name settles all switches but the last three.
    switches = ("one_shot", "shuffle_decays", "type_constant") * (not args.method) + (
        "iso_budget",
        "adamc",
        "cautious_decay",
    )
    return "+".join([name, *(switch for switch in switches if getattr(args, switch))])


def name_run(args: argparse.Namespace, model: str) -> None:
    """Fill in the names, and check the flags that both scripts have. Raises UserError."""
    if args.use_modulewise_wd and args.wd_min_ratio > args.wd_max_ratio:
        raise UserError(
            f"--wd_min_ratio {args.wd_min_ratio} is above --wd_max_ratio {args.wd_max_ratio}: swap them"
        )
    settings = f"{model}-{method_name(args)}-{args.optimizer}-lr{args.lr:g}-wd{args.weight_decay:g}-seed{args.seed}"
    args.name = args.name or args.wandb_name or settings
    args.wandb_name = args.wandb_name or args.name
    args.tags = [tag.strip() for tag in args.tags.split(",") if tag.strip()]
    if any(len(tag) > 64 for tag in args.tags):
        raise UserError("--tags: W&B takes tags of at most 64 characters; separate them by commas")


def check_numbers(
    args: argparse.Namespace, positive: tuple[str, ...], not_negative: tuple[str, ...]
) -> None:
    """Raise UserError for an argument out of its range; None is in every range."""
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: it must be above 0")
    for name in not_negative:
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise UserError(f"--{name} {value}: it must be 0 or more")
