"""What the training loops of both scripts are made of."""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn as nn
from loguru import logger
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.distributed import Ranks
from peft_pretraining.errors import UserError
from peft_pretraining.finite import FiniteGuard
from peft_pretraining.fsdp import FSDPModule, watch_gradients, whole_tensor
from peft_pretraining.interruption import StopRequest
from peft_pretraining.report import write_report
from peft_pretraining.run_log import RunLog
from peft_pretraining.saving import Checkpoints

StepType = TypeVar("StepType")


def data_parallel(model: nn.Module, guard: FiniteGuard, ranks: Ranks, first_pass: Callable[[nn.Module], Tensor]) -> nn.Module:
    """The model with gradients summed over the ranks, each rank's own seen by the guard before.

    first_pass: calls the model on any input, alike on all ranks, and returns a scalar to go backward from. It must not change the model.
    """
    if ranks.world_size == 1:
        return model
    if isinstance(model, FSDPModule):
        watch_gradients(model, guard.look)
        return model
    wrapper = nn.parallel.DistributedDataParallel
    # torch 2.14 has another name for it, and warns of the old one.
    names = inspect.signature(wrapper).parameters
    no_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
    parallel = wrapper(model, device_ids=[ranks.local_rank] if ranks.device.type == "cuda" else None, **no_buffers)
    guard.sum_over_ranks(parallel)
    # After its first pass DistributedDataParallel packs the gradients anew, and may then add them in another order. A resumed
    # run must add in the order of the run that it continues, so every run makes that pass here.
    first_pass(parallel).backward()
    model.zero_grad()
    return parallel


def next_step(
    steps: Iterator[StepType],
    stop: StopRequest,
    checkpoints: Checkpoints,
    ranks: Ranks,
    count: Callable[[StepType | None], list[int]] = lambda step: [],
) -> tuple[StepType | None, list[int], Exception | None]:
    """This rank's data of the next update, what `count` finds in it summed over the ranks, and, agreed by all, why there is none.

    count: must return equally many numbers for every step, and for None: a rank that has no more data.
    """
    try:
        step, problem = next(steps), checkpoints.failure()
    except UserError as error:
        step, problem = None, str(error)
    # On the CPU, so that no rank waits for its device.
    *counts, endings = ranks.sum(torch.tensor([*count(step), bool(problem or stop.signal)])).tolist()
    if not endings:
        return step, counts, None
    said = ranks.broadcast(ranks.gather((problem, stop.signal)))
    problems = [f"{problem} (rank {rank})" if ranks.world_size > 1 else problem for rank, (problem, _) in enumerate(said) if problem]
    signals = [signal for _, signal in said if signal]
    # A signal to the whole process group also ends the processes that read data, which is no fault of the data.
    return None, counts, Stopped(signals[0].name) if signals else UserError(problems[0])


class Stopped(Exception):
    """A signal asked for the end of the run."""


def end_early(ending: Exception, update: int, log: RunLog, advice: str) -> None:
    """A run that goes no further than this update, whose checkpoint is on the disk. advice: how to go on."""
    if not isinstance(ending, Stopped):
        raise ending
    log.close()
    logger.warning(f"{ending}: stopped after update {update}; {advice}")


def clip_gradients(model: nn.Module, greatest_norm: float) -> Tensor:
    """The L2 norm of all gradients together, which is brought down to `greatest_norm` where that is not 0."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = whole_tensor(torch.nn.utils.get_total_norm(gradients))
    if greatest_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), greatest_norm, norm)
    return norm


def mean_decay(optimizer: Optimizer) -> float:
    """The parameter-weighted mean of the groups' decays; 0 for AdaDecay, which applies its own."""
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return sum(n * group["weight_decay"] for n, group in zip(sizes, optimizer.param_groups, strict=True)) / sum(sizes)


class Clock:
    """Seconds of training without evaluations and checkpoints, and how many of them the analyses took.

    Args:
        seen: what the run has been trained on before, in
        unit: `tokens` (no pads) or `images`.
    """

    def __init__(self, seen: int, unit: str = "tokens"):
        self.unit = unit
        self.started = self.last = time.perf_counter()
        self.paused = self.analysing = 0.0
        self.analyses = 0
        self.first_seen = self.last_seen = seen
        self.last_update = None

    @contextlib.contextmanager
    def pause(self):
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start
        self.last += time.perf_counter() - start

    def analysis_took(self, seconds: float, rebalanced: bool) -> None:
        self.analysing += seconds
        self.analyses += rebalanced

    def seconds(self) -> float:
        return time.perf_counter() - self.started - self.paused

    def rates(self, update: int, seen: int, examples: int) -> dict[str, float]:
        """Throughput since the last call: units, examples (`examples` in an update) and updates a second."""
        now = time.perf_counter()
        updates = update - (self.last_update if self.last_update is not None else update - 1)
        elapsed, new = max(now - self.last, 1e-9), seen - self.last_seen
        self.last, self.last_seen, self.last_update = now, seen, update
        rates = {self.unit: new / elapsed, "examples": updates * examples / elapsed, "batches": updates / elapsed}
        return {f"throughput_{name}": rate for name, rate in rates.items()} | {"seconds": self.seconds()}


def finish(clock: Clock, log: RunLog, ranks: Ranks) -> None:
    """Summary and report."""
    seconds = clock.seconds()
    rate = (clock.last_seen - clock.first_seen) / seconds
    summary = {
        "train_seconds": seconds,
        f"{clock.unit}_per_second": rate,
        "analyses": clock.analyses,
        "analysis_seconds": clock.analysing,
        "analysis_share": clock.analysing / seconds,
    }
    log.finish(summary)
    if ranks.is_main:
        logger.info(f"{rate:,.0f} {clock.unit}/s; analyses took {clock.analysing:.2f} s, {clock.analysing / seconds:.2%}")
        report(log.folder)


def report(run_folder: Path) -> None:
    """Write the run's report; a disk too full for it must not fail a run that has made all its updates."""
    try:
        logger.info(f"report: {write_report(run_folder)}")
    except (OSError, UserError) as error:
        logger.warning(f"no report ({error}): make it later with python -m peft_pretraining.report {run_folder}")
