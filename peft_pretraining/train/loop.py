"""What the training loops of both scripts are made of."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from loguru import logger

from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.report.html import write_report
from peft_pretraining.train.signals import StopRequest
from peft_pretraining.train.throughput import ThroughputMeter

StepType = TypeVar("StepType")


def next_step(
    steps: Iterator[StepType],
    stop: StopRequest,
    checkpoints: Checkpoints,
    ranks: DistributedContext,
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
    *counts, endings = ranks.sum(
        torch.tensor([*count(step), bool(problem or stop.signal)])
    ).tolist()
    if not endings:
        return step, counts, None
    said = ranks.broadcast(ranks.gather((problem, stop.signal)))
    problems = [
        f"{problem} (rank {rank})" if ranks.world_size > 1 else problem
        for rank, (problem, _) in enumerate(said)
        if problem
    ]
    signals = [signal for _, signal in said if signal]
    # A signal to the whole process group also ends the processes that read data, which is no fault of the data.
    return None, counts, Stopped(signals[0].name) if signals else UserError(problems[0])


class Stopped(Exception):
    """A signal asked for the end of the run."""


def stop_early(ending: Exception, update: int, log: RunLog, advice: str) -> None:
    """A run that goes no further than this update, whose checkpoint is on the disk. advice: how to go on."""
    if not isinstance(ending, Stopped):
        raise ending
    log.close()
    logger.warning(f"{ending}: stopped after update {update}; {advice}")


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


def finish(clock: ThroughputMeter, log: RunLog, ranks: DistributedContext) -> None:
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
        logger.warning(
            f"no report ({error}): make it later with python -m peft_pretraining.report {run_folder}"
        )
