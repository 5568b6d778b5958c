"""torchrun_main.py --parallel fsdp gives the results of DistributedDataParallel."""

import json

import pytest

from tests.end_to_end.common import FINAL, exact, read_lines, run

pytestmark = pytest.mark.slow
QUIET = {"WANDB_MODE": "disabled"}


@pytest.fixture(scope="module")
def sharded_run(inputs):
    """40 updates on 2 processes that share one copy of the model."""
    run(exact(inputs, "sharded", "--parallel", "fsdp"), environment=QUIET)
    return inputs / "sharded"


def same_numbers(folder, other):
    metrics = [
        {r["update_step"]: {} for r in read_lines(path / "metrics.jsonl")}
        for path in (folder, other)
    ]
    for of, path in zip(metrics, (folder, other), strict=True):
        for record in read_lines(path / "metrics.jsonl"):
            kept = (
                "loss",
                "eval_loss",
                "grad_norm",
                "weight_decay",
                "tokens_seen",
                "eval_tokens",
                "reference_perplexity",
            )
            of[record["update_step"]] |= {name: record[name] for name in kept if name in record}
    assert list(metrics[0]) == list(metrics[1]) == list(range(1, 41))
    for update, numbers in metrics[0].items():
        assert numbers == pytest.approx(metrics[1][update], rel=1e-5), update
    modules = [read_lines(path / "modules.jsonl") for path in (folder, other)]
    for a, b in zip(*modules, strict=True):
        assert [a[name] for name in ("step", "module", "type", "block")] == [
            b[name] for name in ("step", "module", "type", "block")
        ]
        assert [a["alpha"], a["weight_decay"]] == pytest.approx(
            [b["alpha"], b["weight_decay"]], rel=1e-5
        )


def test_losses_alphas_and_decays_are_those_of_ddp(sharded_run, straight_run):
    same_numbers(sharded_run, straight_run)
    files = [
        json.loads((folder / FINAL / "manifest.json").read_text())
        for folder in (sharded_run, straight_run)
    ]
    assert files[0].keys() == files[1].keys()
    assert json.loads((sharded_run / FINAL / "config.json").read_text()) == json.loads(
        (straight_run / FINAL / "config.json").read_text()
    )


def test_ddp_goes_on_from_its_checkpoint(inputs, sharded_run, straight_run):
    done = run(
        exact(inputs, "gathered", "--continue_from", sharded_run / "checkpoints/model_20"),
        environment=QUIET,
    )
    assert "will not be the one it continues" not in done.stderr
    same_numbers(inputs / "gathered", straight_run)
