"""What a training run computes in a second, beside what its devices could, and where its time goes."""

import contextlib
import itertools
import re
import resource
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from loguru import logger
from transformers import PretrainedConfig

from peft_pretraining.parallel.process_group import Ranks


StepType = TypeVar("StepType")

# Floating-point operations a second of dense bfloat16 matrix products, from NVIDIA's data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
BACKWARD = 2  # forward passes that a backward pass costs: a gradient for each of the two factors of every product

# --------------------------------------------------------------------------------------------------- what there is to compute


def llama_flops(config: PretrainedConfig, length: int) -> int:
    """Floating-point operations of training LLaMA on one token of a row of `length` tokens: 6 N + 12 L d S.

    N: entries of the matrices that a token is multiplied with, so all but the embeddings, the head among them (a tied one too); L blocks,
    d = heads x size of a head, S = length. A multiplication with its addition counts as 2, a backward pass as two forward passes; what
    activation checkpointing computes again does not count, and attention counts as if it were not causal: the formula of PaLM
    (Chowdhery et al. 2022, appendix B) and nanoGPT, which keep the head too.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head  # q and o, k and v
    block = attention + 3 * hidden * config.intermediate_size
    matrices = config.num_hidden_layers * block + hidden * config.vocab_size
    return 6 * matrices + 12 * config.num_hidden_layers * heads * head * length


# ------------------------------------------------------------------------------------------------ what a device can compute


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Floating-point operations a second of one device, and where the number is from.

    That of the data sheet, for bfloat16 on a GPU of `PEAK_FLOPS`; else that of a matrix product, measured with this process's threads.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if dtype == torch.bfloat16 and "MIG" not in name:  # a part of a GPU has no data sheet
        for gpu, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{gpu}\b", name):
                return flops, f"{gpu} bf16 dense, data sheet"
    return measured_flops(device, dtype), "measured matrix product"


def measured_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, most_seconds: float = 0.5) -> float:
    """Floating-point operations a second of a product of two square matrices, the median of 3 to 9 of them.

    size: of the matrices (default: 1024 on a CPU, 4096 elsewhere, 0.02 s where a device makes 0.1 or 5 TFLOP/s). After `most_seconds` no
    product is begun but the third. Draws from no global random state.
    """
    size = size or (1024 if device.type == "cpu" else 4096)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = []
    for _ in range(10):  # the first to warm up
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 3 and sum(seconds) > most_seconds:
            break
    return 2 * size**3 / statistics.median(seconds[1:])


@dataclass(frozen=True)
class Work:
    """What all ranks together do in an update, and could do in a second.

    Args:
        unit: what the run counts: `tokens` (no pads) or `images`.
        examples: rows, or images, in an update.
        length: units in an example, pads counted.
        flops: of training on one example, pads counted.
        peak: operations a second of all devices; peak_source: where the number is from.
        processes: how many devices they are.
    """

    unit: str
    examples: int
    length: int
    flops: int
    peak: float
    peak_source: str
    processes: int

    @classmethod
    def of(cls, unit: str, examples: int, length: int, flops: int, dtype: torch.dtype, ranks: Ranks) -> "Work":
        """On the devices of all ranks, which call it together; dtype: of the matrix products."""
        ranks.barrier()  # processes that share cores measure at the same time
        peak, source = peak_flops(ranks.device, dtype)
        total = float(ranks.sum(torch.tensor(peak, dtype=torch.float64)))
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)  # the matrices of a measurement are not the run's
        work = cls(unit, examples, length, flops, total, source, ranks.world_size)
        logger.info(f"{flops / length / 1e9:.3g} GFLOPs per {unit[:-1]}; peak {total / 1e12:.3g} TFLOP/s ({source})")
        return work

    def record(self) -> dict[str, float | str]:
        """What run.json keeps of it: the peak is that of one process, the mean of all."""
        return {
            f"flops_per_{self.unit[:-1]}": self.flops // self.length,
            "peak_flops": self.peak / self.processes,
            "peak_source": self.peak_source,
        }


# ------------------------------------------------------------------------------------------------------ where the time goes


@dataclass(frozen=True)
class Reading:
    """A clock's hands: seconds of training, updates and units that the run has made, and seconds of waiting and analysing among those."""

    seconds: float
    update: int
    seen: int
    waiting: float
    analysing: float


