"""A new key space in the store, although an earlier attempt has left its keys there."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from peft_pretraining.parallel.rendezvous import HungRank, new_store_namespace


def attempt(store, world_size=3):
    """Let all ranks ask for a key space at the same time; rank 0 arrives last."""
    found = {}

    def ask(rank):
        found[rank] = new_store_namespace(store, rank, world_size, timedelta(minutes=1))

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(1, world_size)]
    for thread in threads:
        thread.start()
    ask(0)
    for thread in threads:
        thread.join(timeout=30)
    return found


def test_all_ranks_get_the_same_key_space_and_every_attempt_a_new_one():
    store = dist.HashStore()
    for _ in range(3):
        found = attempt(store)
        assert not found[1].check(["address"])  # what a previous attempt wrote is not there
        found[0].set("address", "1.2.3.4")
        assert [found[rank].get("address") for rank in (1, 2)] == [b"1.2.3.4"] * 2


def test_a_rank_that_does_not_arrive():
    """The question of a previous attempt does not count as an arrival."""
    store = dist.HashStore()
    store.set("asks 1", "the id of a process that has ended")
    with pytest.raises(HungRank, match="rank 1 did not arrive"):
        new_store_namespace(store, 0, 2, timedelta(seconds=0.05))
