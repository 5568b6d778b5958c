"""Progress lines where there is no terminal."""

import sys

import pytest
from loguru import logger

from peft_pretraining.records import progress
from peft_pretraining.records.progress import Progress, duration


@pytest.fixture
def lines():
    """The lines that are logged."""
    found = []
    sink = logger.add(lambda message: found.append(message.record["message"]))
    yield found
    logger.remove(sink)


@pytest.fixture
def now(monkeypatch):
    """The time in seconds, in a list so that a test can change it."""
    hands = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: hands[0])
    return hands


def test_a_logged_update_is_a_line(lines, now):
    shown = Progress(total=110, done=10, unit="tokens")
    for _ in range(10):
        now[0] += 5
        shown.advance()
    shown.show({"update_step": 20, "loss": 3.25, "throughput_tokens": 1234.5})
    shown.close()
    assert lines == ["update 20 of 110: loss 3.2500, 1,234 tokens/s, 7 min 30 s left"]


def test_a_slow_run_writes_a_line_each_minute(lines, now):
    shown = Progress(total=10, done=0, unit="images")
    for _ in range(4):
        now[0] += 31
        shown.advance()
    assert lines == ["update 2 of 10: 4 min 8 s left", "update 4 of 10: 3 min 6 s left"]


def test_a_terminal_shows_a_bar_and_no_lines(lines, now, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = Progress(total=10, done=0, unit="tokens")
    now[0] += 100
    shown.advance()
    shown.show({"update_step": 1, "loss": 3.0, "throughput_tokens": 1.0})
    assert shown._bar.n == 1 and "loss 3.000" in shown._bar.postfix and lines == []
    shown.close()


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "0 s"), (59.6, "1 min 0 s"), (3_600, "1 h 0 min"), (100_000, "1 d 3 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
