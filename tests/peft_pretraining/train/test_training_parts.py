"""Schedule, evaluation, optimizer, arguments and records, each alone."""

import json
import math
import resource

import pytest
import torch

from peft_pretraining.optim.gradients import clip_gradients, mean_decay
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.optim.schedule import lr_factor
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records import run_log
from peft_pretraining.records.jsonl import append_json
from peft_pretraining.records.run_dir import copy_records_up_to

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))

# ---------------------------------------------------------------------------------------------------------------- schedule


def test_cosine():
    factors = [lr_factor(u, "cosine", 100, 10, 0.1) for u in range(1, 101)]
    assert (
        factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[99] == pytest.approx(0.1)
    )
    assert factors[54] == pytest.approx(0.55)  # halfway
    assert all(a > b for a, b in zip(factors[9:], factors[10:], strict=False))


def test_linear():
    factors = [lr_factor(u, "linear", 100, 0, 0.0) for u in (1, 50, 100)]
    assert factors == pytest.approx([0.99, 0.5, 0.0])


def test_restarts():
    factors = [lr_factor(u, "cosine_restarts", 100, 10, 0.1, 30) for u in (11, 26, 40, 41, 71)]
    assert factors == pytest.approx(
        [1.0, 0.55, 0.1 + 0.9 * (1 + math.cos(math.pi * 29 / 30)) / 2, 1.0, 1.0]
    )


# --------------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_decay_is_not_rounded_away_in_bfloat16(name):
    """With lr * weight_decay far below bfloat16's resolution the fused kernel still lets the decay act on the moments'
    side (adam) or in float32 (adamw) beside the update."""
    plain, decayed = (
        [torch.nn.Parameter(torch.linspace(0.5, 2, 512).to(torch.bfloat16))] for _ in range(2)
    )
    for parameters, decay in ((plain, 0.0), (decayed, 0.1)):
        optimizer = build_optimizer(name, [{"params": parameters, "weight_decay": decay}], lr=1e-2)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            parameters[0].grad = torch.randn(512, generator=generator).to(torch.bfloat16)
            optimizer.step()
    assert float(decayed[0].detach().float().norm()) < float(plain[0].detach().float().norm())


@pytest.mark.parametrize("name, after", [("adam", 1.99), ("adamw", 1.998)])
def test_adam_is_coupled_and_adamw_is_not(name, after):
    """No gradient, a decay of 0.1: Adam takes it for a gradient and makes a whole step of lr, AdamW shrinks by lr * 0.1."""
    parameter = torch.nn.Parameter(torch.full((4,), 2.0))
    parameter.grad = torch.zeros(4)
    build_optimizer(name, [{"params": [parameter], "weight_decay": 0.1}], lr=0.01).step()
    assert parameter.tolist() == pytest.approx([after] * 4, rel=1e-6)


def test_clipping_and_the_mean_decay():
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.zeros(2))
    model.p.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients(model, 0.0)) == 5 and model.p.grad.tolist() == [3, 4]
    assert float(clip_gradients(model, 1.0)) == 5
    assert model.p.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-4)
    groups = [
        {"params": [torch.zeros(n, requires_grad=True)], "weight_decay": d}
        for n, d in ((1, 1.0), (3, 5.0))
    ]
    assert mean_decay(torch.optim.SGD(groups)) == 4.0


# ----------------------------------------------------------------------------------------------------------------- records


def test_records_know_no_nan(tmp_path):
    append_json(tmp_path / "metrics.jsonl", [{"loss": math.nan, "perplexity": math.inf, "lr": 0.5}])
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"loss": null, "perplexity": null, "lr": 0.5}\n'


def test_records_are_cut_at_the_checkpoint(tmp_path):
    (tmp_path / "a").mkdir()
    append_json(tmp_path / "a/metrics.jsonl", [{"update_step": i} for i in range(6)])
    append_json(tmp_path / "a/modules.jsonl", [{"step": i} for i in (0, 3, 6)])
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"update_step": 2')  # torn
    copy_records_up_to(tmp_path / "a", tmp_path / "b", 3)
    assert [
        json.loads(x)["update_step"]
        for x in (tmp_path / "b/metrics.jsonl").read_text().splitlines()
    ] == [0, 1, 2, 3]
    assert [
        json.loads(x)["step"] for x in (tmp_path / "b/modules.jsonl").read_text().splitlines()
    ] == [0, 3]


def test_a_full_disk_costs_records_and_one_warning(tmp_path, monkeypatch):
    """No line is torn, so that those which come when there is room again are whole."""
    from loguru import logger

    warnings = []
    sink = logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING")
    monkeypatch.setattr(run_log, "start_wandb", lambda *arguments: None)
    log = run_log.RunLog(tmp_path, ALONE, {"name": "a"}, "a", [])
    log.metrics({"update_step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (30, limits[1])
    )  # bytes a file may have: half a second line
    try:
        log.metrics({"update_step": 2})
        log.modules([{"step": 2, "module": "a" * 30, "alpha": None, "weight_decay": None}])
        log.finish({})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        logger.remove(sink)
    log.metrics({"update_step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"update_step": 1}\n{"update_step": 3}\n'
    assert json.loads((tmp_path / "run.json").read_text())["name"] == "a"
    assert len(warnings) == 1 and "metrics.jsonl cannot be written (File too large)" in warnings[0]


class FakeWandb:
    def __init__(self):
        self.lines = []

    def log(self, line):
        self.lines.append(line)


def test_wandb_gets_the_published_names(tmp_path, monkeypatch):
    """Means over the blocks of each projection, and the last evaluation, as the published runs call them; without a project nothing."""
    fake = FakeWandb()
    monkeypatch.setattr(run_log, "start_wandb", lambda *arguments: fake)
    types = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    rows = [
        {
            "step": 5,
            "module": f"{block}.{kind}",
            "type": kind,
            "alpha": 2.0 + block,
            "weight_decay": 0.1,
        }
        for block in (0, 1)
        for kind in types
    ]
    rows[0]["alpha"] = None  # undefined: it counts for nothing
    for project in ("alphadecay", None):
        log = run_log.RunLog(tmp_path, ALONE, {"name": "a"}, "a", [], project)
        log.modules(rows)
        log.metrics({"update_step": 5, "eval_loss": 3.0, "eval_tokens": 7, "final": False})
        log.metrics({"update_step": 6, "eval_loss": 2.0, "eval_tokens": 7, "final": True})
    modules, during, last = fake.lines
    assert {name: value for name, value in modules.items() if "/" not in name} == {
        "update_step": 5,
        "alpha_Q": 3.0,
    } | {f"alpha_{name}": 2.5 for name in ("K", "V", "O", "MLPgate", "MLPup", "MLPdown")}
    assert (
        modules["alpha/1.q_proj"] == 3.0
        and modules["weight_decay/0.q_proj"] == 0.1
        and "alpha/0.q_proj" not in modules
    )
    assert "final_eval_loss" not in during and (
        last["final_eval_loss"],
        last["final_eval_tokens"],
    ) == (2.0, 7)
