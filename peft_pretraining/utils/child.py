"""Child processes that end when their parent ends, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux, <sys/prctl.h>
SECONDS_BETWEEN_LOOKS = 1.0


class EndWithParent:
    """Ends the child process that it is given to when the process that made it ends.

    It is given as an argument of the child's function. A spawned child is tied to its parent when
    it unpickles its arguments, before it does anything else; a forked child when it calls the
    object. If the parent has ended already, the child ends at once: such a child would take
    process 1 for its parent, and would never notice.
    """

    def __init__(self) -> None:
        self.parent = os.getpid()
        # Linux signals the child when the *thread* that started it ends.
        self.by_signal = threading.current_thread() is threading.main_thread()

    def __getstate__(self) -> dict[str, Any]:
        return {"parent": self.parent, "by_signal": self.by_signal}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self()

    def __call__(self, *_: object) -> None:
        """Tie this process to its parent. Does nothing in the parent itself."""
        if os.getpid() == self.parent:
            return
        if not (self.by_signal and _signal_after_parent(signal.SIGKILL)):
            threading.Thread(target=self._watch, name="end with parent", daemon=True).start()
        self._exit_if_orphan()

    def _watch(self) -> None:
        while True:
            self._exit_if_orphan()
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _exit_if_orphan(self) -> None:
        if os.getppid() != self.parent:
            os._exit(1)


def terminate_with(launcher: int) -> None:
    """Send SIGTERM to this process when the process that started it ends.

    SIGTERM ends a process that is still setting up, for instance one that waits for other ranks
    that nobody will start any more. A training takes it as a request to save and stop.

    Args:
        launcher: number of the process that started this one. If it has ended already, the signal
            is sent at once.
    """
    _signal_after_parent(signal.SIGTERM)
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGTERM)


def _signal_after_parent(number: signal.Signals) -> bool:
    """Ask the system to send a signal when the parent ends; False if it cannot do that."""
    if sys.platform != "linux":
        return False
    return ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) == 0
