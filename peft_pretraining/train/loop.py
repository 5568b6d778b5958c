"""Parts of both training loops: the next batch, a graceful stop, the summary of a run."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger

from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.train.signals import StopRequest
from peft_pretraining.train.throughput import ThroughputMeter

StepType = TypeVar("StepType")


class Stopped(Exception):
    """A signal asked the run to stop."""


def _count_nothing(step: object) -> list[int]:
    return []


def next_step(
    steps: Iterator[StepType],
    stop: StopRequest,
    checkpoints: Checkpoints,
    ranks: DistributedContext,
    count: Callable[[StepType | None], list[int]] = _count_nothing,
) -> tuple[StepType | None, list[int], Exception | None]:
    """Return the data of the next update, or the reason to stop, on which all ranks agree.

    Args:
        steps: this rank's data of each update.
        stop: whether a signal has asked this rank to stop.
        checkpoints: whether saving has failed.
        ranks: the processes of the run; all of them call this function together.
        count: numbers to be summed over the ranks, such as the tokens of the update. It must return
            equally many numbers for every step and for None, which stands for missing data.

    Returns:
        This rank's data, or None if the run must stop.
        The numbers of `count`, summed over the ranks.
        The reason to stop, which is `Stopped` or UserError, or None.
    """
    step: StepType | None = None
    try:
        step = next(steps)
        problem = checkpoints.failure()
    except UserError as error:
        problem = str(error)
    # These tensors are on the CPU, so that no rank waits for its GPU.
    must_stop = bool(problem or stop.signal)
    *counts, stopping = ranks.sum(torch.tensor([*count(step), must_stop])).tolist()
    if not stopping:
        return step, counts, None
    reports: Any = ranks.broadcast_object(ranks.gather_objects((problem, stop.signal)))
    problems = [
        f"{problem} (rank {rank})" if ranks.world_size > 1 else problem
        for rank, (problem, _) in enumerate(reports)
        if problem
    ]
    signals = [signal for _, signal in reports if signal]
    # A signal comes first: if it was sent to the whole process group, it has also ended the
    # processes that read the data, and then there is no fault in the data.
    return None, counts, Stopped(signals[0].name) if signals else UserError(problems[0])


def stop_early(stop_reason: Exception, update: int, log: RunLog, advice: str) -> None:
    """End the run after this update. Its checkpoint has been written.

    Args:
        stop_reason: what `next_step` returned; anything but `Stopped` is raised.
        update: the last update of the run.
        log: the records of the run, which are closed.
        advice: how to continue the run.
    """
    if not isinstance(stop_reason, Stopped):
        raise stop_reason
    log.close()
    logger.warning(f"{stop_reason}: stopped after update {update}; {advice}")


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turn automatic garbage collection off; the loop calls `gc.collect()` on all ranks at once.

    A collection that starts by itself on one rank makes all other ranks wait for it. The objects
    that exist at the start, hundreds of thousands of the libraries, are not examined again, so that
    a collection takes about a millisecond.
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


def finish(meter: ThroughputMeter, log: RunLog, ranks: DistributedContext) -> None:
    """Write the summary and the report of a run that has made all its updates."""
    summary, items = meter.summary(), meter.work.item_name
    log.finish(summary)
    if ranks.is_main:
        logger.info(
            f"{summary[f'{items}_per_second']:,.0f} {items}/s, MFU {summary['mfu']:.1%}; waiting "
            f"for data took {summary['data_wait_seconds']:.2f} s, "
            f"{summary['data_wait_share']:.2%}; analyses took "
            f"{summary['analysis_seconds']:.2f} s, {summary['analysis_share']:.2%}"
        )
        write_run_report(log.folder)


def write_run_report(run_folder: Path) -> None:
    """Write the report of a run that has made all its updates.

    A failure, for instance a full disk, is only a warning: the training itself has succeeded.
    """
    # Imported only here: the report's libraries are not needed before.
    from peft_pretraining.report.html import write_report

    try:
        logger.info(f"report: {write_report(run_folder)}")
    except (OSError, UserError) as error:
        logger.warning(
            f"no report ({error}): make it later with "
            f"python -m peft_pretraining.report {run_folder}"
        )
