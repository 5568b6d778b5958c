"""What processes of torch's DataLoader read, and how their end is told."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import torch

from peft_pretraining.errors import UserError


def loaded(loader: torch.utils.data.DataLoader, what: str, flag: str) -> Iterator:
    """The items of a DataLoader. UserError where a worker is killed. what: what workers read; flag: sets their number."""
    with _child_signal_as_it_was():
        items = iter(loader)
    try:
        yield from items
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise UserError(
            f"A process that reads the {what} was killed ({error}), most often because memory ran out; "
            f"give fewer {flag}, or more memory, and continue from the last checkpoint."
        ) from error


@contextlib.contextmanager
def _child_signal_as_it_was() -> Iterator[None]:
    """Undoes that torch raises an error wherever the main thread is when a worker dies: it is found out when data is asked for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
