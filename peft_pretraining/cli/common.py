"""Command-line arguments that both training scripts have: parser, types, groups, run names."""

import argparse
from typing import NoReturn

from peft_pretraining.constants import OPTIMIZERS
from peft_pretraining.errors import UserError

DTYPES = ("bfloat16", "bf16_mixed", "float32")
ON_SAVE_ERROR = ("continue", "stop")
PARALLEL = ("ddp", "fsdp")
MAX_TAG_LENGTH = 64  # characters, the limit of W&B


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one sentence, without printing the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message."""
        raise UserError(f"{message}; see --help")


def str_to_bool(text: str) -> bool:
    """Parse 'true' or 'false' (case-insensitive).

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def add_optimizer(group: argparse._ArgumentGroup, lr: float, weight_decay: float) -> None:
    """Add the flags of the optimizer to a group of arguments.

    Args:
        group: the group of a parser.
        lr: default of --lr.
        weight_decay: default of --weight_decay.
    """
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adam",
        help="adam adds the weight decay to the gradient (L2). adamw decouples it from the "
        "gradient. muon is torch's Muon for the hidden matrices and adamw for the other "
        "parameters. (default adam)",
    )
    group.add_argument("--lr", type=float, default=lr, help=f"Peak learning rate (default {lr:g}).")
    group.add_argument(
        "--weight_decay",
        type=float,
        default=weight_decay,
        help=f"Weight decay eta, which is scaled for each module (default {weight_decay:g}).",
    )
    group.add_argument(
        "--max_skipped_updates",
        type=int,
        default=10,
        metavar="N",
        help="An update is skipped if its loss or a gradient is not finite. After N skipped "
        "updates in a row the run stops and saves a checkpoint (default 10).",
    )


def add_records(group: argparse._ArgumentGroup) -> None:
    """Add the flags of a run's name and records to a group of arguments."""
    group.add_argument(
        "--on_save_error",
        choices=ON_SAVE_ERROR,
        default="continue",
        help="What to do if a checkpoint cannot be written, for instance because the disk is full: "
        "continue training and try again at the next checkpoint (default), or stop.",
    )
    group.add_argument(
        "--name",
        help="Name of the run and of its folder (default: --wandb_name, or a name that is built "
        "from the settings).",
    )
    group.add_argument("--wandb_name", help="Name of the run in W&B (default: --name).")
    group.add_argument(
        "--no_wandb",
        action="store_true",
        help="Write the records to the run folder only, not to W&B.",
    )
    group.add_argument("--tags", default="", help="W&B tags, separated by commas.")
    group.add_argument(
        "--log_every",
        type=int,
        default=10,
        help="Number of updates between two lines of metrics.jsonl (default 10).",
    )
    group.add_argument(
        "--profile",
        action="store_true",
        help="Write a torch profiler trace of updates 4 to 6 of rank 0 to "
        "RUN/profile/rank0.json.gz.",
    )


def method_name(args: argparse.Namespace) -> str:
    """Return the method and the options added to it, e.g. `alphadecay` or `gradnorm+iso_budget`."""
    kinds = {
        "alphadecay": args.use_modulewise_wd,
        "awd": args.use_AWD_NeurIPS2023,
        "adadecay": args.use_AdaDecay,
        "uniform": True,
    }
    name = args.method or next(kind for kind, on in kinds.items() if on)
    options = ["iso_budget", "adamc", "cautious_decay"]
    if not args.method:
        # The value of --method already says which of these are on.
        options = ["one_shot", "shuffle_decays", "type_constant", *options]
    return "+".join([name, *(option for option in options if getattr(args, option))])


def name_run(args: argparse.Namespace, model: str) -> None:
    """Fill in the names of the run, and check the flags that both scripts have.

    Args:
        args: the parsed arguments, changed in place.
        model: name of the model, which becomes a part of the run's name.

    Raises:
        UserError: a flag contradicts another one or is out of range.
    """
    if args.use_modulewise_wd and args.wd_min_ratio > args.wd_max_ratio:
        raise UserError(
            f"--wd_min_ratio {args.wd_min_ratio} is above --wd_max_ratio {args.wd_max_ratio}: "
            "swap them"
        )
    settings = (
        f"{model}-{method_name(args)}-{args.optimizer}-lr{args.lr:g}-wd{args.weight_decay:g}"
        f"-seed{args.seed}"
    )
    args.name = args.name or args.wandb_name or settings
    args.wandb_name = args.wandb_name or args.name
    args.tags = [tag.strip() for tag in args.tags.split(",") if tag.strip()]
    if any(len(tag) > MAX_TAG_LENGTH for tag in args.tags):
        raise UserError(
            f"--tags: W&B takes tags of at most {MAX_TAG_LENGTH} characters; "
            "separate them by commas"
        )


def check_numbers(
    args: argparse.Namespace, positive: tuple[str, ...], not_negative: tuple[str, ...]
) -> None:
    """Check the range of numbers; an argument that is None is not checked.

    Args:
        args: the parsed arguments.
        positive: names of the arguments that must be above 0.
        not_negative: names of the arguments that must be 0 or more.

    Raises:
        UserError: a number is out of its range, or NaN.
    """
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: it must be above 0")
    for name in not_negative:
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise UserError(f"--{name} {value}: it must be 0 or more")
