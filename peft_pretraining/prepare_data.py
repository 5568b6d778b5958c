"""Tokenises a source once, into a folder that `--dataset FOLDER` then trains on.

    python -m peft_pretraining.prepare_data --dataset c4 --tokenizer t5-base --model_config configs/llama_130m.json \
        --max_tokens 3B --target_eval_tokens 10M --output c4-3B

Killed or interrupted, the same command goes on where it stopped; called once more, it makes anew whatever was damaged since.
"""

# What needs torch is imported in the functions: each tokenising process imports this module, and would take seconds and memory for it.
import argparse
import sys
import time
from pathlib import Path

from peft_pretraining.errors import UserError


def parse_arguments() -> argparse.Namespace:
    from peft_pretraining.cli.common import Parser
    from peft_pretraining.cli.llama import token_count
    from peft_pretraining.data.tokenized.format import SHARD_TOKENS

    parser = Parser(
        prog="prepare_data",
        description="Tokenise a source once, for training with --dataset FOLDER.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--dataset",
        required=True,
        metavar="SOURCE",
        help="c4, pydocs, a .jsonl/.txt/.parquet file or a folder of them",
    )
    add("--tokenizer", help="a hub name, a folder, or bpe: trained on the corpus (default t5-base)")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--vocab_size",
        type=int,
        metavar="N",
        help="embeddings of the models that will be trained, at least",
    )
    size.add_argument(
        "--model_config",
        metavar="FILE",
        help="the config of such a model, e.g. configs/llama_60m.json",
    )
    add(
        "--output",
        required=True,
        metavar="FOLDER",
        help="what is made; --dataset FOLDER of the training",
    )
    add(
        "--processes",
        type=int,
        metavar="N",
        help="that tokenise (default: one for each core, or 1 for a small source)",
    )
    add(
        "--max_tokens",
        type=token_count,
        metavar="N",
        help="of the training set, at most, e.g. 100M (default: all)",
    )
    add(
        "--validation_file",
        metavar="FILE",
        help="default: the source's own validation split, or 1 %% held out by hash",
    )
    add(
        "--target_eval_tokens", type=token_count, metavar="N",
        help="keep the fewest validation documents that hold so many targets in rows of 256 (default: all documents)",
    )  # fmt: skip
    add("--seed", type=int, default=5, help="of the order in which C4's files are read (default 5)")
    add(
        "--shard_tokens",
        type=token_count,
        default=SHARD_TOKENS,
        metavar="N",
        help=f"tokens in a file (default {SHARD_TOKENS:,})",
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
    from peft_pretraining.data.dataset import open_documents
    from peft_pretraining.data.tokenized.cache import tokenizing_processes
    from peft_pretraining.data.tokenized.writer import prepare
    from peft_pretraining.model.modeling_llama import load_config
    from peft_pretraining.utils.cache import cache_folder

    args = parse_arguments()
    vocab_size = args.vocab_size or load_config(args.model_config).vocab_size
    source, split, tokenizer = open_documents(
        args.dataset, args.tokenizer, vocab_size, args.seed, args.validation_file, cache_folder()
    )  # fmt: skip
    start = time.perf_counter()
    made = prepare(
        source, split, tokenizer, Path(args.output), processes=args.processes or tokenizing_processes(source),
        shard_tokens=args.shard_tokens, max_tokens=args.max_tokens, target_eval_tokens=args.target_eval_tokens, seed=args.seed,
    )  # fmt: skip
    print(summary(Path(args.output), made, time.perf_counter() - start))


def summary(folder: Path, made: int, seconds: float) -> str:
    """One line: what the folder holds, and how fast the tokens were made that were not there yet."""
    from peft_pretraining.data.tokenized.reader import open_prepared

    shards = [shard for split in open_prepared(folder).index["splits"].values() for shard in split]
    documents, tokens = (sum(shard[key] for shard in shards) for key in ("documents", "tokens"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    speed = (
        f"{made:,} of them tokenised now, {made / seconds:,.0f} tokens/s"
        if made
        else "all there already"
    )
    return f"{folder}: {documents:,} documents, {tokens:,} tokens ({speed}), {size:,.1f} MB"


if __name__ == "__main__":
    from peft_pretraining.cli.main import run_script

    sys.exit(run_script(main))
