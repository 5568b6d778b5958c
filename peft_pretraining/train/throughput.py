"""Throughput and model FLOPs utilization (MFU) of a run, and where its time goes."""

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
class WorkPerStep:
    """Amount of work in an update, and peak FLOP/s of all devices.

    Args:
        item_name: what the throughput counts, `tokens` (without padding) or `images`.
        batch_size: sequences or images in an update, over all ranks.
        length: items in a sequence, padding included; 1 for images.
        flops: operations of training on one sequence or image, padding included.
        peak_flops: FLOP/s of all devices together.
        peak_source: where that number comes from.
        world_size: number of devices.
    """

    item_name: str
    batch_size: int
    length: int
    flops: int
    peak_flops: float
    peak_source: str
    world_size: int

    @classmethod
    def measure(
        cls,
        item_name: str,
        batch_size: int,
        length: int,
        flops: int,
        dtype: torch.dtype,
        ranks: DistributedContext,
    ) -> "WorkPerStep":
        """Return the work of an update on the devices of all ranks, which call this together.

        Args:
            item_name, batch_size, length, flops: see the class.
            dtype: of the matrix products.
            ranks: the processes of the run.
        """
        # Processes that share cores must measure at the same time.
        ranks.barrier()
        peak, source = peak_flops(ranks.device, dtype)
        total = float(ranks.sum(torch.tensor(peak, dtype=torch.float64)))
        if ranks.device.type == "cuda":
            # The matrices of the measurement do not belong to the memory of the training.
            torch.cuda.reset_peak_memory_stats(ranks.device)
        logger.info(
            f"{flops / length / 1e9:.3g} GFLOPs per {item_name[:-1]}; "
            f"peak {total / 1e12:.3g} TFLOP/s ({source})"
        )
        return cls(item_name, batch_size, length, flops, total, source, ranks.world_size)

    def record(self) -> dict[str, float | str]:
        """Return what run.json contains of it. The peak is that of one process, the mean of all."""
        return {
            f"flops_per_{self.item_name[:-1]}": self.flops // self.length,
            "peak_flops": self.peak_flops / self.world_size,
            "peak_source": self.peak_source,
        }


# --------------------------------------------------------------------------- where the time goes


@dataclass(frozen=True)
class TimerState:
    """Cumulative counters at one moment.

    Args:
        seconds: training time.
        update: updates that the run has made.
        items: tokens or images that it has been trained on.
        data_wait: seconds of waiting for data, a part of the training time.
        analysis: seconds of analyses, a part of the training time.
        capacity: operations that the devices could have made in the training time, at their peak.
    """

    seconds: float
    update: int
    items: int
    data_wait: float
    analysis: float
    capacity: float


# What a process hands on to the one that continues its run, see `ThroughputMeter.totals`.
TOTALS = (
    "seconds",
    "data_wait_seconds",
    "analysis_seconds",
    "analyses",
    "capacity",
    "peak_memory_bytes",
)


