"""The progress of a run on the screen: a bar in a terminal, lines in a log file."""

import sys
import time
from typing import Any

from loguru import logger
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0  # a log that is silent for longer looks like a run that hangs


class Progress:
    """Shows how far the training is.

    If stderr is a terminal, this is a progress bar. Otherwise (under Slurm, nohup or docker) it is
    one line for each logged update, and a line at least once a minute.

    Args:
        total: Updates of the whole run.
        done: Updates that were made before.
        unit: What throughput counts: `tokens` or `images`.
    """

    def __init__(self, total: int, done: int, unit: str):
        self._total, self._first, self._update, self._unit = total, done, done, unit
        self._start = self._last_line = time.monotonic()
        self._bar: tqdm | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="update", dynamic_ncols=True)

    def advance(self) -> None:
        """Count an update."""
        self._update += 1
        if self._bar is not None:
            self._bar.update(1)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            # The loss is known in logged updates only: reading it would make the host wait.
            self._write_line("")

    def show(self, record: dict[str, Any]) -> None:
        """Show the metrics of a logged update."""
        speed = f"{record[f'throughput_{self._unit}']:,.0f} {self._unit}/s"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {record['loss']:.3f}, {speed}")
        else:
            self._write_line(f"loss {record['loss']:.4f}, {speed}, ")

    def close(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def _write_line(self, metrics: str) -> None:
        now = time.monotonic()
        self._last_line = now
        made, left = self._update - self._first, self._total - self._update
        remaining = f"{duration(left * (now - self._start) / made)} left" if made else "started"
        logger.info(f"update {self._update:,} of {self._total:,}: {metrics}{remaining}")


def duration(seconds: float) -> str:
    """Return a time in its two largest units, such as `2 h 10 min`, `3 d 4 h` or `12 s`."""
    whole = round(seconds)
    parts: list[str] = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        count, whole = divmod(whole, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"