class Clock:
    """Times the training, without evaluations and checkpoints. It never waits for the device.

    Args:
        work: what an update is.
        update, seen: updates and units that the run has made before.
        device: whose memory counts.
    """

    def __init__(self, work: Work, update: int, seen: int, device: torch.device):
        self.work, self._device = work, device
        self._started = time.perf_counter()  # later for each pause
        self._waiting = self._analysing = 0.0
        self._analyses = 0
        self._first = self._last = Reading(0.0, update, seen, 0.0, 0.0)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no training."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def timed(self, steps: Iterable[StepType]) -> Iterator[StepType]:
        """The same steps: until one is there, the training waits for data."""
        start = time.perf_counter()
        for step in steps:
            self._waiting += time.perf_counter() - start
            yield step
            start = time.perf_counter()

    def analysis_took(self, seconds: float, rebalanced: bool) -> None:
        """The decays' part of an update; rebalanced: whether it was an analysis."""
        self._analysing += seconds
        self._analyses += rebalanced

    def rates(self, update: int, seen: int) -> dict[str, float]:
        """What a logged line says of the time since the one before it.

        throughput_<unit>, _examples, _batches (updates) and, of text, _padded_tokens: a second; mfu: operations of all examples, pads
        counted, over what the devices can do; useful_mfu, of text: those of real tokens; data_wait_seconds, analysis_seconds. And of this
        process since its start: seconds of training, and peak_memory_bytes.
        """
        now = Reading(time.perf_counter() - self._started, update, seen, self._waiting, self._analysing)
        before, self._last = self._last, now
        speeds, utilisation = self._speeds(before, now)
        return {
            **{f"throughput_{name}": speed for name, speed in speeds.items()},
            **utilisation,
            "data_wait_seconds": now.waiting - before.waiting,
            "analysis_seconds": now.analysing - before.analysing,
            "seconds": now.seconds,
            "peak_memory_bytes": peak_memory(self._device),
        }

    def summary(self) -> dict[str, float]:
        """The same of this process up to the line logged last, with shares of its time."""
        seconds = max(self._last.seconds, 1e-9)
        speeds, utilisation = self._speeds(self._first, self._last)
        return {
            "train_seconds": seconds,
            **{f"{name}_per_second": speed for name, speed in speeds.items()},
            **utilisation,
            "data_wait_seconds": self._last.waiting,
            "data_wait_share": self._last.waiting / seconds,
            "analyses": self._analyses,
            "analysis_seconds": self._last.analysing,
            "analysis_share": self._last.analysing / seconds,
            "peak_memory_bytes": peak_memory(self._device),
        }

    def _speeds(self, before: Reading, now: Reading) -> tuple[dict[str, float], dict[str, float]]:
        """Units, examples and updates a second, and shares of the peak."""
        work, seconds = self.work, max(now.seconds - before.seconds, 1e-9)
        updates, units = now.update - before.update, now.seen - before.seen
        examples = updates * work.examples
        speeds = {work.unit: units / seconds, "examples": examples / seconds, "batches": updates / seconds}
        utilisation = {"mfu": examples * work.flops / seconds / work.peak}
        if work.length > 1:  # an image has no pads
            padded = examples * work.length
            speeds[f"padded_{work.unit}"] = padded / seconds
            utilisation["useful_mfu"] = utilisation["mfu"] * units / max(padded, 1)
        return speeds, utilisation


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had at a time since its start: allocated on a GPU by torch, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # see getrusage's manual of either system
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------------------------------------------- --profile

UNPROFILED, PROFILED = 3, 3  # updates: caches fill and kernels are chosen in the first ones, and the profiler itself warms up in the last


def profiled(updates: Iterable[int], wanted: bool, run_folder: Path, ranks: Ranks) -> Iterable[int]:
    """The same updates; where `wanted`, rank 0 writes a trace of the 4th to 6th to RUN/profile/rank0.json.gz (one there is replaced)."""
    if not (wanted and ranks.is_main):
        return updates
    return _profiled(iter(updates), run_folder / "profile" / "rank0.json.gz", ranks.device)


def _profiled(updates: Iterator[int], path: Path, device: torch.device) -> Iterator[int]:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=UNPROFILED - 1, warmup=1, active=PROFILED, repeat=1)
    made = 0
    # A trace that has begun is written when the run ends early, too.
    with torch.profiler.profile(activities=kinds, schedule=schedule, on_trace_ready=lambda p: _write_trace(p, path)) as profiler:
        for update in itertools.islice(updates, UNPROFILED + PROFILED):
            yield update
            profiler.step()
            made += 1
    if made <= UNPROFILED:
        logger.warning(f"no profile: the run made {made} updates, and the first to be profiled is number {UNPROFILED + 1}")
    yield from updates


def _write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info(f"profile: {path}; open it at https://ui.perfetto.dev or in Chrome at chrome://tracing")
    except (OSError, RuntimeError) as error:  # a full disk must not end the training
        logger.warning(f"{path} cannot be written ({error}): training goes on")
