"""Tokenize a source once, into a folder that `--dataset FOLDER` then trains on.

    python -m peft_pretraining.prepare_data --dataset c4 --tokenizer t5-base \\
        --model_config configs/llama_130m.json --max_tokens 3B --target_eval_tokens 10M \\
        --output c4-3B

After a kill or an interruption the same command continues where it stopped. Called again on a
complete folder, it makes anew what has been damaged since.
"""

# Everything that takes long to import is imported in the functions: --help is then quick, and so
# are the tokenizing processes, each of which imports this module.
import argparse
import sys
import time
from pathlib import Path

from peft_pretraining.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """Return the checked arguments. Raises UserError for wrong ones."""
    from peft_pretraining.cli.common import Parser
    from peft_pretraining.cli.llama import token_count

    parser = Parser(
        prog="python -m peft_pretraining.prepare_data",
        description="Tokenize a source once, for training with --dataset FOLDER.",
    )
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="SOURCE",
        help="c4, pydocs, a .jsonl/.txt/.parquet file or a folder of them",
    )
    parser.add_argument(
        "--tokenizer",
        help="a Hub name, a folder, or bpe: trained on the corpus (default t5-base)",
    )
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--vocab_size",
        type=int,
        metavar="N",
        help="smallest number of embeddings of the models that will be trained",
    )
    size.add_argument(
        "--model_config",
        metavar="FILE",
        help="the config of such a model, e.g. configs/llama_60m.json",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FOLDER",
        help="the folder to write; the training's --dataset",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="number of tokenizing processes (default: one per core, or 1 for a small source)",
    )
    parser.add_argument(
        "--max_tokens",
        type=token_count,
        metavar="N",
        help="use at most so many tokens for training, e.g. 100M (default: all); a larger "
        "number continues a folder that was prepared with a smaller one",
    )
    parser.add_argument(
        "--validation_file",
        metavar="FILE",
        help="validation documents (default: the source's own validation split, or 1 %% of its "
        "documents, chosen by their hash)",
    )
    parser.add_argument(
        "--target_eval_tokens",
        type=token_count,
        metavar="N",
        help="keep the fewest validation documents that have so many targets in sequences of 256 "
        "tokens (default: all documents)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=5,
        help="seed of the order in which C4's files are read (default 5)",
    )
    parser.add_argument(
        "--shard_tokens",
        type=token_count,
        default=2**26,
        metavar="N",
        help=f"tokens in a file (default {2**26:,})",
    )
    args = parser.parse_args()
    for name in ("vocab_size", "processes", "max_tokens", "target_eval_tokens", "shard_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be above 0")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: it must be 0 or more")
    return args


def main() -> None:
    """Run the command."""
    args = parse_arguments()

    from peft_pretraining.data.dataset import open_documents
    from peft_pretraining.data.tokenized.cache import default_processes
    from peft_pretraining.data.tokenized.writer import prepare
    from peft_pretraining.utils.cache import cache_folder

    vocab_size = args.vocab_size
    if vocab_size is None:
        from peft_pretraining.model.config import load_config

        vocab_size = load_config(args.model_config).vocab_size
    source, split, tokenizer = open_documents(
        args.dataset, args.tokenizer, vocab_size, args.seed, args.validation_file, cache_folder()
    )
    start = time.perf_counter()
    new_tokens = prepare(
        source,
        split,
        tokenizer,
        Path(args.output),
        processes=args.processes or default_processes(source),
        shard_tokens=args.shard_tokens,
        max_tokens=args.max_tokens,
        target_eval_tokens=args.target_eval_tokens,
        seed=args.seed,
    )
    print(summary(Path(args.output), new_tokens, time.perf_counter() - start))


def summary(folder: Path, new_tokens: int, seconds: float) -> str:
    """Return one line: what the folder contains, and the speed of tokenizing.

    Args:
        folder: A complete folder.
        new_tokens: Tokens that were tokenized now.
        seconds: Time that it took.
    """
    from peft_pretraining.data.tokenized.reader import open_prepared

    shards = [shard for split in open_prepared(folder).index["splits"].values() for shard in split]
    documents, tokens = (sum(shard[key] for shard in shards) for key in ("documents", "tokens"))
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if new_tokens:
        speed = f"{new_tokens:,} of them tokenized now, {new_tokens / seconds:,.0f} tokens/s"
    else:
        speed = "all there already"
    return f"{folder}: {documents:,} documents, {tokens:,} tokens ({speed}), {megabytes:,.1f} MB"


if __name__ == "__main__":
    from peft_pretraining.cli.main import run_script

    sys.exit(run_script(main))
