"""Signals that ask a run to stop, and restarts by torchrun."""

import os
import signal

import pytest

from peft_pretraining.constants import STOP_SIGNALS
from peft_pretraining.train import signals
from peft_pretraining.train.signals import StopRequest, was_restarted


@pytest.fixture
def handlers():
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def exits(monkeypatch):
    """Exit codes with which the process would have ended."""
    codes = []
    monkeypatch.setattr(signals.os, "_exit", codes.append)
    return codes


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_recorded(handlers, exits, number):
    stop = StopRequest()
    assert stop.signal is None
    os.kill(os.getpid(), number)
    assert stop.signal == number and exits == []


def test_a_second_signal_ends_the_process_unless_it_is_a_duplicate(handlers, exits, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    now[0] += 0.9
    os.kill(os.getpid(), signal.SIGUSR1)  # forwarded by torchrun
    assert exits == [] and stop.signal == signal.SIGTERM
    now[0] += 0.2
    os.kill(os.getpid(), signal.SIGTERM)
    assert exits == [128 + signal.SIGTERM]


@pytest.mark.parametrize("count, restarted", [(None, False), ("0", False), ("2", True)])
def test_torchrun_tells_of_a_restart(monkeypatch, count, restarted):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if count is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
    assert was_restarted() is restarted
