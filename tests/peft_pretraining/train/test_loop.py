"""The parts of the training loops."""

import gc
import signal
import types

import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train import loop
from peft_pretraining.train.loop import (
    Stopped,
    next_step,
    stop_early,
    without_garbage_collection,
    write_run_report,
)

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))
HEALTHY = types.SimpleNamespace(failure=lambda: None)
NO_SIGNAL, SIGNALLED = (types.SimpleNamespace(signal=s) for s in (None, signal.SIGTERM))


def unreadable():
    raise UserError("corpus.jsonl cannot be read")
    yield


# ---------------------------------------------------------------------------------- the next step


def test_the_next_step_comes_with_its_counts():
    steps = iter(["first", "second"])
    for wanted in ("first", "second"):
        step, counts, reason = next_step(
            steps, NO_SIGNAL, HEALTHY, ALONE, lambda step: [len(step), 7]
        )
        assert (step, counts, reason) == (wanted, [len(wanted), 7], None)


def test_data_that_cannot_be_read_are_the_reason_to_stop():
    step, _, reason = next_step(unreadable(), NO_SIGNAL, HEALTHY, ALONE, lambda step: [0])
    assert step is None and isinstance(reason, UserError)
    assert str(reason) == "corpus.jsonl cannot be read"


def test_a_save_that_failed_is_a_reason_to_stop():
    failed = types.SimpleNamespace(failure=lambda: "the disk is full")
    step, _, reason = next_step(iter(["first"]), NO_SIGNAL, failed, ALONE)
    assert step is None and str(reason) == "the disk is full"


@pytest.mark.parametrize("steps", [unreadable, lambda: iter(["first"])])
def test_a_signal_comes_before_a_fault_of_the_data(steps):
    """A signal to the whole process group ends the processes that read the data, too."""
    step, _, reason = next_step(steps(), SIGNALLED, HEALTHY, ALONE)
    assert step is None and isinstance(reason, Stopped) and str(reason) == "SIGTERM"


class FirstOfTwo:
    """Rank 0 of two; the other rank reports the given problem and signal."""

    world_size = 2

    def __init__(self, problem, signal):
        self.other = (problem, signal)

    def sum(self, values):
        other = torch.zeros_like(values)
        other[:-1], other[-1] = 10, int(any(self.other))
        return values + other

    def gather(self, report):
        return [report, self.other]

    def broadcast(self, reports):
        return reports

    gather_objects, broadcast_objects, broadcast_object = gather, broadcast, broadcast


@pytest.mark.parametrize(
    "problem, other_signal, wanted",
    [
        ("a damaged block", None, "a damaged block (rank 1)"),
        (None, signal.SIGUSR1, "SIGUSR1"),
        ("a damaged block", signal.SIGUSR1, "SIGUSR1"),
    ],
)
def test_a_reason_of_another_rank_stops_this_one(problem, other_signal, wanted):
    ranks = FirstOfTwo(problem, other_signal)
    step, _, reason = next_step(iter(["first"]), NO_SIGNAL, HEALTHY, ranks)
    assert step is None and str(reason) == wanted
    assert isinstance(reason, Stopped) == (other_signal is not None)


def test_counts_are_summed_over_the_ranks():
    ranks = FirstOfTwo(None, None)
    step, counts, _ = next_step(iter(["first"]), NO_SIGNAL, HEALTHY, ranks, lambda step: [3, 4])
    assert step == "first" and counts == [13, 14]


# ------------------------------------------------------------------------------ the end of a run


def test_a_signal_ends_the_run_without_an_error():
    closed = []
    log = types.SimpleNamespace(close=lambda: closed.append(True))
    stop_early(Stopped("SIGTERM"), 3, log, "go on")
    assert closed == [True]
    with pytest.raises(UserError, match="a damaged block"):
        stop_early(UserError("a damaged block"), 3, log, "go on")


def test_a_report_that_cannot_be_written_does_not_fail_the_run(tmp_path, monkeypatch):
    from peft_pretraining.report import html

    def full(folder):
        raise OSError("No space left on device")

    messages = []
    sink = loop.logger.add(lambda message: messages.append(message.record["message"]))
    monkeypatch.setattr(html, "write_report", full)
    try:
        write_run_report(tmp_path)
    finally:
        loop.logger.remove(sink)
    assert messages == [
        "no report (No space left on device): make it later with "
        f"python -m peft_pretraining.report {tmp_path}"
    ]


# ----------------------------------------------------------------------------- garbage collection


def collected_by_itself():
    """Return whether 20,000 new lists make Python search for garbage."""
    runs = sum(generation["collections"] for generation in gc.get_stats())
    kept = [[] for _ in range(20_000)]
    return sum(generation["collections"] for generation in gc.get_stats()) > runs and len(kept) > 0


def test_garbage_is_collected_only_on_request():
    assert collected_by_itself()
    with pytest.raises(KeyError):
        with without_garbage_collection():
            assert not collected_by_itself()
            assert gc.get_freeze_count() > 1_000
            cycle = []
            cycle.append(cycle)
            del cycle
            assert gc.collect() >= 1
            raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0 and collected_by_itself()
