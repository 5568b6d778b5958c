"""A process that reads data and is killed gives one sentence, however torch notices it."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from peft_pretraining.data.workers import ReaderStart, iterate_loader
from peft_pretraining.errors import UserError


class Loader:
    """Like a DataLoader: its iterator knows its workers, and fails with the given error."""

    def __init__(self, error, killed):
        self.error, self.killed = error, killed

    def __iter__(self):
        return Items(self.error, self.killed)


class Items:
    def __init__(self, error, killed):
        self.error = error
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        worker.daemon = True
        worker.start()
        self._workers = [worker]
        if killed:
            os.kill(worker.pid, signal.SIGKILL)

    def __iter__(self):
        return self

    def __next__(self):
        raise self.error

    def __del__(self):
        self._workers[0].kill()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
        FileNotFoundError(2, "No such file"),
    ],
)
def test_a_killed_worker_is_one_sentence(error):
    with pytest.raises(UserError, match=r"reads the text was killed \(process \d+, exit code -9\)"):
        next(iterate_loader(Loader(error, killed=True), "text", "--workers"))


def test_another_error_is_not_blamed_on_a_worker():
    with pytest.raises(KeyError):
        next(iterate_loader(Loader(KeyError("a"), killed=False), "text", "--workers"))


class FullSharedMemory(torch.utils.data.Dataset):
    """Its reader cannot make a file in shared memory."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return torch.zeros(4000)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_that_cannot_hand_over_a_batch_is_not_waited_for(method):
    """Before, the training waited for ever."""
    loader = torch.utils.data.DataLoader(
        FullSharedMemory(),
        batch_size=None,
        num_workers=1,
        worker_init_fn=ReaderStart(),
        multiprocessing_context=method,
    )
    with pytest.raises(UserError, match=r"exit code 1\), most often because memory or shared mem"):
        next(iterate_loader(loader, "text", "--workers"))


class ProcessNumbers(torch.utils.data.Dataset):
    """Yields the number of the process that reads it."""

    def __len__(self):
        return 400

    def __getitem__(self, index):
        return os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_signals_to_the_whole_run_do_not_end_readers(method):
    """Before, an evaluation failed when a batch system ended the run."""
    loader = torch.utils.data.DataLoader(
        ProcessNumbers(),
        batch_size=None,
        num_workers=1,
        worker_init_fn=ReaderStart(),
        multiprocessing_context=method,
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    items = iterate_loader(loader, "text", "--workers")
    reader = next(items)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        # The sender is another process, as torchrun is: a reader obeys its parent.
        sender = [sys.executable, "-c", f"import os, signal; os.kill({reader}, signal.{name})"]
        subprocess.run(sender, check=True)
    assert set(items) == {reader}


def test_a_reader_ends_when_its_parent_asks_for_it():
    start = ReaderStart()
    context = multiprocessing.get_context("fork")
    reader = context.Process(target=lambda: (start(), time.sleep(600)), daemon=True)
    reader.start()
    time.sleep(0.2)
    reader.terminate()
    reader.join(timeout=10)
    assert reader.exitcode is not None
