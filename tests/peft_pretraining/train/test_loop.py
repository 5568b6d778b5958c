"""The parts of the training loops."""

import gc
import types

import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train import loop
from peft_pretraining.train.loop import (
    NextStep,
    SavePoint,
    Stopped,
    next_step,
    saved_on_failure,
    stop_early,
    without_garbage_collection,
    write_run_report,
)

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))
HEALTHY = types.SimpleNamespace(failure=lambda: None, is_due=lambda: False)
NO_SIGNAL, SIGNALLED = (types.SimpleNamespace(reason=reason) for reason in (None, "SIGTERM"))


def unreadable():
    raise UserError("corpus.jsonl cannot be read")
    yield


# ---------------------------------------------------------------------------------- the next step


def test_the_next_step_comes_with_its_counts():
    steps = iter(["first", "second"])
    for wanted in ("first", "second"):
        found = next_step(steps, NO_SIGNAL, HEALTHY, ALONE, lambda step: [len(step), 7])
        assert found == NextStep(wanted, [len(wanted), 7], None, False)


def broken():
    raise ConnectionResetError("104, connection reset")
    yield


@pytest.mark.parametrize(
    "data, message",
    [
        (unreadable, "corpus.jsonl cannot be read"),
        (broken, "reading the training data failed (ConnectionResetError: 104, connection reset)"),
    ],
)
def test_data_that_cannot_be_read_are_the_reason_to_stop(data, message):
    found = next_step(data(), NO_SIGNAL, HEALTHY, ALONE, lambda step: [0])
    assert found.step is None and isinstance(found.stop_reason, UserError)
    assert str(found.stop_reason) == message


def test_a_checkpoint_that_is_due_on_rank_0_is_due_on_all():
    due = types.SimpleNamespace(failure=lambda: None, is_due=lambda: True)
    assert next_step(iter(["first"]), NO_SIGNAL, due, ALONE).saves
    assert not next_step(iter(["first"]), NO_SIGNAL, HEALTHY, ALONE).saves


def test_a_save_that_failed_is_a_reason_to_stop():
    failed = types.SimpleNamespace(failure=lambda: "the disk is full", is_due=lambda: False)
    found = next_step(iter(["first"]), NO_SIGNAL, failed, ALONE)
    assert found.step is None and str(found.stop_reason) == "the disk is full"


@pytest.mark.parametrize("steps", [unreadable, lambda: iter(["first"])])
def test_a_signal_comes_before_a_fault_of_the_data(steps):
    """A signal to the whole process group ends the processes that read the data, too."""
    found = next_step(steps(), SIGNALLED, HEALTHY, ALONE)
    assert found.step is None and isinstance(found.stop_reason, Stopped)
    assert str(found.stop_reason) == "SIGTERM"


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
        (None, "SIGUSR1", "SIGUSR1"),
        ("a damaged block", "SIGUSR1", "SIGUSR1"),
    ],
)
def test_a_reason_of_another_rank_stops_this_one(problem, other_signal, wanted):
    ranks = FirstOfTwo(problem, other_signal)
    found = next_step(iter(["first"]), NO_SIGNAL, HEALTHY, ranks)
    assert found.step is None and str(found.stop_reason) == wanted
    assert isinstance(found.stop_reason, Stopped) == (other_signal is not None)


def test_counts_are_summed_over_the_ranks():
    ranks = FirstOfTwo(None, None)
    found = next_step(iter(["first"]), NO_SIGNAL, HEALTHY, ranks, lambda step: [3, 4])
    assert found.step == "first" and found.counts == [13, 14]


# ------------------------------------------------------------------------------ the end of a run


def test_a_signal_ends_the_run_without_an_error():
    closed = []
    log = types.SimpleNamespace(close=lambda: closed.append(True))
    stop_early(Stopped("SIGTERM"), 3, log, "go on")
    assert closed == [True]
    with pytest.raises(UserError, match="a damaged block"):
        stop_early(UserError("a damaged block"), 3, log, "go on")


def test_ctrl_c_ends_the_run_with_exit_code_130():
    log = types.SimpleNamespace(close=lambda: None)
    with pytest.raises(SystemExit) as ended:
        stop_early(Stopped("SIGINT"), 3, log, "go on")
    assert ended.value.code == 130


def recording_state(update=0):
    """Return a SavePoint, and the list of what it saves."""
    saved = []
    state = SavePoint({"update_step": update}, lambda progress, temporary: saved.append(progress))
    return state, saved


def test_the_state_is_saved_once_and_only_if_it_is_whole():
    state, saved = recording_state(3)
    state.save()
    assert saved == []  # the run has just begun there
    state.reach(update_step=4, tokens_seen=9)
    state.save()
    state.save()
    assert saved == [{"update_step": 4, "tokens_seen": 9}]
    state.whole = False
    state.reach(update_step=5)
    state.whole = False
    state.save()
    assert len(saved) == 1


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), UserError("bad validation")])
def test_an_exception_leaves_a_checkpoint_of_the_last_whole_update(error):
    state, saved = recording_state()
    checkpoints = types.SimpleNamespace(finish=lambda: saved.append("written"))
    with pytest.raises(type(error), match=str(error)):
        with saved_on_failure(state, checkpoints, ALONE):
            state.reach(update_step=1)
            raise error
    assert saved == [{"update_step": 1}, "written"]


def test_an_exception_of_one_rank_saves_nothing_that_needs_the_others():
    state, saved = recording_state()
    ranks = types.SimpleNamespace(world_size=2, all_failed=lambda: False)
    with pytest.raises(ValueError), saved_on_failure(state, HEALTHY, ranks):
        state.reach(update_step=1)
        raise ValueError
    assert saved == []


def test_nothing_is_saved_with_a_rank_that_does_not_answer():
    """Nor is that rank waited for again."""
    state, saved = recording_state()
    ranks = types.SimpleNamespace(world_size=2, all_failed=lambda: True)
    with pytest.raises(RuntimeError), saved_on_failure(state, HEALTHY, ranks):
        state.reach(update_step=1)
        raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")
    assert saved == []


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
