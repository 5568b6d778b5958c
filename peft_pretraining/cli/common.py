"""Command-line arguments that both training scripts have: parser, types, groups, run names."""

import argparse
import os
from typing import Any, NoReturn

from peft_pretraining.constants import OPTIMIZERS
from peft_pretraining.errors import UserError

DTYPES = ("bfloat16", "bf16_mixed", "float32")
# Other words that people type for them.
DTYPE_WORDS = {"bf": "bfloat16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}
ON_SAVE_ERROR = ("continue", "stop")
PARALLEL = ("ddp", "fsdp")
MAX_TAG_LENGTH = 64  # characters, the limit of W&B


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one sentence, without printing the usage of all flags."""

    def __init__(self, **options: Any):
        super().__init__(
            **options, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message."""
        raise UserError(f"{message}; see --help")


def str_to_bool(text: str) -> bool:
    """Parse 'true' or 'false' (case-insensitive); an empty text is false, as in published commands.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text.lower() not in ("true", "false", ""):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def dtype(text: str) -> str:
    """Return the value of --dtype that a word stands for, such as `bfloat16` for `bf16`.

    Raises:
        argparse.ArgumentTypeError: the word is unknown, or means float16.
    """
    name = DTYPE_WORDS.get(text.lower(), text)
    if name in ("fp16", "float16", "half"):
        raise argparse.ArgumentTypeError(
            f"{text!r}: float16 is not supported; give bfloat16, or bf16_mixed to keep float32 "
            "parameters"
        )
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DTYPES)}")
    return name


def add_switch(group: argparse._ArgumentGroup, name: str, help: str) -> None:
    """Add a flag that turns something on; `--name true` and `--name false` work too."""
    group.add_argument(
        f"--{name}",
        type=str_to_bool,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help=f"{help.rstrip('.')} (default false).",
    )


def add_optimizer(group: argparse._ArgumentGroup, lr: float, weight_decay: float) -> None:
    """Add the flags of the optimizer to a group of arguments.

    Args:
        group: the group of a parser.
        lr: default of --lr.
        weight_decay: default of --weight_decay.
    """
    group.add_argument(
        "--optimizer",
        type=str.lower,
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
        "--project", help="W&B project (default: $WANDB_PROJECT if it is set, else alphadecay)."
    )
    add_switch(group, "no_wandb", "Write the records to the run folder only, not to W&B")
    group.add_argument("--tags", default="", help="W&B tags, separated by commas (default: none).")
    group.add_argument(
        "--log_every",
        type=int,
        default=10,
        help="Number of updates between two lines of metrics.jsonl, and of the log where there is "
        "no progress bar (default 10).",
    )
    add_switch(
        group,
        "profile",
        "Write a torch profiler trace of updates 4 to 6 of rank 0 to RUN/profile/rank0.json.gz",
    )
    add_switch(
        group,
        "dry_run",
        "Print what this command would do (method, batch, memory, data, records), and train "
        "nothing",
    )


def add_deterministic(group: argparse._ArgumentGroup) -> None:
    """Add the flag for bit-identical results on a GPU."""
    add_switch(
        group,
        "deterministic",
        "Use algorithms that give the same bits in every run on a GPU, so that a resumed run is "
        "bit for bit the run that was never stopped. Some are slower. On a CPU nothing changes.",
    )


def add_saving(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say when to save besides, and what to do if that fails."""
    group.add_argument(
        "--save_every_minutes",
        type=float,
        default=15.0,
        metavar="M",
        help="Save also when the last checkpoint is older than M minutes, so that a fault costs no "
        "more than that. Such a checkpoint is deleted as soon as there is a newer one. 0: never "
        "(default 15).",
    )
    group.add_argument(
        "--timeout_minutes",
        type=float,
        default=10.0,
        metavar="M",
        help="End the run, with the stacks of all threads in the log, if another process does not "
        "answer for M minutes. Rank 0 may prepare data for longer (default 10).",
    )


def add_resume(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say where a run continues."""
    group.add_argument(
        "--continue_from",
        "--resume",
        metavar="WHERE",
        help="Where to start. auto: from the newest checkpoint of this run's folder, if there is "
        "one. none: from scratch. Otherwise a checkpoint, or another run's folder, whose newest "
        "checkpoint is taken. (default: auto, but only if the checkpoint was made with the same "
        "settings)",
    )
    group.add_argument(
        "--auto_resume",
        type=str_to_bool,
        default=True,
        metavar="BOOL",
        help="false is --continue_from none (default true).",
    )


def complete_resume(args: argparse.Namespace) -> None:
    """Fill in --continue_from.

    Args:
        args: the parsed arguments, changed in place. `continue_from` becomes None for a start from
            scratch. `same_settings_only` says whether a checkpoint with other settings is refused.

    Raises:
        UserError: the two flags contradict each other.
    """
    args.same_settings_only = args.continue_from is None
    if not args.auto_resume:
        if args.continue_from not in (None, "none"):
            raise UserError(
                f"--auto_resume false contradicts --continue_from {args.continue_from}: leave one "
                "of the two out"
            )
        args.continue_from = "none"
    args.continue_from = args.continue_from or "auto"
    if args.continue_from == "none":
        args.continue_from = None


def name_run(args: argparse.Namespace, model: str, method: str) -> None:
    """Fill in the names of the run, and check the flags that both scripts have.

    Args:
        args: the parsed arguments, changed in place.
        model: name of the model, which becomes a part of the run's name.
        method: name of the method, likewise.

    Raises:
        UserError: a flag contradicts another one or is out of range.
    """
    if args.use_modulewise_wd and args.wd_min_ratio > args.wd_max_ratio:
        raise UserError(
            f"--wd_min_ratio {args.wd_min_ratio} is above --wd_max_ratio {args.wd_max_ratio}: "
            "swap them"
        )
    settings = (
        f"{model}-{method}-{args.optimizer}-lr{args.lr:g}-wd{args.weight_decay:g}-seed{args.seed}"
    )
    args.name = args.name or args.wandb_name or settings
    args.wandb_name = args.wandb_name or args.name
    args.project = args.project or os.environ.get("WANDB_PROJECT") or "alphadecay"
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
