"""The picture of the README is drawn from a run folder."""

import json
import runpy
import sys

import pytest
import torch

import alphadecay
from tests.docs.pages import ROOT


@pytest.fixture
def draw(monkeypatch):
    """Return a function that runs the script in this process and returns its exit code."""

    def run_script(run, output):
        words = ["readme_figure.py", str(run), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts/readme_figure.py"), run_name="__main__")
        return end.value.code

    return run_script


def write_run(folder, rows):
    folder.mkdir()
    metrics = {"update_step": 1, "loss": 1.0}
    (folder / "run.json").write_text(json.dumps({"arguments": {"weight_decay": 0.1}}))
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (folder / "modules.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def history():
    """The records of two analyses."""
    torch.manual_seed(0)
    layers = {name: torch.nn.Linear(64, 64) for name in ("first", "q_proj", "k_proj", "last")}
    model = torch.nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    decay = alphadecay.AlphaDecay(model, 0.1, every=1)
    decay.step(torch.optim.AdamW(decay.param_groups()))
    return decay.history


def test_two_themes_are_drawn_and_always_alike(draw, history, tmp_path):
    run = write_run(tmp_path / "run", history)
    pictures = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert draw(run, folder) == 0
        names = sorted(path.name for path in folder.iterdir())
        assert names == ["alphas_and_decays_dark.svg", "alphas_and_decays_light.svg"]
        pictures.append([(folder / name).read_bytes() for name in names])
    assert pictures[0] == pictures[1]
    dark, light = (picture.decode() for picture in pictures[0])
    assert "#d1d7e0" in dark and "#d1d7e0" not in light and "#1f2328" in light
    assert "<text" not in light  # letters are outlines
    for name in ("q_proj", "k_proj"):
        assert f"<!-- {name} -->" in light


def test_a_run_without_alphas_is_refused(draw, tmp_path, capsys):
    assert draw(write_run(tmp_path / "run", []), tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "alphadecay" in message and message.count("\n") == 1
