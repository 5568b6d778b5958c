"""Command-line arguments of torchrun_main.py: their parser, and the checks that need more than one of them. main_vit.py shares the parts
that are not about text."""

import argparse

from peft_pretraining.cli.common import (
    DTYPES,
    PARALLEL,
    Parser,
    add_optimizer,
    add_records,
    check_numbers,
    name_run,
)
from peft_pretraining.data.sequences import Packing
from peft_pretraining.errors import UserError
from peft_pretraining.model.linear_cross_entropy import LOSSES
from peft_pretraining.optim.schedule import SCHEDULERS

PACKING_ATTENTION = ("across", "within")


def token_count(text: str) -> int:
    """`100M` -> 100_000_000, `1B` -> 1_000_000_000; plain numbers too."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper())
    try:
        count = int(float(text[:-1]) * scale) if scale else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of tokens: give for instance 100M or 1B"
        ) from None
    return count


def llama_parser() -> Parser:
    """The parser of torchrun_main.py, without the method's own flags. Defaults are the published settings."""
    parser = Parser(
        prog="torchrun_main.py",
        description="Pretrain LLaMA with module-wise weight decay.",
        allow_abbrev=False,
    )
    _add_model_and_data(parser.add_argument_group("model and data"))
    _add_training(parser.add_argument_group("training"))
    _add_run(parser.add_argument_group("evaluation, checkpoints and the run's records"))
    return parser


def _add_model_and_data(g) -> None:
    g.add_argument(
        "--model_config",
        required=True,
        metavar="FILE",
        help="a config of configs/, e.g. configs/llama_60m.json",
    )
    g.add_argument(
        "--use_hf_model",
        action="store_true",
        help="train transformers' LLaMA instead of the lean built-in one",
    )
    g.add_argument(
        "--dataset", default="c4", metavar="SOURCE",
        help="c4 (streamed from the Hugging Face Hub), pydocs (built in, needs no network), a .jsonl/.txt/.parquet file "
        "(.gz, .xz, .zst too), a folder of them, or what peft_pretraining.prepare_data made (default c4)",
    )  # fmt: skip
    g.add_argument(
        "--stream",
        action="store_true",
        help="read files while training instead of tokenizing them beforehand, as c4 always is",
    )
    g.add_argument(
        "--validation_file",
        metavar="FILE",
        help="default: the source's own validation split, or 1 %% held out by hash",
    )
    g.add_argument(
        "--tokenizer", help="a hub name, a folder, or bpe: trained on the corpus (default: that of the prepared data, else t5-base)"
    )  # fmt: skip
    g.add_argument(
        "--max_length",
        type=int,
        default=256,
        help="tokens in a row: a document is cut or padded to it (default 256)",
    )
    g.add_argument(
        "--max_passes",
        type=int,
        metavar="N",
        help="stop before data is seen more than N times (default: go on)",
    )
    g.add_argument(
        "--packing", action="store_true",
        help="rows without pads, in training and validation: documents joined by the end-of-sequence id and cut into windows",
    )  # fmt: skip
    g.add_argument(
        "--packing_attention", choices=PACKING_ATTENTION, default="across",
        help="what a token of a packed row sees: across: all before it (default); within: those of its own document, and no document's "
        "first token is predicted, as in padded rows",
    )  # fmt: skip
    g.add_argument(
        "--workers",
        type=int,
        default=8,
        help="processes that read and tokenize a stream, for each rank (default 8)",
    )
    g.add_argument(
        "--seed",
        type=int,
        default=5,
        help="of the initial weights and of the order of the data (default 5)",
    )


