"""Sharded training, compared with DistributedDataParallel on 4 ranks, part by part.

The model has two copies, each sharded over two ranks. end_to_end/test_fsdp.py runs the whole
script on 2 ranks.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.common import ROOT, write_config

pytestmark = pytest.mark.slow
RANKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    write_config(folder, vocab_size=101)  # odd sizes: the last rank has fewer rows
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={RANKS}",
        "tests/support/ranks/fsdp.py",
        folder,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, start)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What each rank saw."""
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("setting", ["gradnorm", "asynchronous", "awd", "adadecay", "transformers"])
def test_every_method_gives_the_same_numbers(results, setting):
    """Losses, gradient norms, decays and last weights are those of DistributedDataParallel."""
    assert all(rank["methods"][setting] == results[0]["methods"][setting] for rank in results)
    found = results[0]["methods"][setting]
    plain, sharded = found["numbers"]
    assert len({tuple(numbers) for numbers in plain}) == 4
    for a, b in zip(plain, sharded, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert found["decays"][1] == pytest.approx(found["decays"][0], rel=1e-5)
    assert (
        found["furthest"] < 1e-4
    )  # Adam's step of an element whose gradient is nearly 0 is rounding alone: a few percent of lr


def test_a_checkpoint_goes_on_either_way(results):
    found = results[0]["interchange"]
    for saved in ("ddp", "fsdp"):
        for a, b in zip(
            found[f"{saved}, continued otherwise"], found[f"{saved}, straight"], strict=True
        ):
            assert a == pytest.approx(b, rel=1e-5)


def test_its_checkpoint_is_the_same(folder):
    """Names, whole shapes and types: nothing tells how it was trained."""
    plain, sharded = (folder / name / "checkpoints/model_3" for name in ("ddp", "fsdp"))
    assert (
        json.loads((plain / "manifest.json").read_text()).keys()
        == json.loads((sharded / "manifest.json").read_text()).keys()
    )
    weights = [load_file(place / "model.safetensors") for place in (plain, sharded)]
    states = [
        torch.load(place / "training_state/optimizer.pt", weights_only=True)
        for place in (plain, sharded)
    ]
    assert (
        list(states[0]) == list(states[1])
        and weights[0].keys() == weights[1].keys() == states[0].keys()
    )
    for name, weight in weights[0].items():
        assert list(states[0][name]) == list(states[1][name]) == ["step", "exp_avg", "exp_avg_sq"]
        for a, b in (
            (weight, weights[1][name]),
            *zip(states[0][name].values(), states[1][name].values(), strict=True),
        ):
            assert type(b) is torch.Tensor and (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("rows", [5, 1])
def test_an_evaluation_counts_every_row_once(results, rows):
    """This holds for ranks with different numbers of batches, and parameters are sharded again."""
    for rank in results:
        *plain, _ = rank["evaluation"][f"{rows} ddp"]
        *sharded, whole = rank["evaluation"][f"{rows} fsdp"]
        assert sharded == pytest.approx(plain, rel=1e-6) and plain[-1] == rows * 15
        assert whole == []


def test_what_is_not_finite_on_one_rank_is_applied_on_none(results):
    for rank in results:
        found = rank["not finite"]
        assert found["same"] and found["moved"] and found["skipped"] == 0
    said = results[0]["not finite"]["messages"]
    assert [re.search(r"not finite on (.*?);", text)[1] for text in said] == ["rank 3", "rank 1"]
