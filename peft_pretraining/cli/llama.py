"""Command-line arguments of torchrun_main.py: parser, completion and checks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from peft_pretraining.cli.common import (
    DTYPES,
    PARALLEL,
    Parser,
    add_deterministic,
    add_optimizer,
    add_records,
    add_resume,
    add_saving,
    add_switch,
    check_numbers,
    complete_resume,
    dtype,
    name_run,
)
from peft_pretraining.constants import LOSS_NAMES
from peft_pretraining.errors import UserError
from peft_pretraining.optim.schedule import SCHEDULERS

if TYPE_CHECKING:
    from peft_pretraining.data.sequences import Packing

DEFAULT_TOTAL_BATCH, MAX_DEFAULT_BATCH = 512, 256  # sequences, as in the published commands
PACKING_ATTENTION = ("across", "within")

# Arguments that are stored in a checkpoint and compared when a run is resumed. A difference is a
# warning: the resumed run is then another one than the run that it continues.
RESUME_ARGUMENTS = (
    "use_hf_model",
    "loss",
    "compile",
    "optimizer",
    "lr",
    "weight_decay",
    "total_batch_size",
    "num_training_steps",
    "warmup_steps",
    "scheduler",
    "cycle_length",
    "min_lr_ratio",
    "grad_clipping",
    "dtype",
    "seed",
    "use_modulewise_wd",
    "alpha_positively_with_WD",
    "unbalancedWD_every",
    "esd_metric_for_tb",
    "assign_func",
    "wd_min_ratio",
    "wd_max_ratio",
    "pl_fitting",
    "xmin_pos",
    "filter_zeros",
    "remove_first_layer",
    "remove_last_layer",
    "balance_scope",
    "esd_async",
    "esd_lag",
    "use_AWD_NeurIPS2023",
    "use_AdaDecay",
    "iso_budget",
    "one_shot",
    "shuffle_decays",
    "shuffle_seed",
    "type_constant",
    "type_multipliers",
    "adamc",
    "cautious_decay",
)

# A checkpoint stores a fingerprint of the data and the model's config instead of these.
DATA_ARGUMENTS = (
    "model_config",
    "dataset",
    "validation_file",
    "tokenizer",
    "max_length",
    "packing",
    "packing_attention",
)

POSITIVE = (
    "num_training_steps",
    "max_train_tokens",
    "batch_size",
    "total_batch_size",
    "gradient_accumulation",
    "max_length",
    "eval_every",
    "save_every",
    "log_every",
    "target_eval_tokens",
    "unbalancedWD_every",
    "cycle_length",
    "lr",
    "max_skipped_updates",
    "max_passes",
    "keep_checkpoints",
    "keep_every",
    "fsdp_shard_size",
    "timeout_minutes",
)
NOT_NEGATIVE = (
    "warmup_steps",
    "weight_decay",
    "workers",
    "grad_clipping",
    "min_lr_ratio",
    "seed",
    "save_every_minutes",
)


EXAMPLE = """example:
  torchrun --nproc_per_node=2 torchrun_main.py --model_config configs/llama_9m.json \\
      --dataset pydocs --tokenizer bpe --method alphadecay --dtype float32 \\
      --total_batch_size 32 --num_training_steps 1000
