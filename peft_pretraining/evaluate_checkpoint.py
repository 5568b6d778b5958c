"""The loss of finished runs on other text than they were validated on.

    python -m peft_pretraining.evaluate_checkpoint runs/a runs/b --documents other.jsonl.gz [--as c4]

Rows are made as the run's own were (its --max_length, --packing and tokenizer), of all documents or of the first --target_eval_tokens. Each
result is printed and added to the run's evaluations.jsonl; what that holds already is not computed again.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_model

from peft_pretraining.checkpoint.find import newest_checkpoint
from peft_pretraining.checkpoint.format import CONFIG, WEIGHTS
from peft_pretraining.cli.common import Parser
from peft_pretraining.cli.llama import packing_of, token_count
from peft_pretraining.cli.main import run_script
from peft_pretraining.data.loader import validation_batches
from peft_pretraining.data.sequences import tokenize_documents
from peft_pretraining.data.sources.files import open_files
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.model.modeling_llama import build_model, load_config
from peft_pretraining.parallel.process_group import DistributedContext, process_group
from peft_pretraining.records.jsonl import RUN, append_json
from peft_pretraining.train.evaluation import evaluate

EVALUATIONS = "evaluations.jsonl"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="evaluate_checkpoint",
        description="The loss of finished runs on other text.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders: the newest checkpoint of each"
    )
    parser.add_argument(
        "--documents",
        required=True,
        metavar="FILE",
        help="a .jsonl/.txt/.parquet file or a folder of them",
    )
    parser.add_argument(
        "--as", dest="name", help="what the results are called (default: the name of FILE)"
    )
    parser.add_argument(
        "--target_eval_tokens", type=token_count, metavar="N", help="tokens, at most (default: all)"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="rows at once (default 32)")
    args = parser.parse_args()
    args.name = args.name or Path(args.documents).name
    return args


def main() -> None:
    args = parse_arguments()
    with process_group() as ranks:
        for run in map(Path, args.runs):
            checkpoint = newest_checkpoint(run)
            if checkpoint is None:
                raise UserError(
                    f"{run} has no checkpoint: give the folder of a run, such as runs/<name>"
                )
            key = {
                "documents": args.name,
                "checkpoint": checkpoint.name,
                "target_eval_tokens": args.target_eval_tokens,
            }
            known = (record for record in read_evaluations(run) if key.items() <= record.items())
            record = next(known, None)
            if record is None:
                record = key | evaluate_on(checkpoint, run, args, ranks)
                append_json(run / EVALUATIONS, [record])
            result = f"loss {record['eval_loss']:.4f}, perplexity {record['perplexity']:.2f}, {record['eval_tokens']:,} tokens"
            print(f"{run} on {args.name}: {result}")


def read_evaluations(run: Path) -> list[dict]:
    """What this command has found out about a run."""
    path = run / EVALUATIONS
    return (
        [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
        if path.exists()
        else []
    )


def evaluate_on(
    checkpoint: Path, run: Path, args: argparse.Namespace, ranks: DistributedContext
) -> dict:
    """See `evaluate`: a checkpoint's loss on all documents that --documents names."""
    trained = argparse.Namespace(**json.loads((run / RUN).read_text(encoding="utf8"))["arguments"])
    config = load_config(checkpoint / CONFIG)
    tokenizer = load_tokenizer(str(checkpoint), config.vocab_size, (), checkpoint, "")
    documents = open_files(Path(args.documents), "--documents").train
    rows = tokenize_documents(
        documents, tokenizer, trained.max_length, args.target_eval_tokens, packing_of(trained)
    )
    model = build_model(config)
    load_model(model, checkpoint / WEIGHTS)
    if trained.packing_attention == "within":
        model.confine_attention(tokenizer.eos_id)
    model = model.to(ranks.device, torch.bfloat16 if trained.dtype == "bfloat16" else torch.float32)
    autocast = torch.autocast(
        ranks.device.type, torch.bfloat16, enabled=trained.dtype == "bf16_mixed"
    )
    return evaluate(model, validation_batches(rows, args.batch_size, 0, 1), ranks, autocast)


if __name__ == "__main__":
    sys.exit(run_script(main))
