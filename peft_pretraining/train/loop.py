"""Parts of both training loops: the next batch, a graceful stop, the summary of a run."""

import contextlib
import gc
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from loguru import logger

from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext, is_timeout
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.train.signals import StopRequest
from peft_pretraining.train.throughput import ThroughputMeter

StepType = TypeVar("StepType")


class Stopped(Exception):
    """A signal asked the run to stop, or its launcher has ended. The text is the reason."""


@dataclass(frozen=True)
class NextStep(Generic[StepType]):
    """What all ranks have agreed on before an update.

    Args:
        step: this rank's data, or None if the run must stop.
        counts: the numbers of `count`, summed over the ranks.
        stop_reason: the reason to stop, which is `Stopped` or UserError, or None.
        saves: whether the state before this update is to be saved, because the last checkpoint is
            older than --save_every_minutes.
    """

    step: StepType | None
    counts: list[int]
    stop_reason: Exception | None
    saves: bool


def _count_nothing(step: object) -> list[int]:
    return []


def next_step(
    steps: Iterator[StepType],
    stop: StopRequest,
    checkpoints: Checkpoints,
    ranks: DistributedContext,
    count: Callable[[StepType | None], list[int]] = _count_nothing,
) -> NextStep[StepType]:
    """Return the data of the next update, or the reason to stop, on which all ranks agree.

    Args:
        steps: this rank's data of each update.
        stop: whether this rank was asked to stop.
        checkpoints: whether saving has failed, and whether it is time to save again.
        ranks: the processes of the run; all of them call this function together.
        count: numbers to be summed over the ranks, such as the tokens of the update. It must return
            equally many numbers for every step and for None, which stands for missing data.
    """
    step: StepType | None = None
    try:
        step = next(steps)
        problem = checkpoints.failure()
    except UserError as error:
        problem = str(error)
    except Exception as error:
        # Whatever it is, the other ranks must not wait for this one, and the state is saved.
        logger.opt(exception=error).error("the data of the next update cannot be read")
        problem = f"reading the training data failed ({type(error).__name__}: {error})"
    reason = stop.reason
    # These tensors are on the CPU, so that no rank waits for its GPU.
    numbers = torch.tensor([*count(step), checkpoints.is_due(), bool(problem or reason)])
    *counts, due, stopping = ranks.sum(numbers).tolist()
    if not stopping:
        return NextStep(step, counts, None, due > 0)
    reports: Any = ranks.broadcast_object(ranks.gather_objects((problem, reason)))
    problems = [
        f"{problem} (rank {rank})" if ranks.world_size > 1 else problem
        for rank, (problem, _) in enumerate(reports)
        if problem
    ]
    reasons = [reason for _, reason in reports if reason]
    # A signal comes first: if it was sent to the whole process group, it has also ended the
    # processes that read the data, and then there is no fault in the data.
    stop_reason = Stopped(reasons[0]) if reasons else UserError(problems[0])
    return NextStep(None, counts, stop_reason, False)


class SavePoint:
    """The state after the last whole update, and whether a checkpoint has it.

    Args:
        progress: how far the run is: `update_step` and other counters, and `evaluation_due`, which
            is True between an update and its evaluation.
        save: starts to save a checkpoint, given the progress and whether it is temporary.

    Attributes:
        progress: how far the run is now.
        whole: whether weights and optimizer are those after `update_step`. False while an update
            changes them.
    """

    def __init__(self, progress: dict[str, Any], save: Callable[[dict[str, Any], bool], None]):
        self.progress, self.whole = progress, True
        self._save, self._saved = save, progress

    def reach(self, **progress: Any) -> None:
        """Note that an update or its evaluation is complete, and how far the run is now."""
        self.progress = self.progress | progress
        self.whole = True

    @property
    def unsaved(self) -> bool:
        """Whether the state is whole and no checkpoint has it."""
        return self.whole and self._saved != self.progress

    def save(self, temporary: bool = False) -> None:
        """Start to save the state, if it is whole and no checkpoint has it. All ranks call this."""
        if self.unsaved:
            self._save(self.progress, temporary)
            self._saved = self.progress


@contextlib.contextmanager
def saved_on_failure(
    state: SavePoint, checkpoints: Checkpoints, ranks: DistributedContext
) -> Iterator[None]:
    """Save the state after the last whole update if an exception ends this block, then raise it.

    If the exception is of some ranks only, the others are in the middle of something else, and
    nothing can be saved that needs them.

    Args:
        state: the state of the run.
        checkpoints: the checkpoints of the run.
        ranks: the processes of the run.
    """
    try:
        yield
    except Exception as error:
        hung = ranks.world_size > 1 and is_timeout(error)
        if state.unsaved and not hung and ranks.all_failed():
            try:
                state.save()
                checkpoints.finish()
            except Exception as other:
                logger.warning(f"the state after the last whole update could not be saved: {other}")
        raise


def stop_early(stop_reason: Exception, update: int, log: RunLog, advice: str) -> None:
    """End the run after this update. Its checkpoint has been written.

    Args:
        stop_reason: what `next_step` returned; anything but `Stopped` is raised.
        update: the last update of the run.
        log: the records of the run, which are closed.
        advice: how to continue the run.

    Raises:
        SystemExit: with exit code 130 after Ctrl-C, as shells and scripts expect.
    """
    if not isinstance(stop_reason, Stopped):
        raise stop_reason
    log.close()
    logger.warning(f"{stop_reason}: stopped after update {update}; {advice}")
    if str(stop_reason) == signal.SIGINT.name:
        raise SystemExit(128 + signal.SIGINT)


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

    A failure, for instance a full disk or records that were edited, is only a warning: the training
    itself has succeeded.
    """
    # Imported only here: the report's libraries are not needed before.
    from peft_pretraining.report.html import write_report

    try:
        logger.info(f"report: {write_report(run_folder)}")
    except Exception as error:
        logger.warning(
            f"no report ({error}): make it later with "
            f"python -m peft_pretraining.report {run_folder}"
        )
