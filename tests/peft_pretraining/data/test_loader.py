"""The thread that reads the next step of the data."""

import itertools
import threading

import pytest

from peft_pretraining.data.loader import _prefetch
from peft_pretraining.errors import UserError


def test_the_next_step_is_read_while_one_is_used():
    """A thread reads one step ahead and no further, in the same order, and ends with the loop."""
    made, threads = [], set()
    second = threading.Event()

    def source():
        for i in itertools.count():
            made.append(i)
            threads.add(threading.current_thread())
            if i == 1:
                second.set()
            yield i

    steps = _prefetch(source(), on_gpu=False)
    assert next(steps) == 0
    assert second.wait(10)  # nobody asked for it yet
    assert [next(steps) for _ in range(5)] == [1, 2, 3, 4, 5]
    steps.close()
    assert made in (list(range(6)), list(range(7)))
    assert threading.current_thread() not in threads and not any(
        thread.is_alive() for thread in threads
    )


def test_an_error_of_the_data_comes_in_place_of_its_step():
    def source():
        yield from (0, 1)
        raise UserError("a damaged block")

    steps = _prefetch(source(), on_gpu=False)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(UserError, match="a damaged block"):
        next(steps)