def _add_training(g) -> None:
    add_optimizer(g, lr=1e-3, weight_decay=1e-5)
    g.add_argument(
        "--batch_size",
        type=int,
        default=256,
        help="rows in a micro-batch of one process (default 256)",
    )
    g.add_argument(
        "--total_batch_size", type=int, help="rows in an update, over all processes (default 512)"
    )
    g.add_argument(
        "--gradient_accumulation",
        type=int,
        help="micro-batches in an update; follows from the two batch sizes",
    )
    g.add_argument("--num_training_steps", type=int, help="updates (default 10000)")
    g.add_argument(
        "--max_train_tokens",
        type=token_count,
        metavar="N",
        help="instead of steps: tokens, pads counted, e.g. 100M or 1B",
    )
    g.add_argument(
        "--warmup_steps", type=int, help="updates of linear warm-up (default: the first 10 %%)"
    )
    g.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        default="cosine",
        help="learning rate after the warm-up (default cosine)",
    )
    g.add_argument("--cycle_length", type=int, help="updates in a cycle of cosine_restarts")
    g.add_argument(
        "--min_lr_ratio",
        type=float,
        default=0.1,
        help="last learning rate over the peak (default 0.1)",
    )
    g.add_argument(
        "--grad_clipping",
        type=float,
        default=0.0,
        help="greatest gradient norm; 0: none (default; the paper's text says 1.0)",
    )
    g.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16",
        help="bfloat16: bf16 parameters, as published (default); bf16_mixed: float32 parameters under bf16 autocast, "
        "recommended for new runs: small decays are not rounded away; float32",
    )  # fmt: skip
    g.add_argument(
        "--loss", choices=("auto", *LOSSES), default="auto",
        help="how the head's cross-entropy is computed; all give the same numbers. chunked: never holds the logits of all tokens; plain: "
        "does; torch, liger: their own. auto: chunked on a CPU; on a GPU the fastest of those at hand, measured at the start (default)",
    )  # fmt: skip
    g.add_argument(
        "--compile", choices=("auto", "on", "off"), default="auto",
        help="compile the blocks with torch.compile; auto: where there is a GPU (default). On a CPU it needs a C++ compiler",
    )  # fmt: skip
    g.add_argument(
        "--activation_checkpointing",
        action="store_true",
        help="compute activations again in the backward pass: less memory",
    )
    g.add_argument(
        "--parallel", choices=PARALLEL, default="ddp",
        help="of several processes: ddp: each holds the whole model (default); fsdp: each holds a part of every weight, gradient and "
        "moment; checkpoints are the same",
    )  # fmt: skip
    g.add_argument(
        "--fsdp_shard_size", type=int, metavar="N",
        help="of fsdp: processes that share one copy of the model, for instance those of a node (default: all)",
    )  # fmt: skip
    g.add_argument(
        "--single_cuda", action="store_true", help="one process on one GPU, no process group"
    )


def _add_run(g) -> None:
    g.add_argument(
        "--eval_every",
        type=int,
        default=1000,
        help="updates between two evaluations (default 1000); one at the end",
    )
    g.add_argument(
        "--target_eval_tokens",
        type=int,
        default=10_000_000,
        help="tokens of an evaluation, at most (default 10_000_000)",
    )
    g.add_argument(
        "--save_every",
        type=int,
        default=10_000,
        help="updates between two checkpoints (default 10000); one follows the last",
    )
    g.add_argument(
        "--keep_checkpoints",
        type=int,
        metavar="N",
        help="delete all but the newest N after each save (default: keep all)",
    )
    g.add_argument(
        "--keep_every",
        type=int,
        metavar="M",
        help="checkpoints of every M-th update stay in spite of --keep_checkpoints",
    )
    g.add_argument("--save_dir", metavar="FOLDER", help="the run folder (default runs/NAME)")
    g.add_argument(
        "--continue_from",
        metavar="WHERE",
        help="a checkpoint, a run folder, or auto: the newest of this run, if any",
    )
    add_records(g)


