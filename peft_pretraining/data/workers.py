"""Iterate over a DataLoader, with a clear error when a worker process is killed."""

from __future__ import annotations

import contextlib
import multiprocessing.queues
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft_pretraining.constants import STOP_SIGNALS
from peft_pretraining.errors import UserError
from peft_pretraining.utils.child import EndWithParent

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

SECONDS_FOR_EXIT_CODE = 0.2


class ReaderStart(EndWithParent):
    """The `worker_init_fn` of a DataLoader: ends the reader with its parent, and if it fails.

    A reader that cannot hand over a batch, because shared memory (/dev/shm) is full for example,
    would only print a traceback, and the training would wait for that batch for ever.

    A signal that asks the run to stop does not end the reader: its parent finishes the update or
    the evaluation, for which it needs the data, and ends the reader itself.
    """

    def __call__(self, *_: object) -> None:
        """Prepare this process, if it is a reader."""
        super().__call__()
        if os.getpid() == self.parent:
            return
        queue: Any = multiprocessing.queues.Queue
        queue._on_queue_feeder_error = staticmethod(_end_reader)
        if hasattr(signal, "sigwaitinfo"):  # not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            threading.Thread(target=self._obey_parent, name="signals", daemon=True).start()

    def _obey_parent(self) -> None:
        """End this process if its parent sends a signal, and ignore those of other processes."""
        while signal.sigwaitinfo(STOP_SIGNALS).si_pid != self.parent:
            pass
        os._exit(0)


def _end_reader(error: Exception, batch: object) -> None:
    """End this process, because it could not hand over a batch."""
    try:
        traceback.print_exception(error)
    finally:  # the disk of the log may be full, too
        os._exit(1)


def iterate_loader(loader: DataLoader, what: str, flag: str) -> Iterator:
    """Yield the items of a DataLoader.

    Args:
        loader: The DataLoader.
        what: What its workers read, for the error message.
        flag: The command-line flag that sets the number of workers, for the error message.

    Raises:
        UserError: A worker process was killed.
    """
    with _preserve_sigchld_handler(), _signals_blocked():
        items = iter(loader)
    try:
        yield from items
    except Exception as error:
        # torch notices a dead worker in many ways: by its own check, by a connection that is reset
        # or at its end, or by a message that is cut off.
        dead = _first_dead_worker(items)
        if dead is None:
            raise
        raise UserError(
            f"A process that reads the {what} was killed ({dead}), most often because memory or "
            f"shared memory (/dev/shm) ran out; give fewer {flag}, or more memory, and continue "
            "from the last checkpoint."
        ) from error


def _first_dead_worker(items: object) -> str | None:
    """Return which worker of a DataLoader's iterator was killed; None if all live or ended well."""
    for worker in getattr(items, "_workers", ()):
        # What it was killed by is known a moment after its connection broke.
        worker.join(timeout=SECONDS_FOR_EXIT_CODE)
        if worker.exitcode:
            return f"process {worker.pid}, exit code {worker.exitcode}"
    return None


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals to the run while readers are started, which inherit that.

    Otherwise a signal would end a reader that still imports torch.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _preserve_sigchld_handler() -> Iterator[None]:
    """Restore the SIGCHLD handler that torch replaces when it starts workers.

    torch's handler raises an error at any point of the main thread as soon as a worker dies.
    Without it the same error is raised when the next item is requested.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may set signal handlers; torch does not set one here either.
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
