"""Graceful shutdown: SIGTERM and SIGUSR1, and restarts by torchrun."""

import os
import signal
import time
from types import FrameType

# Slurm, Kubernetes and torchrun send these before a time limit or a preemption.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A cluster signals the whole process group, and torchrun then forwards the signal to its workers,
# which have received it already. Within this time a second signal is taken for such a duplicate.
DUPLICATE_SIGNAL_SECONDS = 1.0


class StopRequest:
    """Records that a signal asked this process to stop after the current update.

    A second signal, more than a second later, ends the process at once.

    Attributes:
        signal: the signal, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received_at = 0.0
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._received_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._received_at > DUPLICATE_SIGNAL_SECONDS:
            # sys.exit would wait for the threads that write a checkpoint.
            os._exit(128 + number)


def was_restarted() -> bool:
    """Return True if torchrun started this process again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