def complete(args: argparse.Namespace, world_size: int) -> argparse.Namespace:
    """Fill in what follows from other arguments. Raises UserError where they contradict each other."""
    check_numbers(
        args,
        ("num_training_steps", "max_train_tokens", "batch_size", "total_batch_size", "gradient_accumulation", "max_length", "eval_every",
         "save_every", "log_every", "target_eval_tokens", "unbalancedWD_every", "cycle_length", "lr", "max_skipped_updates", "max_passes",
         "keep_checkpoints", "keep_every", "fsdp_shard_size"),
        ("warmup_steps", "weight_decay", "workers", "grad_clipping", "min_lr_ratio", "seed"),
    )  # fmt: skip
    _check_parallel(args, world_size)
    _complete_batch(args, world_size)
    _complete_steps(args)
    if args.scheduler == "cosine_restarts" and not args.cycle_length:
        raise UserError(
            "--scheduler cosine_restarts needs --cycle_length N, the updates in a cycle"
        )
    if args.packing_attention == "within" and (args.use_hf_model or not args.packing):
        why = (
            "the built-in model: leave --use_hf_model out"
            if args.use_hf_model
            else "packed rows: add --packing"
        )
        raise UserError(f"--packing_attention within is for {why}")
    if args.keep_every and not args.keep_checkpoints:
        raise UserError(
            "--keep_every says what --keep_checkpoints N leaves: give that too, or neither to keep all checkpoints"
        )
    name_run(args, args.model_config.rsplit("/", 1)[-1].removesuffix(".json"))
    args.save_dir = args.save_dir or f"runs/{args.name}"
    return args


def packing_of(args: argparse.Namespace) -> Packing:
    """What --packing and --packing_attention ask for."""
    return args.packing and (args.packing_attention == "across" or "within")


def _check_parallel(args: argparse.Namespace, world_size: int) -> None:
    if args.parallel == "fsdp" and args.optimizer == "muon":
        raise UserError(
            "--optimizer muon works on whole matrices, which --parallel fsdp cuts: give --parallel ddp or another optimizer"
        )
    size = args.fsdp_shard_size
    if size is None:
        return
    if args.parallel != "fsdp":
        raise UserError("--fsdp_shard_size is for --parallel fsdp: give that too, or leave it out")
    if size == 1 or world_size % size:
        raise UserError(
            f"--fsdp_shard_size {size}: it must be above 1 and divide the number of processes, {world_size}; leave it out to share one "
            "copy among all of them"
        )


def _complete_batch(args: argparse.Namespace, world_size: int) -> None:
    each = args.batch_size * world_size
    if args.total_batch_size is None:
        args.total_batch_size = (
            each * args.gradient_accumulation if args.gradient_accumulation else 512
        )
    if args.total_batch_size % each:
        raise UserError(
            f"--total_batch_size {args.total_batch_size} is not a multiple of --batch_size {args.batch_size} times {world_size} "
            f"process{'es' if world_size > 1 else ''}: give a --batch_size that divides {args.total_batch_size // world_size}"
        )
    accumulation = args.total_batch_size // each
    if args.gradient_accumulation not in (None, accumulation):
        raise UserError(
            f"--gradient_accumulation {args.gradient_accumulation} contradicts the batch sizes: {args.total_batch_size} / "
            f"({args.batch_size} x {world_size}) is {accumulation}; leave one of the three out"
        )
    args.gradient_accumulation = accumulation


def _complete_steps(args: argparse.Namespace) -> None:
    if args.max_train_tokens is not None:
        if args.num_training_steps is not None:
            raise UserError(
                "--num_training_steps and --max_train_tokens exclude each other: give one of them"
            )
        each = args.total_batch_size * args.max_length
        args.num_training_steps = args.max_train_tokens // each
        if not args.num_training_steps:
            raise UserError(
                f"--max_train_tokens {args.max_train_tokens} is less than one update of {each} tokens: give more"
            )
    args.num_training_steps = args.num_training_steps or 10_000
    if args.warmup_steps is None:
        args.warmup_steps = args.num_training_steps // 10
    if args.warmup_steps > args.num_training_steps:
        raise UserError(
            f"--warmup_steps {args.warmup_steps} is more than --num_training_steps {args.num_training_steps}: give fewer"
        )
