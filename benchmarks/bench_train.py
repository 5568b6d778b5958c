r"""Measure the training step and compare it with transformers' LLaMA: speed, memory, losses.

    python benchmarks/bench_train.py [--models 9m 60m] [--rounds 7] [--data FOLDER] \
        [--output FILE.json]

Prints: the whole step (forward, backward, Adam) of this project, plain and compiled, beside
transformers' `LlamaForCausalLM` with sdpa, its own loss and `torch.optim.Adam`, on random tokens,
and its share of what the device's matrix product makes; peak memory of each; how far the losses of
50 updates are from the plain path's, with pads and gradient accumulation; what module groups cost
the optimizer; and, with real text, real tokens a second of packed beside padded rows. Alternatives
take turns, so that a busy machine is slow for all; ratios are medians of those within a round.

FOLDER: `wiki/*.jsonl.xz`, `c4/*.jsonl.gz` and `tokenizers/t5` (default: the environment variable
ALPHADECAY_DATA; without it no text).
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import alphadecay  # noqa: E402
from benchmarks.bench_methods import peak_of_allocations  # noqa: E402
from peft_pretraining.constants import IGNORE_INDEX  # noqa: E402
from peft_pretraining.data.dataset import load_data  # noqa: E402
from peft_pretraining.model.linear_cross_entropy import LOSSES  # noqa: E402
from peft_pretraining.model.modeling_llama import build_model, load_config, target_positions  # noqa: E402
from peft_pretraining.optim.optimizer import build_optimizer  # noqa: E402
from peft_pretraining.train.flops import llama_flops, peak_flops  # noqa: E402

LENGTH = 256


def config_of(size: str) -> transformers.LlamaConfig:
    return load_config(ROOT / f"configs/llama_{size}.json")


class Lane:
    """A model with its optimizer, and one way to make an update of them.

    kind: `transformers`, or ours: `plain`, or `ours` with `compiled` and the name of a loss in it.
    """

    def __init__(self, kind: str, config: transformers.LlamaConfig, options: argparse.Namespace):
        torch.manual_seed(0)
        self.kind, self.device = kind, options.device
        self.autocast = torch.autocast(
            self.device, torch.bfloat16, enabled=options.dtype == "bf16_mixed"
        )
        if kind.startswith("transformers"):
            config = transformers.LlamaConfig(**config.to_dict() | {"attn_implementation": "sdpa"})
            self.model = transformers.LlamaForCausalLM(config).to(self.device)
            if "compiled" in kind:
                self.model = torch.compile(self.model)
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
            return
        self.model = build_model(config).to(self.device)
        self.model.set_loss(next((name for name in LOSSES if name in kind), "chunked"))
        if "compiled" in kind:
            self.model.compile_blocks()
        if kind == "plain":
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, foreach=False)
        else:
            self.optimizer = build_optimizer(
                "adam", [{"params": list(self.model.parameters())}], 1e-3
            )

    def update(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """One update from micro-batches of ids and labels. Returns the mean loss."""
        targets = sum(int((labels[:, 1:] != IGNORE_INDEX).sum()) for _, labels in batches)
        total = 0.0
        for ids, labels in batches:
            with self.autocast:
                if self.kind.startswith("transformers"):
                    loss = self.model(ids, labels=labels, use_cache=False).loss
                else:
                    loss = self.model(ids, labels, target_positions(labels)) / targets
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def seconds_of(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(
    calls: dict[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each call in each round, after two that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 2):
        for name, call in calls.items():
            seconds = seconds_of(call, device)
            if index > 1:
                times[name].append(seconds)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def random_batch(
    config: transformers.LlamaConfig, options: argparse.Namespace
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    ids = torch.randint(
        2, config.vocab_size, (options.rows, LENGTH), generator=torch.Generator().manual_seed(0)
    ).to(options.device)
    return [(ids, ids)]


# ------------------------------------------------------------------------------------- the sections


def bench_step(size: str, options: argparse.Namespace) -> dict:
    config = config_of(size)
    batch = random_batch(config, options)
    kinds = ["transformers", "ours", *(["ours compiled"] if compiles() else [])]
    kinds += ["transformers compiled"] if options.device == "cuda" else []
    lanes = {kind: Lane(kind, config, options) for kind in kinds}
    times = in_turns(
        {kind: lambda lane=lane: lane.update(batch) for kind, lane in lanes.items()},
        options.rounds,
        options.device,
    )
    tokens = options.rows * LENGTH
    peak, source = peak_flops(
        torch.device(options.device),
        torch.float32 if options.dtype == "float32" else torch.bfloat16,
    )
    results: dict = {"peak_flops": peak, "peak_source": source}
    for kind, seconds in times.items():
        speed = tokens / statistics.median(seconds)
        results[kind] = {
            "tokens_per_second": speed,
            "times_transformers": ratio(times, "transformers", kind),
            "mfu": speed * llama_flops(config, LENGTH) / peak,
        }
        form = (
            "{tokens_per_second:,.0f} tokens/s, {times_transformers:.2f} times transformers', MFU "
            "{mfu:.1%}"
        )
        print(f"{size:>5} {kind:<16} {form.format(**results[kind])} ({source})", flush=True)
    return results


def compiles() -> bool:
    """Whether torch.compile can be expected to work here."""
    return torch.cuda.is_available() or shutil.which("g++") is not None


def bench_memory(size: str, options: argparse.Namespace) -> dict:
    """MiB that an update holds at its peak beyond weights and moments; gradients are among them."""
    config, results = config_of(size), {}
    batch = random_batch(config, options)
    for kind in ("transformers", "ours"):
        lane = Lane(kind, config, options)
        lane.update(batch)
        if kind == "ours":
            lane.model.set_loss("chunked")  # the memory that it keeps counts
        results[kind] = peak_memory(lambda lane=lane: lane.update(batch), options.device) / 2**20
    print(
        f"{size:>5} peak memory of an update: "
        + ", ".join(f"{kind} {v:,.0f} MiB" for kind, v in results.items()),
        flush=True,
    )
    return results


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Greatest sum of bytes that torch held beyond those at the start."""
    if device == "cpu":
        return peak_of_allocations(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def bench_losses(options: argparse.Namespace, updates: int = 50) -> dict:
    """Return the greatest relative difference of each fast path's losses from the plain ones."""
    config = config_of("9m")
    generator = torch.Generator().manual_seed(0)
    kinds = [
        "plain",
        "ours",
        *(["ours torch"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else []),
    ]
    kinds += ["ours compiled"] if compiles() else []
    lanes = {
        kind: Lane(kind, config, argparse.Namespace(**vars(options) | {"dtype": "float32"}))
        for kind in kinds
    }
    losses: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(updates):
        batches = []
        for _ in range(2):
            ids = torch.randint(2, 500, (4, 64), generator=generator)
            labels = ids.clone()
            for row, length in enumerate(torch.randint(2, 65, (4,), generator=generator).tolist()):
                labels[row, length:] = IGNORE_INDEX
            batches.append((ids.to(options.device), labels.to(options.device)))
        for kind, lane in lanes.items():
            losses[kind].append(float(lane.update(batches)))
    worst = {
        kind: max(abs(a / b - 1) for a, b in zip(losses[kind], losses["plain"], strict=True))
        for kind in kinds[1:]
    }
    print(
        f"losses of {updates} updates beside the plain path: "
        + ", ".join(f"{kind} within {w:.1e}" for kind, w in worst.items()),
        flush=True,
    )
    return worst


def bench_groups(size: str, options: argparse.Namespace, rows: int) -> dict:
    """Measure what one parameter group for each module costs in a step without an analysis.

    Forward and backward passes are the same; what differs, `decay.step` and the optimizer, is timed
    by itself: it is a fiftieth of the step, whose own noise would hide it.
    """
    config = config_of(size)
    torch.manual_seed(0)
    model = build_model(config).to(options.device)
    ids = random_batch(config, argparse.Namespace(**vars(options) | {"rows": rows}))[0][0]
    decay = alphadecay.AlphaDecay(model, 1e-5, every=10**9)
    groups = {
        "uniform": [{"params": list(model.parameters()), "weight_decay": 1e-5}],
        "alphadecay": decay.param_groups(),
    }
    optimizers = {name: build_optimizer("adam", g, 1e-4) for name, g in groups.items()}

    def passes() -> None:
        model.zero_grad()
        (model(ids, ids, target_positions(ids)) / ids.numel()).backward()

    def step(name: str) -> None:
        if name == "alphadecay":
            decay.step(optimizers[name])
        optimizers[name].step()

    passes()
    times = in_turns(
        {name: lambda name=name: step(name) for name in groups}, 4 * options.rounds, options.device
    )
    passes_seconds = statistics.median(
        in_turns({"passes": passes}, options.rounds, options.device)["passes"]
    )
    added = statistics.median(
        a - b for a, b in zip(times["alphadecay"], times["uniform"], strict=True)
    )
    whole = passes_seconds + statistics.median(times["uniform"])
    result = {
        "groups": len(groups["alphadecay"]),
        "rows": rows,
        "seconds_uniform": whole,
        "added_seconds": added,
        "added_share": added / whole,
    }
    print(
        f"{size:>5} {result['groups']} groups beside one add {added * 1e3:.2f} ms to a step of "
        f"{whole:.2f} s: {added / whole:.3%}",
        flush=True,
    )
    return result


def bench_packing(size: str, options: argparse.Namespace) -> dict:
    """Measure tokens per second, without pads, of padded and of packed sequences."""
    results: dict = {}
    for corpus, file in (
        ("wikipedia", next(options.data.glob("wiki/*.jsonl.xz"))),
        ("c4", next(options.data.glob("c4/*.jsonl.gz"))),
    ):
        with tempfile.TemporaryDirectory() as cache:
            part = first_documents(file, Path(cache) / f"{corpus}.jsonl", 2000)
            lanes = {
                name: TextLane(size, part, Path(cache), packing, options)
                for name, packing in (
                    ("padded", False),
                    ("packed", True),
                    ("packed within", "within"),
                )
            }
            times = in_turns(
                {name: lane.update for name, lane in lanes.items()}, options.rounds, options.device
            )
        results[corpus] = {}
        for name, lane in lanes.items():
            useful = lane.real / options.rows / LENGTH / lane.updates
            results[corpus][name] = {
                "real_share": useful,
                "real_tokens_per_second": useful
                * options.rows
                * LENGTH
                / statistics.median(times[name]),
            }
            print(
                f"{size:>5} {corpus:<9} {name:<13} {useful:.1%} real, "
                f"{results[corpus][name]['real_tokens_per_second']:,.0f} real tokens/s",
                flush=True,
            )
    return results


def first_documents(source: Path, target: Path, count: int) -> Path:
    """So many documents of a packed file, in a plain one."""
    import gzip
    import itertools
    import lzma

    with (
        (lzma if source.suffix == ".xz" else gzip).open(source, "rt", encoding="utf8") as lines,
        target.open("w", encoding="utf8") as out,
    ):
        out.writelines(itertools.islice(lines, count))
    return target


class TextLane:
    """Updates on rows of real text."""

    def __init__(self, size: str, file: Path, cache: Path, packing, options: argparse.Namespace):
        config = config_of(size)
        data = load_data(
            str(file),
            str(options.data / "tokenizers/t5"),
            config.vocab_size,
            LENGTH,
            0,
            1000,
            cache_dir=str(cache),
            packing=packing,
        )
        self.lane, self.rows, self.device = (
            Lane("ours", config, options),
            data.train,
            options.device,
        )
        self.each, self.updates, self.real = options.rows, 0, 0
        if packing == "within":
            self.lane.model.confine_attention(data.tokenizer.eos_id)

    def update(self) -> None:
        start = self.updates * self.each
        batch = self.rows.batch([i % len(self.rows) for i in range(start, start + self.each)])
        self.updates += 1
        self.real += (
            int((batch["labels"] != IGNORE_INDEX).sum())
            if not self.rows.packing
            else batch["labels"].numel()
        )
        self.lane.update([tuple(batch[key].to(self.device) for key in ("input_ids", "labels"))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["9m", "60m"])
    parser.add_argument(
        "--rows", type=int, default=8, help=f"of {LENGTH} tokens in a step (default 8)"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bf16_mixed"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, default=os.environ.get("ALPHADECAY_DATA"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cpu = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    results: dict = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else cpu,
        "torch": torch.__version__,
    }
    results |= {
        "transformers": transformers.__version__,
        "rows": options.rows,
        "length": LENGTH,
        "dtype": options.dtype,
    }
    with contextlib.ExitStack() as held:
        held.callback(
            lambda: (
                options.output and options.output.write_text(json.dumps(results, indent=1) + "\n")
            )
        )  # what there is of them
        for size in options.models:
            results[size] = {
                "step": bench_step(size, options),
                "memory": bench_memory(size, options),
            }
        results["losses"] = bench_losses(options)
        results["groups"] = {
            size: bench_groups(size, options, rows)
            for size, rows in (("60m", options.rows), ("350m", 2))
        }
        if options.data:
            results["text"] = bench_packing(options.models[0], options)
        else:
            print("no real text: give --data or ALPHADECAY_DATA")


if __name__ == "__main__":
    main()
