"""The parts of the training loops."""

import gc

import pytest

from peft_pretraining.train.loop import without_garbage_collection


def collected_by_itself():
    """Whether 20,000 new lists make Python look for garbage."""
    runs = sum(generation["collections"] for generation in gc.get_stats())
    kept = [[] for _ in range(20_000)]
    return sum(generation["collections"] for generation in gc.get_stats()) > runs and len(kept) > 0


def test_the_collector_waits_to_be_called():
    assert collected_by_itself()
    with pytest.raises(KeyError):
        with without_garbage_collection():
            assert not collected_by_itself()
            assert gc.get_freeze_count() > 1_000
            cycle = []
            cycle.append(cycle)
            del cycle
            assert gc.collect() >= 1
            raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() == 0 and collected_by_itself()
