r"""Measure for how many seconds a checkpoint keeps the training loop waiting.

    python benchmarks/bench_checkpoint.py [--models 9m 60m] [--rounds 5] [--rows 2] \
        [--output FILE.json]

A LLaMA in float32 with Adam trains on random tokens. Each round saves the same state in three ways,
in turn: `torch.save` of weights and optimizer state; our writer with nothing going on beside it
(files, SHA-256, fsync); our writer in the background of real steps. Blocked is what `save` and
`before_update` take; the slowdown is what all steps until the files are whole take beyond
undisturbed ones. The first background save, which allocates the copy's memory, stands alone.
Medians of the rounds.
"""

import argparse
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
from loguru import logger

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from peft_pretraining.checkpoint.save import Checkpoints  # noqa: E402
from peft_pretraining.checkpoint.state import optimizer_state_by_name  # noqa: E402
from peft_pretraining.model.modeling_llama import build_model, load_config  # noqa: E402
from peft_pretraining.optim.optimizer import build_optimizer  # noqa: E402
from peft_pretraining.parallel.process_group import DistributedContext  # noqa: E402

LENGTH = 256


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Training:
    """A model that trains, and the ways to save it."""

    def __init__(self, size: str, rows: int, folder: Path, device: torch.device):
        torch.manual_seed(0)
        self.config = load_config(ROOT / f"configs/llama_{size}.json")
        self.model = build_model(self.config).to(device)
        self.optimizer = build_optimizer(
            "adam", [{"params": list(self.model.parameters()), "weight_decay": 1e-5}], 1e-4
        )
        self.ids = torch.randint(self.config.vocab_size, (rows, LENGTH), device=device)
        self.folder, self.device = folder, device
        self.checkpoints = Checkpoints(folder, DistributedContext(0, 0, 1, device), keep=1)
        self.saved = 0

    def step(self) -> float:
        """Train a step; returns for how long it waited for a save."""
        self.model(self.ids, self.ids).backward()
        waited = seconds_of(self.checkpoints.before_update)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return waited

    def plain(self) -> None:
        torch.save(
            (self.model.state_dict(), optimizer_state_by_name(self.model, self.optimizer)),
            self.folder / "plain.pt",
        )

    def begin(self) -> None:
        self.saved += 1
        self.checkpoints.save(self.saved, self.model, self.optimizer, {}, None)

    def alone(self) -> None:
        self.begin()
        self.checkpoints.finish()

    def background(self, undisturbed: float) -> dict[str, float]:
        """Save once while steps go on until it is whole."""
        folder = self.folder / f"checkpoints/model_{self.saved + 1}"
        start = time.perf_counter()
        blocked = seconds_of(self.begin) + self.step()
        steps = 1
        while not folder.exists():
            self.step()
            steps += 1
        lost = time.perf_counter() - start - steps * undisturbed
        self.checkpoints.finish()
        return {"blocked": blocked, "slowdown": lost, "steps": steps}


def bench(training: Training, rounds: int) -> dict[str, float]:
    training.step()
    first = training.background(seconds_of(training.step))
    times: dict[str, list[float]] = {
        name: [] for name in ("torch_save", "alone", "blocked", "slowdown", "steps", "step")
    }
    for _ in range(rounds):
        step = statistics.median(seconds_of(training.step) for _ in range(5))
        one = training.background(step) | {"step": step}
        one |= {"torch_save": seconds_of(training.plain), "alone": seconds_of(training.alone)}
        for name, values in times.items():
            values.append(one[name])
    medians = {name: statistics.median(values) for name, values in times.items()}
    states = optimizer_state_by_name(training.model, training.optimizer).values()
    tensors = [
        *training.model.state_dict().values(),
        *(tensor for state in states for tensor in state.values()),
    ]
    size = sum(tensor.nbytes for tensor in tensors) / 2**20
    return {
        "MiB": size,
        **medians,
        "first_blocked": first["blocked"],
        "times_less": medians["torch_save"] / medians["blocked"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["9m", "60m"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rows", type=int, default=2, help=f"of {LENGTH} tokens in a step (default 2)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="on the disk to save to (default: the system's folder for temporary files)",
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/checkpoint_cpu.json"
    )
    args = parser.parse_args()
    logger.remove()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    )
    results: dict = {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": args.rows,
    }
    print(
        "model   MiB  torch.save  ours alone  blocked (first)    times less  a step  slowdown "
        "over steps"
    )
    for size in args.models:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            results[size] = one = bench(Training(size, args.rows, folder, device), args.rounds)
        finally:
            shutil.rmtree(folder)
        form = (
            "{MiB:5.0f} {torch_save:9.3f} s {alone:9.3f} s {blocked:7.4f} s ({first_blocked:.4f} "
            "s) {times_less:8.1f} {step:7.3f} s"
        )
        print(
            f"{size:>5} {form.format(**one)} {one['slowdown']:7.3f} s over {one['steps']:.0f}",
            flush=True,
        )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
