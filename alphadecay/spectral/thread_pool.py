"""Independent tasks on threads of their own, of which none can hang or poison the others."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def run_tasks(tasks: list[Callable[[], T]], threads: int, timeout: float) -> list[T | Exception]:
    """Results of the tasks, in their order; for a task that raised, its exception; for one that took more than `timeout` seconds,
    a TimeoutError.

    LAPACK's solvers gain little from several cores on one matrix, so each task has one BLAS thread and `threads` of them run at a
    time; only where there are fewer tasks than threads do the tasks get several. A task that hangs cannot be ended: its thread, a
    daemon, is left behind and replaced.
    """
    before = torch.get_num_threads()
    threads, each = min(threads, len(tasks)), max(1, threads // max(1, len(tasks)))
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(tasks)):
        waiting.put(index)
    finished: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()
    started: dict[int, float] = {}

    def work() -> None:
        fresh = True
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            started[index] = time.monotonic()
            if fresh:
                torch.set_num_threads(
                    each
                )  # of this thread, and of threads that begin before the end
                fresh = False
            try:
                finished.put((index, tasks[index]()))
            except Exception as error:  # handed to the caller, who names the module
                finished.put((index, error))

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    results: dict[int, T | Exception] = {}
    try:
        while len(results) < len(tasks):
            with contextlib.suppress(queue.Empty):
                index, result = finished.get(timeout=min(1.0, timeout / 4))
                results.setdefault(index, result)
            for index, start in list(started.items()):
                if index not in results and time.monotonic() - start > timeout:
                    results[index] = TimeoutError(f"took more than {timeout:g} s")
                    threading.Thread(target=work, daemon=True).start()
    finally:
        torch.set_num_threads(before)
    return [results[index] for index in range(len(tasks))]
