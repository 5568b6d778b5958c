"""Being told to stop: the signals of a cluster, and torchrun's restarts."""

import os
import signal
import time

SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
)  # preemption and time limits: Slurm, Kubernetes, torchrun
DUPLICATE_SIGNAL_SECONDS = 1.0  # seconds: a whole process group is signalled, and torchrun then passes on to its workers what they have had already


class StopRequest:
    """SIGTERM or SIGUSR1 asks for the end after the current update; a second one, more than a second later, ends the process at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._first = 0.0
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._first > DUPLICATE_SIGNAL_SECONDS:
            os._exit(128 + number)  # not sys.exit, which would wait for threads


def was_restarted() -> bool:
    """Whether torchrun started this process again after a failure (`torchrun --max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
