"""Graceful shutdown: signals, a launcher that has ended, and restarts by torchrun."""

import os
import signal
import time
from types import FrameType

from peft_pretraining.constants import STOP_SIGNALS

# A cluster signals the whole process group, and torchrun then forwards the signal to its workers,
# which have received it already. Within this time a second signal is taken for such a duplicate.
DUPLICATE_SIGNAL_SECONDS = 1.0
LAUNCHER_ENDED = "torchrun has ended"


class StopRequest:
    """Records that something asked this process to stop after the current update.

    A second signal, more than a second later, ends the process at once. A signal that is ignored
    when the training begins, such as SIGHUP under nohup, stays ignored.

    Args:
        launcher: process number of the torchrun that started this process. If it ends, nobody would
            restart the run or end it, and the run would keep its folder locked. None: there is
            none.

    Attributes:
        signal: the signal, or None.
    """

    def __init__(self, launcher: int | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._launcher = launcher
        self._received_at = 0.0
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)

    @property
    def reason(self) -> str | None:
        """Why this process should stop: the name of a signal or LAUNCHER_ENDED; None: go on."""
        # Asked first: the end of the launcher also sends SIGTERM, see `terminate_with`.
        if self._launcher is not None and os.getppid() != self._launcher:
            return LAUNCHER_ENDED
        return None if self.signal is None else self.signal.name

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._received_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._received_at > DUPLICATE_SIGNAL_SECONDS:
            # sys.exit would wait for the threads that write a checkpoint.
            os._exit(128 + number)


def was_restarted() -> bool:
    """Return True if torchrun, or its launcher, started this process again after a failure.

    torchrun counts its restarts after the death of a process (--max-restarts), and
    scripts/cluster/relaunch.py its own after the loss of a node.
    """
    counts = ("TORCHELASTIC_RESTART_COUNT", "ALPHADECAY_RESTARTS")
    return any(int(os.environ.get(name, 0)) > 0 for name in counts)
