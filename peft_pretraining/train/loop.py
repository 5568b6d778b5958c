"""What the training loops of both scripts are made of."""

import contextlib
import gc
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.nn as nn
from loguru import logger
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.parallel.process_group import Ranks
from peft_pretraining.errors import UserError
from peft_pretraining.optim.nonfinite import FiniteGuard
from peft_pretraining.parallel.fsdp import FSDPModule, watch_gradients, whole_tensor
from peft_pretraining.train.signals import StopRequest
from peft_pretraining.optim.optimizer import scaled_decays
from peft_pretraining.report.html import write_report
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.train.throughput import Clock


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


class Decays(Protocol):
    """AlphaDecay, or a baseline with its face."""

    history: list[dict]

    def step(self, optimizer: Optimizer) -> bool:
        """Whether the groups have new decays."""


@dataclass(frozen=True)
class Updates:
    """What follows an update's gradients, alike in both scripts.

    Args:
        decay: sets the groups' decays; None: they stay as they are.
        greatest_norm: of all gradients together; 0: any.
    """

    model: nn.Module
    optimizer: Optimizer
    decay: Decays | None
    greatest_norm: float
    guard: FiniteGuard
    checkpoints: Checkpoints
    clock: Clock
    log: RunLog

    def make(self, update: int, loss: Tensor, lr: float, eta: float = 1.0) -> Tensor:
        """Clip, judge, set learning rate and decays, step. Returns the gradients' norm before it was clipped, a scalar on the device.

        loss: this rank's share, a scalar on the device. eta: multiplies all decays in this update, so that their ratios stay.
        """
        norm = clip_gradients(self.model, self.greatest_norm)
        self.guard.judge(update, loss, norm)  # what is not finite on one rank is applied on none
        self.checkpoints.before_update()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Every `unbalancedWD_every` updates the weights are analysed and each group gets a new decay.
        before = time.perf_counter()
        rebalanced = self.decay is not None and self.decay.step(self.optimizer)
        self.clock.analysis_took(time.perf_counter() - before, rebalanced)
        if rebalanced:
            self.log.modules([row for row in self.decay.history if row["step"] == update])
        with scaled_decays(self.optimizer, eta):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.log.advance()
        return norm


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


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Inside, Python looks for garbage only where `gc.collect` is called: anywhere else one rank's collection would keep all waiting.

    What is there at the start, hundreds of thousands of objects of the libraries, is not looked at again: a collection takes a millisecond.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def finish(clock: Clock, log: RunLog, ranks: Ranks) -> None:
    """Summary and report."""
    summary, unit = clock.summary(), clock.work.unit
    log.finish(summary)
    if ranks.is_main:
        logger.info(
            f"{summary[f'{unit}_per_second']:,.0f} {unit}/s, MFU {summary['mfu']:.1%}; waiting for data took "
            f"{summary['data_wait_seconds']:.2f} s, {summary['data_wait_share']:.2%}; analyses took "
            f"{summary['analysis_seconds']:.2f} s, {summary['analysis_share']:.2%}"
        )
        report(log.folder)


def report(run_folder: Path) -> None:
    """Write the run's report; a disk too full for it must not fail a run that has made all its updates."""
    try:
        logger.info(f"report: {write_report(run_folder)}")
    except (OSError, UserError) as error:
        logger.warning(f"no report ({error}): make it later with python -m peft_pretraining.report {run_folder}")
