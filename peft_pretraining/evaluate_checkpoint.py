"""Evaluate finished runs on other text than their validation data.

    python -m peft_pretraining.evaluate_checkpoint RUN... --documents other.jsonl.gz [--as c4]

The text is tokenized and cut into sequences as that of the run was (its --max_length, --packing and
tokenizer). All documents are used, or the first --target_eval_tokens. Each result is printed and
added to the run's evaluations.jsonl. A result that this file contains is not computed again.
"""

import argparse
import json
from pathlib import Path

from peft_pretraining.cli.common import Parser
from peft_pretraining.cli.llama import packing_mode, token_count
from peft_pretraining.cli.main import end, parse_or_exit, run_script


def parse_arguments() -> argparse.Namespace:
    """Parse the command line. Raises UserError for a mistake in it."""
    parser = Parser(
        prog="python -m peft_pretraining.evaluate_checkpoint",
        description="Evaluate finished runs on other text.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="Run folders; the newest checkpoint of each is evaluated.",
    )
    parser.add_argument(
        "--documents",
        required=True,
        metavar="FILE",
        help="A .jsonl, .txt or .parquet file, or a folder of such files.",
    )
    parser.add_argument(
        "--as", dest="name", help="Name of the text in the results (default: the name of FILE)."
    )
    parser.add_argument(
        "--target_eval_tokens",
        type=token_count,
        metavar="N",
        help="Maximum number of tokens (default: all).",
    )
    parser.add_argument(
        "--batch_size", type=int, default=32, help="Sequences in a batch (default 32)."
    )
    args = parser.parse_args()
    args.name = args.name or Path(args.documents).name
    return args


# The command line is parsed before the imports below, which take seconds because of torch.
if __name__ == "__main__":
    ARGUMENTS = parse_or_exit(parse_arguments)

import torch
from safetensors.torch import load_model

from peft_pretraining.checkpoint.find import newest_checkpoint
from peft_pretraining.checkpoint.format import CONFIG, WEIGHTS
from peft_pretraining.data.loader import validation_batches
from peft_pretraining.data.sequences import tokenize_documents
from peft_pretraining.data.sources.files import open_files
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.model.config import load_config
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.parallel.process_group import DistributedContext, process_group
from peft_pretraining.records.jsonl import RUN, append_json
from peft_pretraining.train.evaluation import evaluate

EVALUATIONS = "evaluations.jsonl"


def main(args: argparse.Namespace) -> None:
    """Evaluate each run, print the results and add them to the runs' records."""
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
                documents = Path(args.documents)
                result = evaluate_on(
                    documents, checkpoint, run, args.target_eval_tokens, args.batch_size, ranks
                )
                record = key | result
                append_json(run / EVALUATIONS, [record])
            print(
                f"{run} on {args.name}: loss {record['eval_loss']:.4f}, "
                f"perplexity {record['perplexity']:.2f}, {record['eval_tokens']:,} tokens"
            )


def read_evaluations(run: Path) -> list[dict]:
    """Return the results of this command that a run folder contains."""
    path = run / EVALUATIONS
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def evaluate_on(
    documents: Path,
    checkpoint: Path,
    run: Path,
    target_eval_tokens: int | None,
    batch_size: int,
    ranks: DistributedContext,
) -> dict[str, float]:
    """Evaluate a checkpoint on documents.

    Args:
        documents: a file or a folder of files; all documents in it are used.
        checkpoint: folder of the checkpoint.
        run: the run folder, which says how the model was trained.
        target_eval_tokens: maximum number of tokens; None: no limit.
        batch_size: sequences in a batch.
        ranks: this process and its device.

    Returns:
        Loss and perplexity; see `evaluate`.
    """
    arguments = json.loads((run / RUN).read_text(encoding="utf8"))["arguments"]
    config = load_config(checkpoint / CONFIG)
    tokenizer = load_tokenizer(str(checkpoint), config.vocab_size, (), checkpoint, "")
    sequences = tokenize_documents(
        open_files(documents, "--documents").train,
        tokenizer,
        arguments["max_length"],
        target_eval_tokens,
        packing_mode(arguments["packing"], arguments["packing_attention"]),
    )
    model = build_model(config)
    load_model(model, checkpoint / WEIGHTS)
    if arguments["packing_attention"] == "within":
        model.confine_attention(tokenizer.eos_id)
    dtype = arguments["dtype"]
    model = model.to(ranks.device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=dtype == "bf16_mixed")
    return evaluate(model, validation_batches(sequences, batch_size, 0, 1), ranks, autocast)


if __name__ == "__main__":
    end(run_script(main, ARGUMENTS))
