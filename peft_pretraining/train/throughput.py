"""What a training run computes in a second, beside what its devices could, and where its time goes."""

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from loguru import logger

from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train.flops import peak_flops

StepType = TypeVar("StepType")


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
    def of(
        cls,
        unit: str,
        examples: int,
        length: int,
        flops: int,
        dtype: torch.dtype,
        ranks: DistributedContext,
    ) -> "Work":
        """On the devices of all ranks, which call it together; dtype: of the matrix products."""
        ranks.barrier()  # processes that share cores measure at the same time
        peak, source = peak_flops(ranks.device, dtype)
        total = float(ranks.sum(torch.tensor(peak, dtype=torch.float64)))
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(
                ranks.device
            )  # the matrices of a measurement are not the run's
        work = cls(unit, examples, length, flops, total, source, ranks.world_size)
        logger.info(
            f"{flops / length / 1e9:.3g} GFLOPs per {unit[:-1]}; peak {total / 1e12:.3g} TFLOP/s ({source})"
        )
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


class ThroughputMeter:
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
        now = Reading(
            time.perf_counter() - self._started, update, seen, self._waiting, self._analysing
        )
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
        speeds = {
            work.unit: units / seconds,
            "examples": examples / seconds,
            "batches": updates / seconds,
        }
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
