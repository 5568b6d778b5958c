r"""Measure how fast data are prepared and read, in tokens per second.

    python benchmarks/bench_data.py [--megabytes 20] [--rounds 3] \
        [--output benchmarks/results/data_cpu.json]

Preparing: real text (Wikipedia articles from shared/data or $ALPHADECAY_DATA, otherwise the
docstrings of pydocs) with 1 and 2 processes, from the .jsonl file to the finished folder, beside a
plain batched `datasets.map` with the same tokenizer and as many processes, whose reading of the
file is not counted. 1 process is this one with the tokenizer's own threads, for both. Reading:
batches of 512 random rows of 256 tokens, every block checked, from the page cache on one thread;
and the time to a batch at a random step. Alternatives take turns, so that a busy machine is slow
for both; figures are medians.
"""

# What needs torch is imported in the functions: each tokenising process imports this module, as it
# does the prepare command.
import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
DATA = Path(os.environ.get("ALPHADECAY_DATA") or ROOT.parent / "shared" / "data")
BATCH, LENGTH = 512, 256


def documents() -> tuple[str, Iterator[str]]:
    from peft_pretraining.data.sources.files import read_file
    from peft_pretraining.data.sources.pydocs import open_pydocs
    from peft_pretraining.utils.cache import cache_folder

    wiki = DATA / "wiki" / "enwiki_2015_30k_articles.jsonl.xz"
    return (
        ("wikipedia", read_file(wiki))
        if wiki.exists()
        else ("pydocs", iter(open_pydocs(cache_folder()).train))
    )


def write_corpus(path: Path, size: int) -> str:
    """About `size` bytes of text as a .jsonl file; returns what it is."""
    name, texts = documents()
    with path.open("w") as file:
        for text in texts:
            file.write(json.dumps({"text": text}) + "\n")
            size -= len(text.encode())
            if size <= 0:
                break
    return name


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_preparing(corpus: Path, tokenizer, scratch: Path, rounds: int) -> dict:
    """Tokens a second of `prepare` and of `datasets.map`, each with 1 and 2 processes."""
    import datasets

    from peft_pretraining.data.sources.files import open_files
    from peft_pretraining.data.sources.split import split_documents
    from peft_pretraining.data.tokenized.reader import open_prepared
    from peft_pretraining.data.tokenized.writer import prepare

    datasets.disable_progress_bars()
    source, count = open_files(corpus), itertools.count()
    table = datasets.load_dataset(
        "json", data_files=str(corpus), split="train", cache_dir=str(scratch / "hub")
    )

    def ours(processes: int) -> None:
        prepare(
            source,
            split_documents(source),
            tokenizer,
            scratch / f"ours-{next(count)}",
            processes=processes,
        )

    def plain(processes: int) -> None:
        def encode(batch: dict) -> dict:
            return {
                "input_ids": tokenizer.hf(
                    batch["text"], return_attention_mask=False, verbose=False
                )["input_ids"]
            }

        options = {"num_proc": processes if processes > 1 else None, "load_from_cache_file": False}
        table.map(
            encode,
            batched=True,
            remove_columns=table.column_names,
            cache_file_name=str(scratch / f"map-{next(count)}.arrow"),
            **options,
        )

    calls = {
        f"{name} {n}": (call, n) for n in (1, 2) for name, call in (("ours", ours), ("map", plain))
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (call, processes) in calls.items():
            times[name].append(seconds_of(lambda call=call, processes=processes: call(processes)))
    splits = open_prepared(next(scratch.glob("ours-*"))).index["splits"]
    tokens = sum(shard["tokens"] for shards in splits.values() for shard in shards)
    speed = {name: tokens / statistics.median(values) for name, values in times.items()}
    ratios = {f"times_faster_{n}": speed[f"ours {n}"] / speed[f"map {n}"] for n in (1, 2)}
    return {"tokens": tokens, "tokens_per_second": speed, **ratios}


def bench_reading(folder: Path, rounds: int) -> dict:
    """Return tokens per second of random batches, and the milliseconds to a random position."""
    import numpy as np

    from peft_pretraining.data.shuffle import ShuffledIndices
    from peft_pretraining.data.tokenized.reader import open_prepared

    rng, results = np.random.default_rng(0), {}
    for kind, packing in (("padded", False), ("packed", True)):
        start = time.perf_counter()
        rows = open_prepared(folder).sequences("train", LENGTH, packing)
        opened = time.perf_counter() - start
        indices = rng.integers(0, len(rows), (50, BATCH))
        speeds = []
        for _ in range(rounds + 1):  # the first brings the files into the page cache
            start = time.perf_counter()
            for batch in indices:
                rows.batch(batch)
            speeds.append(int(rows.lengths[indices].sum()) / (time.perf_counter() - start))
        order, seeks = ShuffledIndices(5, len(rows)), []
        for step in rng.integers(0, 2**30, 50).tolist():
            start = time.perf_counter()
            rows.batch(order.indices(step * BATCH, (step + 1) * BATCH))
            seeks.append(1000 * (time.perf_counter() - start))
        speed = statistics.median(speeds[1:])
        results[kind] = {
            "tokens_per_second": speed,
            "open_ms": 1000 * opened,
            "seek_ms": statistics.median(seeks),
            "seek_ms_worst": max(seeks),
        }
    huge = ShuffledIndices(5, 2**40 - 1)
    starts = rng.integers(0, 2**50, 50).tolist()
    order_ms = [
        1000 * seconds_of(lambda start=start: huge.indices(start, start + BATCH))
        for start in starts
    ]
    return {**results, "order_ms_of_2**40_rows": statistics.median(order_ms)}


def load_tokenizer_and_corpus(scratch: Path, megabytes: float):
    from peft_pretraining.data.sources.files import open_files
    from peft_pretraining.data.tokenizer import load_tokenizer

    corpus = scratch / "corpus.jsonl"
    name = write_corpus(corpus, int(megabytes * 1e6))
    t5 = DATA / "tokenizers" / "t5"
    tokenizer = load_tokenizer(
        str(t5) if t5.is_dir() else "bpe", 32100, open_files(corpus).train, scratch, "benchmark"
    )
    return name, corpus, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=20, help="of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/data_cpu.json")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        name, corpus, tokenizer = load_tokenizer_and_corpus(scratch, args.megabytes)
        preparing = bench_preparing(corpus, tokenizer, scratch, args.rounds)
        reading = bench_reading(next(scratch.glob("ours-*")), args.rounds)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    results = {
        "machine": machine,
        "text": name,
        "megabytes": args.megabytes,
        "preparing": preparing,
        "reading": reading,
    }
    for n in (1, 2):
        ours, plain = (preparing["tokens_per_second"][f"{who} {n}"] for who in ("ours", "map"))
        print(
            f"preparing, {n} process(es): datasets.map {plain:,.0f} tokens/s, ours "
            f"{ours:,.0f}: {ours / plain:.2f} times as fast"
        )
    for kind in ("padded", "packed"):
        form = (
            "{tokens_per_second:,.0f} tokens/s; opened in {open_ms:.1f} ms, a random step in "
            "{seek_ms:.1f} ms (worst {seek_ms_worst:.1f})"
        )
        print(f"reading {kind} rows: {form.format(**reading[kind])}")
    print(f"the order of 512 rows among 2**40: {reading['order_ms_of_2**40_rows']:.2f} ms")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
