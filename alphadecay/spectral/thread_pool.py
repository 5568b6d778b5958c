"""Run independent tasks on threads, with a timeout for each task."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def run_tasks(
    tasks: Sequence[Callable[[], T]], threads: int, timeout: float
) -> list[T | Exception]:
    """Run tasks on threads and return their results.

    LAPACK's solvers gain little from several cores on one matrix. So each task uses one BLAS
    thread, and `threads` tasks run at a time. If there are fewer tasks than threads, each task uses
    several. A task that hangs cannot be ended: its thread, a daemon, is abandoned and replaced.

    Args:
        tasks: functions without arguments that do not depend on each other.
        threads: number of threads.
        timeout: seconds that one task may take.

    Returns:
        The results in the order of the tasks. A task that raised gives its exception, a task that
        took too long a TimeoutError.
    """
    before = torch.get_num_threads()
    threads, threads_per_task = min(threads, len(tasks)), max(1, threads // max(1, len(tasks)))
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(tasks)):
        waiting.put(index)
    finished: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()
    started: dict[int, float] = {}

    def work() -> None:
        first_task = True
        while True:
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            started[index] = time.monotonic()
            if first_task:
                # Applies to this thread, and to every thread that starts before it is reset below.
                torch.set_num_threads(threads_per_task)
                first_task = False
            try:
                finished.put((index, tasks[index]()))
            except Exception as error:  # returned to the caller, who knows what the task is
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
