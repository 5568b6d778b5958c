"""--profile: the trace of a few updates."""

import gc
import gzip
import itertools
import json

import torch

from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train.profiler import profiled

CPU = torch.device("cpu")
ALONE, SECOND = DistributedContext(0, 0, 1, CPU), DistributedContext(1, 1, 2, CPU)


def products(updates):
    """What a loop does: a product of as many rows as the update's number."""
    for update in updates:
        with torch.profiler.record_function(f"update {update}"):
            torch.ones(update, 8) @ torch.ones(8, 8)
        yield update


def test_a_profile_holds_the_4th_to_6th_update(tmp_path):
    updates = range(21, 31)
    assert list(products(profiled(updates, True, tmp_path, ALONE))) == list(updates)
    trace = json.loads(gzip.open(tmp_path / "profile/rank0.json.gz").read())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert [f"update {i}" for i in updates if f"update {i}" in names] == [
        "update 24",
        "update 25",
        "update 26",
    ]
    assert "aten::mm" in names


def test_a_run_that_ends_early_leaves_what_was_profiled(tmp_path):
    loop = products(profiled(range(1, 100), True, tmp_path, ALONE))
    assert list(itertools.islice(loop, 5)) == [1, 2, 3, 4, 5]
    loop.close()
    gc.collect()
    assert b"update 4" in gzip.open(tmp_path / "profile/rank0.json.gz").read()


def test_no_profile_where_none_is_wanted(tmp_path):
    updates = range(3)
    assert profiled(updates, False, tmp_path, ALONE) is updates
    assert profiled(updates, True, tmp_path, SECOND) is updates  # rank 0 speaks for all


def test_a_profile_that_cannot_be_written_does_not_end_the_training(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    assert list(profiled(range(8), True, tmp_path, ALONE)) == list(range(8))