class ThroughputMeter:
    """Measures the time of training without that of evaluations and checkpoints.

    It never makes the host wait for the device.

    Args:
        work: the work of an update.
        update: updates that the run has made before.
        items: tokens or images that the run has been trained on before.
        device: the device whose memory is reported.
        earlier: `totals()` of the processes that made these updates. None: they are unknown, and
            the times and the summary are those of this process.
    """

    def __init__(
        self,
        work: WorkPerStep,
        update: int,
        items: int,
        device: torch.device,
        earlier: dict[str, float] | None = None,
    ):
        self.work, self._device = work, device
        before = dict.fromkeys(TOTALS, 0.0) | (earlier or {})
        # Moves forward by the length of each excluded block.
        self._started = time.perf_counter() - before["seconds"]
        self._data_wait, self._analysis = before["data_wait_seconds"], before["analysis_seconds"]
        self._analyses = int(before["analyses"])
        self._peak_memory = int(before["peak_memory_bytes"])
        # These devices may be others than those of the earlier processes.
        self._earlier_capacity = before["capacity"] - before["seconds"] * work.peak_flops
        self._last = self._state(update, items)
        self._first = TimerState(0.0, 0, 0, 0.0, 0.0, 0.0) if earlier else self._last

    @contextlib.contextmanager
    def exclude(self) -> Iterator[None]:
        """Exclude the enclosed block (evaluation, checkpointing) from the training time."""
        start = time.perf_counter()
        yield
        self._started += time.perf_counter() - start

    def time_data(self, steps: Iterable[StepType]) -> Iterator[StepType]:
        """Yield the steps unchanged and record the time spent waiting for each."""
        start = time.perf_counter()
        for step in steps:
            self._data_wait += time.perf_counter() - start
            yield step
            start = time.perf_counter()

    def add_analysis(self, seconds: float, is_analysis: bool) -> None:
        """Add the time that the weight-decay scheduler took in an update.

        Args:
            seconds: the time.
            is_analysis: whether the decays were assigned anew in this update.
        """
        self._analysis += seconds
        self._analyses += is_analysis

    def rates(self, update: int, items: int) -> dict[str, float]:
        """Return throughput and MFU since the previously logged update.

        Args:
            update: updates that the run has made.
            items: tokens or images that it has been trained on.

        Returns:
            throughput_<item_name>, throughput_examples, throughput_batches (updates) and, for text,
            throughput_padded_tokens: all per second.
            mfu: operations on all sequences, padding included, divided by the peak.
            useful_mfu, for text: the same without padding.
            data_wait_seconds, analysis_seconds.
            seconds: training time of the run since its start.
            peak_memory_bytes: of the run since its start.
        """
        now = self._state(update, items)
        previous, self._last = self._last, now
        speeds, utilization = self._speeds(previous, now)
        return {
            **{f"throughput_{name}": speed for name, speed in speeds.items()},
            **utilization,
            "data_wait_seconds": now.data_wait - previous.data_wait,
            "analysis_seconds": now.analysis - previous.analysis,
            "seconds": now.seconds,
            "peak_memory_bytes": self._most_memory(),
        }

    def totals(self) -> dict[str, float]:
        """Return where the time of the run went so far, for the process that continues the run."""
        seconds = time.perf_counter() - self._started
        return {
            "seconds": seconds,
            "data_wait_seconds": self._data_wait,
            "analysis_seconds": self._analysis,
            "analyses": self._analyses,
            "capacity": self._earlier_capacity + seconds * self.work.peak_flops,
            "peak_memory_bytes": self._most_memory(),
        }

    def summary(self) -> dict[str, float]:
        """Return the same numbers of the run up to the last logged update, and time shares."""
        seconds = max(self._last.seconds, 1e-9)
        speeds, utilization = self._speeds(self._first, self._last)
        return {
            "updates": self._last.update - self._first.update,
            "train_seconds": seconds,
            **{f"{name}_per_second": speed for name, speed in speeds.items()},
            **utilization,
            "data_wait_seconds": self._last.data_wait,
            "data_wait_share": self._last.data_wait / seconds,
            "analyses": self._analyses,
            "analysis_seconds": self._last.analysis,
            "analysis_share": self._last.analysis / seconds,
            "peak_memory_bytes": self._most_memory(),
        }

    def _state(self, update: int, items: int) -> TimerState:
        """Return the counters now."""
        seconds = time.perf_counter() - self._started
        capacity = self._earlier_capacity + seconds * self.work.peak_flops
        return TimerState(seconds, update, items, self._data_wait, self._analysis, capacity)

    def _most_memory(self) -> int:
        """Return the peak memory of this process and of the earlier ones in bytes."""
        return max(self._peak_memory, peak_memory(self._device))

    def _speeds(
        self, start: TimerState, end: TimerState
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return items, examples and updates per second, and the shares of the peak."""
        work, seconds = self.work, max(end.seconds - start.seconds, 1e-9)
        updates, items = end.update - start.update, end.items - start.items
        examples = updates * work.batch_size
        speeds = {
            work.item_name: items / seconds,
            "examples": examples / seconds,
            "batches": updates / seconds,
        }
        capacity = max(end.capacity - start.capacity, 1e-9 * work.peak_flops)
        utilization = {"mfu": examples * work.flops / capacity}
        if work.length > 1:  # only sequences have padding
            padded = examples * work.length
            speeds[f"padded_{work.item_name}"] = padded / seconds
            utilization["useful_mfu"] = utilization["mfu"] * items / max(padded, 1)
        return speeds, utilization


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process since its start in bytes.

    It is what torch allocated on a GPU, or the resident memory of the process on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage reports bytes on macOS and KiB on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