"""


def token_count(text: str) -> int:
    """Parse a number of tokens: `100M` is 100,000,000, `1B` is 1,000,000,000; also plain numbers.

    Raises:
        argparse.ArgumentTypeError: the text is not a number of tokens.
    """
    scale = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper())
    try:
        return int(float(text[:-1]) * scale) if scale else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of tokens: give for instance 100M or 1B"
        ) from None


def llama_parser() -> Parser:
    """Return the parser of torchrun_main.py without the flags of the weight-decay method.

    The defaults are the settings of the published runs.
    """
    parser = Parser(
        prog="torchrun_main.py",
        description="Pretrain LLaMA with module-wise weight decay.",
        epilog=EXAMPLE,
    )
    _add_model_and_data(parser.add_argument_group("model and data"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("evaluation, checkpoints and the run's records"))
    return parser


def _add_model_and_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model_config",
        required=True,
        metavar="FILE",
        help="Model config, for instance configs/llama_60m.json.",
    )
    add_switch(
        group,
        "use_hf_model",
        "Train transformers' implementation of LLaMA instead of the built-in one.",
    )
    group.add_argument(
        "--dataset",
        default="c4",
        metavar="SOURCE",
        help="c4 (streamed from the Hugging Face Hub), pydocs (Python's own documentation, needs "
        "no network), a .jsonl, .txt or .parquet file (also .gz, .xz, .zst), a folder of such "
        "files, or a folder that peft_pretraining.prepare_data has written (default c4).",
    )
    add_switch(
        group,
        "stream",
        "Read and tokenize files during training instead of tokenizing them before it. "
        "c4 is always streamed.",
    )
    group.add_argument(
        "--validation_file",
        metavar="FILE",
        help="Validation documents (default: the source's own validation split, or 1 %% of the "
        "documents, selected by a hash).",
    )
    group.add_argument(
        "--tokenizer",
        help="Name on the Hub, a folder, or bpe, which is trained on the corpus (default: the "
        "tokenizer of the prepared data, otherwise t5-base).",
    )
    group.add_argument(
        "--max_length",
        type=int,
        default=256,
        help="Tokens in a sequence. A document is truncated or padded to this length (default "
        "256).",
    )
    group.add_argument(
        "--max_passes",
        type=int,
        metavar="N",
        help="Stop before any data is used more than N times (default: no limit).",
    )
    add_switch(
        group,
        "packing",
        "Use sequences without padding in training and validation: the documents are "
        "concatenated, separated by the end-of-sequence id, and cut into windows.",
    )
    group.add_argument(
        "--packing_attention",
        choices=PACKING_ATTENTION,
        default="across",
        help="Attention in packed sequences. across: to all tokens before (default). within: to "
        "tokens of the same document only; the first token of a document is then not predicted, "
        "as in padded sequences.",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=8,
        help="Number of processes of each rank that read and tokenize a stream (default 8).",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=5,
        help="Seed of the initial weights and of the order of the data (default 5).",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    add_optimizer(group, lr=1e-3, weight_decay=1e-5)
    group.add_argument(
        "--batch_size",
        type=int,
        help="Sequences in a micro-batch of one process (default: the largest number up to 256 "
        "that divides the sequences of a process).",
    )
    group.add_argument(
        "--total_batch_size",
        type=int,
        help="Sequences in an update, summed over all processes (default 512).",
    )
    group.add_argument(
        "--gradient_accumulation",
        type=int,
        help="Micro-batches of each process in an update (default: computed from the two batch "
        "sizes).",
    )
    group.add_argument("--num_training_steps", type=int, help="Number of updates (default 10000).")
    group.add_argument(
        "--max_train_tokens",
        type=token_count,
        metavar="N",
        help="Length of the training in tokens, padding included, instead of --num_training_steps. "
        "For instance 100M or 1B (default: as many as the updates have).",
    )
    group.add_argument(
        "--warmup_steps",
        type=int,
        help="Updates of linear warm-up (default: the first 10 %% of the updates).",
    )
    group.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default="cosine",
        help="Learning-rate schedule after the warm-up (default cosine).",
    )
    group.add_argument(
        "--cycle_length",
        type=int,
        help="Updates in a cycle of --scheduler cosine_restarts, which needs it (no default).",
    )
    group.add_argument(
        "--min_lr_ratio",
        type=float,
        default=0.1,
        help="Final learning rate divided by the peak learning rate (default 0.1).",
    )
    group.add_argument(
        "--grad_clipping",
        type=float,
        default=0.0,
        help="Maximum norm of the gradients; 0 turns clipping off (default 0; the text of the "
        "paper says 1.0).",
    )
    group.add_argument(
        "--dtype",
        type=dtype,
        metavar="{" + ",".join(DTYPES) + "}",
        default="bfloat16",
        help="bfloat16: bfloat16 parameters, as in the published runs (default). bf16_mixed: "
        "float32 parameters with bfloat16 autocast. This is recommended for new runs, because "
        "small weight decays are then not lost by rounding. float32: everything in float32.",
    )
    group.add_argument(
        "--loss",
        choices=("auto", *LOSS_NAMES),
        default="auto",
        help="Implementation of the output layer's cross-entropy; all compute the same loss. "
        "chunked never holds the logits of all tokens in memory, plain does. torch and liger are "
        "those of the libraries. auto is that of the run that is continued, and chunked in a new "
        "run (default auto).",
    )
    group.add_argument(
        "--compile",
        choices=("auto", "on", "off"),
        default="auto",
        help="Compile the transformer blocks with torch.compile; auto does so on a GPU if "
        "a C++ compiler is installed (default auto).",
    )
    add_deterministic(group)
    add_switch(
        group,
        "activation_checkpointing",
        "Recompute activations in the backward pass. This needs less memory and more time.",
    )
    group.add_argument(
        "--parallel",
        choices=PARALLEL,
        default="ddp",
        help="How several processes train one model. ddp: each holds the whole model (default). "
        "fsdp: each holds a part of every weight, gradient and optimizer state. The checkpoints "
        "have the same format.",
    )
    group.add_argument(
        "--fsdp_shard_size",
        type=int,
        metavar="N",
        help="With --parallel fsdp: number of processes that share one copy of the model, for "
        "instance those of a node (default: all).",
    )
    add_switch(
        group,
        "single_cuda",
        "Require exactly one process with one GPU, without a process group.",
    )


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--eval_every",
        type=int,
        default=1000,
        help="Updates between two evaluations (default 1000). The last update is always evaluated.",
    )
    group.add_argument(
        "--target_eval_tokens",
        type=int,
        default=10_000_000,
        help="Maximum number of tokens of an evaluation (default 10_000_000).",
    )
    group.add_argument(
        "--save_every",
        type=int,
        default=10_000,
        help="Updates between two checkpoints (default 10000). The last update is always saved.",
    )
    group.add_argument(
        "--keep_checkpoints",
        type=int,
        metavar="N",
        help="Delete all checkpoints but the newest N after each save (default: keep all).",
    )
    group.add_argument(
        "--keep_every",
        type=int,
        metavar="M",
        help="Never delete the checkpoint of an update that is a multiple of M (default: no such "
        "checkpoints).",
    )
    group.add_argument("--save_dir", metavar="FOLDER", help="Run folder (default runs/NAME).")
    add_saving(group)
    add_resume(group)
    add_records(group)
    group.add_argument(
        "--beta1",
        type=float,
        help="Accepted for published commands, where Adafactor alone reads it. It has no effect: "
        "the betas of Adam are 0.9 and 0.999 (default: none).",
    )


def complete(args: argparse.Namespace, world_size: int, method: str) -> argparse.Namespace:
    """Fill in the arguments that follow from others, and check that they fit each other.

    Args:
        args: the parsed arguments, changed in place.
        world_size: number of processes.
        method: name of the weight-decay method.

    Returns:
        The same arguments.

    Raises:
        UserError: an argument contradicts another one or is out of range.
    """
    check_numbers(args, POSITIVE, NOT_NEGATIVE)
    _check_parallel(args, world_size)
    _complete_batch(args, world_size)
    _complete_steps(args)
    if args.scheduler == "cosine_restarts" and not args.cycle_length:
        raise UserError(
            "--scheduler cosine_restarts needs --cycle_length N, the updates in a cycle"
        )
    if args.packing_attention == "within":
        if args.use_hf_model:
            raise UserError(
                "--packing_attention within is implemented in the built-in model only: "
                "leave --use_hf_model out"
            )
        if not args.packing:
            raise UserError("--packing_attention within needs packed sequences: add --packing")
    if args.keep_every and not args.keep_checkpoints:
        raise UserError(
            "--keep_every has an effect only with --keep_checkpoints N: give both, or leave both "
            "out to keep all checkpoints"
        )
    complete_resume(args)
    name_run(args, args.model_config.rsplit("/", 1)[-1].removesuffix(".json"), method)
    args.save_dir = args.save_dir or f"runs/{args.name}"
    return args


def packing_mode(packing: bool, packing_attention: str) -> Packing:
    """Return the packing that --packing and --packing_attention ask for.

    Returns:
        False for padded sequences, True for packed ones, "within" if attention is to stay within
        documents.
    """
    if packing and packing_attention == "within":
        return "within"
    return packing


def _check_parallel(args: argparse.Namespace, world_size: int) -> None:
    if args.parallel == "fsdp" and args.optimizer == "muon":
        raise UserError(
            "--optimizer muon needs whole matrices, but --parallel fsdp shards them: give "
            "--parallel ddp or another optimizer"
        )
    size = args.fsdp_shard_size
    if size is None:
        return
    if args.parallel != "fsdp":
        raise UserError("--fsdp_shard_size is for --parallel fsdp: give that too, or leave it out")
    if size == 1 or world_size % size:
        raise UserError(
            f"--fsdp_shard_size {size}: it must be above 1 and divide the number of processes, "
            f"{world_size}; leave it out to share one copy among all of them"
        )


def _complete_batch(args: argparse.Namespace, world_size: int) -> None:
    """Compute those of micro-batch, total batch and gradient accumulation that are not given."""
    processes = f"{world_size} process{'es' if world_size > 1 else ''}"
    total, accumulation = args.total_batch_size, args.gradient_accumulation
    if total is None and args.batch_size and accumulation:
        total = args.batch_size * accumulation * world_size
    total = args.total_batch_size = total or DEFAULT_TOTAL_BATCH
    if total % world_size:
        below = total // world_size * world_size
        raise UserError(
            f"--total_batch_size {total} cannot be divided evenly among {processes}: give for "
            f"instance {below or world_size} or {below + world_size}"
        )
    each = total // world_size  # sequences of a process in an update
    if args.batch_size is None:
        # As few micro-batches as the published size of at most 256 allows.
        fewest = accumulation or -(-each // MAX_DEFAULT_BATCH)
        accumulation = accumulation or next(n for n in range(fewest, each + 1) if each % n == 0)
        args.batch_size = each // accumulation
    if not args.batch_size or each % args.batch_size:
        raise UserError(
            f"--total_batch_size {total} is not a multiple of --batch_size "
            f"{args.batch_size or accumulation} times {processes}: give a --batch_size that "
            f"divides {each}, or leave it out"
        )
    if args.gradient_accumulation not in (None, each // args.batch_size):
        raise UserError(
            f"--gradient_accumulation {args.gradient_accumulation} contradicts the batch sizes: "
            f"{total} / ({args.batch_size} x {world_size}) is {each // args.batch_size}; "
            "leave one of the three out"
        )
    args.gradient_accumulation = each // args.batch_size


def _complete_steps(args: argparse.Namespace) -> None:
    """Compute the number of updates and of warm-up updates."""
    if args.max_train_tokens is not None:
        if args.num_training_steps is not None:
            raise UserError(
                "--num_training_steps and --max_train_tokens exclude each other: give one of them"
            )
        per_update = args.total_batch_size * args.max_length
        args.num_training_steps = args.max_train_tokens // per_update
        if not args.num_training_steps:
            raise UserError(
                f"--max_train_tokens {args.max_train_tokens} is less than one update of "
                f"{per_update} tokens: give more"
            )
    args.num_training_steps = args.num_training_steps or 10_000
    if args.warmup_steps is None:
        args.warmup_steps = args.num_training_steps // 10
    if args.warmup_steps > args.num_training_steps:
        raise UserError(
            f"--warmup_steps {args.warmup_steps} is more than --num_training_steps "
            f"{args.num_training_steps}: give fewer"
        )
