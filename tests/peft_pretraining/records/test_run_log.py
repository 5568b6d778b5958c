"""RunLog: what is recorded where, and a full disk."""

import json
import platform
import resource

import pytest
import torch
from loguru import logger

from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records import run_log
from peft_pretraining.records.run_log import RunLog

SINGLE_PROCESS = DistributedContext(0, 0, 1, torch.device("cpu"))


class FakeWandb:
    def __init__(self):
        self.records = []
        self.finished = False

    def log(self, record):
        self.records.append(record)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setattr(run_log, "start_wandb", lambda *arguments: fake)
    return fake


def test_a_full_disk_costs_records_and_one_warning(tmp_path, fake_wandb):
    """No line is incomplete, so lines that are written when there is room again are valid."""
    warnings = []
    sink = logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING")
    log = RunLog(tmp_path, SINGLE_PROCESS, {"name": "a"}, "a", [])
    log.metrics({"update_step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Bytes that a file may have: half of the second line fits.
    resource.setrlimit(resource.RLIMIT_FSIZE, (30, limits[1]))
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


@pytest.mark.parametrize("broken", ["log", "finish"])
def test_a_broken_wandb_costs_its_records_and_one_warning(tmp_path, fake_wandb, broken):
    """For instance because its helper process was killed."""
    warnings = []
    sink = logger.add(lambda message: warnings.append(message.record["message"]), level="WARNING")

    def fail(*_):
        raise ConnectionResetError("connection lost")

    setattr(fake_wandb, broken, fail)
    log = RunLog(tmp_path, SINGLE_PROCESS, {"name": "a"}, "a", [])
    for update in (1, 2):
        log.metrics({"update_step": update})
    log.finish({})
    logger.remove(sink)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"update_step": 1}\n{"update_step": 2}\n'
    assert warnings == [
        "W&B failed (ConnectionResetError: connection lost): its records go on in the run folder "
        "only, training goes on"
    ]


def test_a_broken_start_of_wandb_and_a_broken_terminal(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no home folder")

    monkeypatch.setattr(run_log, "start_wandb", fail)
    monkeypatch.setattr(run_log.Progress, "advance", fail)
    log = RunLog(tmp_path, SINGLE_PROCESS, {"name": "a"}, "a", [])
    log.start_progress(10, 0)
    log.advance()
    log.advance()
    log.finish({})
    assert (tmp_path / "run.json").exists()


def test_run_json(tmp_path, fake_wandb):
    """It is written at the start, and again with the summary at the end."""
    log = RunLog(tmp_path, SINGLE_PROCESS, {"name": "a", "arguments": {"lr": 0.1}}, "a", [])
    start = json.loads((tmp_path / "run.json").read_text())
    assert start["pieces"][0]["first_update"] == 1 and len(start["pieces"]) == 1
    assert start["arguments"] == {"lr": 0.1} and start["processes"] == 1
    assert start["versions"]["python"] == platform.python_version()
    log.finish({"train_seconds": 2.5})
    assert json.loads((tmp_path / "run.json").read_text()) == start | {
        "summary": {"train_seconds": 2.5}
    }
    assert fake_wandb.finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json"]


def test_other_ranks_write_nothing(tmp_path, fake_wandb):
    log = RunLog(tmp_path, DistributedContext(1, 1, 2, torch.device("cpu")), {}, "a", [])
    log.start_progress(10, 0)
    log.advance()
    log.metrics({"update_step": 1, "loss": 1.0})
    log.modules([{"step": 2, "module": "a", "alpha": None, "weight_decay": None}])
    log.finish({})
    assert list(tmp_path.iterdir()) == [] and fake_wandb.records == []


def test_wandb_gets_the_published_names(tmp_path, fake_wandb):
    """W&B gets mean alphas and the last evaluation under the names of the published runs.

    Without a project it gets nothing.
    """
    types = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    records = [
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
    records[0]["alpha"] = None  # undefined, so it does not count in the mean
    for project in ("alphadecay", None):
        log = RunLog(tmp_path, SINGLE_PROCESS, {"name": "a"}, "a", [], project)
        log.modules(records)
        log.metrics({"update_step": 5, "eval_loss": 3.0, "eval_tokens": 7, "final": False})
        log.metrics({"update_step": 6, "eval_loss": 2.0, "eval_tokens": 7, "final": True})
    modules, during, last = fake_wandb.records
    assert {name: value for name, value in modules.items() if "/" not in name} == {
        "update_step": 5,
        "alpha_Q": 3.0,
    } | {f"alpha_{name}": 2.5 for name in ("K", "V", "O", "MLPgate", "MLPup", "MLPdown")}
    assert modules["alpha/1.q_proj"] == 3.0 and modules["weight_decay/0.q_proj"] == 0.1
    assert "alpha/0.q_proj" not in modules
    assert "final_eval_loss" not in during
    assert (last["final_eval_loss"], last["final_eval_tokens"]) == (2.0, 7)


def run_json(folder):
    return json.loads((folder / "run.json").read_text())


def test_a_continued_run_is_the_same_run_in_wandb(tmp_path, monkeypatch):
    """It keeps its identifier, unless it goes to another project or starts from scratch."""
    ids = []
    monkeypatch.setattr(run_log, "start_wandb", lambda *arguments: ids.append(arguments[-1]))
    RunLog(tmp_path, SINGLE_PROCESS, {}, "a", [])
    RunLog(tmp_path, SINGLE_PROCESS, {}, "a", [], done=10, source=tmp_path)
    assert ids[0] == ids[1] == run_json(tmp_path)["wandb"]["id"]
    RunLog(tmp_path, SINGLE_PROCESS, {}, "a", [], "other", done=10, source=tmp_path)
    RunLog(tmp_path, SINGLE_PROCESS, {}, "a", [], "other")
    (tmp_path / "new").mkdir()
    RunLog(tmp_path / "new", SINGLE_PROCESS, {}, "a", [], "other", done=10, source=tmp_path)
    assert len(set(ids)) == 4 and len(ids) == 5


def test_run_json_keeps_the_processes_that_made_the_run(tmp_path, fake_wandb):
    """A process whose updates were all made again is no part of the run."""
    for done in (0, 10, 20, 10):
        RunLog(tmp_path, SINGLE_PROCESS, {"name": "a"}, "a", [], done=done, source=tmp_path)
    pieces = run_json(tmp_path)["pieces"]
    assert [piece["first_update"] for piece in pieces] == [1, 11]
    assert all(piece["versions"]["torch"] for piece in pieces)


def test_a_damaged_run_json_does_not_stop_a_run(tmp_path, fake_wandb):
    (tmp_path / "run.json").write_text("{")
    RunLog(tmp_path, SINGLE_PROCESS, {"name": "a"}, "a", [], done=10, source=tmp_path)
    assert [piece["first_update"] for piece in run_json(tmp_path)["pieces"]] == [11]


def test_a_continued_run_knows_where_the_time_went(tmp_path, fake_wandb):
    """Totals after the checkpoint belong to updates that are made again."""
    log = RunLog(tmp_path, SINGLE_PROCESS, {}, "a", [])
    assert log.earlier_totals is None
    log.checkpoint(5, {"seconds": 1.0})
    log.checkpoint(10, {"seconds": 2.0})
    log = RunLog(tmp_path, SINGLE_PROCESS, {}, "a", [], done=5, source=tmp_path)
    assert log.earlier_totals == {"seconds": 1.0}
    assert run_json(tmp_path)["totals"] == {"5": {"seconds": 1.0}}
    log = RunLog(tmp_path, SINGLE_PROCESS, {}, "a", [], done=7, source=tmp_path)
    assert log.earlier_totals is None  # by an earlier version
