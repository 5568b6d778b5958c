"""The paper's figures show the numbers of the runs, and say what they cannot show."""

import hashlib
import json
import sys

import matplotlib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from alphadecay import eigenvalues, fit_power_law
from alphadecay.cli.presets import METHOD_PRESETS
from peft_pretraining.errors import UserError
from peft_pretraining.records import reader as report
from peft_pretraining.report import plots
from scripts.paper import drawing, figures
from tests.support.run_folders import (
    ETA,
    LLAMA_TYPES,
    evaluation,
    history,
    llama_modules,
    write_run,
)

ORDER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FLAGS = (
    "use_modulewise_wd",
    "use_AWD_NeurIPS2023",
    "use_AdaDecay",
    "one_shot",
    "shuffle_decays",
    "type_constant",
    "iso_budget",
    "adamc",
    "cautious_decay",
)


@pytest.fixture(autouse=True)
def paper_style():
    """Figures drawn without the command look as the command draws them."""
    with matplotlib.rc_context(drawing.style()):
        yield


def run_of(
    folder,
    method="alphadecay",
    optimizer="adam",
    eta=ETA,
    seed=5,
    loss=3.5,
    final=True,
    blocks=3,
    **result,
):
    """A finished run; module-wise ones have analyses before and after 100 updates."""
    modules = (
        history(llama_modules(blocks), [0, 100], 100, seed=seed) if method == "alphadecay" else []
    )
    for line in modules:
        line["weight_decay"] *= eta / ETA
    arguments = {
        **dict.fromkeys(FLAGS, False),
        "optimizer": optimizer,
        "weight_decay": eta,
        **METHOD_PRESETS[method],
        "method": method,
        "seed": seed,
    }
    lines = [{"update_step": 50, "loss": 4.0}, evaluation(100, loss, final) | result]
    return write_run(folder, f"{method}-{optimizer}-{eta:g}-{seed}", lines, modules, arguments)


def read(*folders):
    return [report.read_run(folder) for folder in folders]


def add_checkpoint(run, weights, step=100):
    """A checkpoint of these weights that counts as whole."""
    folder = run / "checkpoints" / f"model_{step}"
    (folder / "training_state").mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    for name in (
        "config.json",
        "training_state/trainer.json",
        "training_state/optimizer.pt",
        "training_state/random_0.pt",
    ):
        (folder / name).write_text("{}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    entry = {
        str(path.relative_to(folder)): {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    (folder / "manifest.json").write_text(json.dumps(entry))
    return folder


def llama_weights(blocks=3):
    """Return weights of a small LLaMA, with some that are no matrices or belong to no block."""
    generator = torch.Generator().manual_seed(0)
    shapes = {kind: (64, 64) if kind in LLAMA_TYPES[:4] else (96, 64) for kind in LLAMA_TYPES}
    weights = {
        f"{name}.weight": torch.randn(shapes[kind], generator=generator)
        for name, kind, _ in llama_modules(blocks)
    }
    return weights | {
        "model.layers.0.input_layernorm.weight": torch.ones(64),
        "lm_head.weight": torch.randn(80, 64, generator=generator),
    }


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, words)])
    return figures.run_script(figures.main)


def points_of(axes):
    """(x, y, half the length of the bar) of each errorbar."""
    found = []
    for container in axes.containers:
        line, _, (bars,) = container
        segments = np.array([s if len(s) else np.full((2, 2), np.nan) for s in bars.get_segments()])
        found.append(
            (line.get_xdata(), line.get_ydata(), (segments[:, 1, 1] - segments[:, 0, 1]) / 2)
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", figures.FORMATS)
@pytest.mark.filterwarnings("error")
def test_command_draws_every_figure_and_prints_its_path(kind, tmp_path, monkeypatch, capsys):
    runs = [
        run_of(tmp_path / "a"),
        run_of(tmp_path / "b", seed=6),
        run_of(tmp_path / "u", "uniform"),
        run_of(tmp_path / "0", "wd0", eta=0),
    ]
    add_checkpoint(runs[0], llama_weights())
    names = [
        "alpha_by_type",
        f"decays_alphadecay-adam-{ETA:g}-5",
        f"decays_alphadecay-adam-{ETA:g}-6",
        f"esd_alphadecay-adam-{ETA:g}-5",
        "perplexity_against_decay",
    ]
    contents = []
    for folder in (tmp_path / "new" / "one", tmp_path / "two")[: 1 if kind == "png" else 2]:
        assert command(monkeypatch, *runs, "--output", folder, "--format", kind) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == [str(folder / f"{name}.{kind}") for name in names]
        assert err.count("the run has no checkpoint\n") == err.count("\n") == 3
        assert len(list(folder.iterdir())) == len(names)
        contents.append([(folder / f"{name}.{kind}").read_bytes() for name in names])
    assert contents[0] == contents[-1]
    if kind == "svg":
        assert all(b'width="244.8pt"' in text or b'width="504pt"' in text for text in contents[0])
        assert not any(plots.FOREGROUND.encode() in text or b"\\" in text for text in contents[0])


def test_alphas_are_means_over_modules_then_seeds(tmp_path):
    settings = {"a": {}, "b": {"seed": 6}, "c": {"optimizer": "adamw"}, "u": {"method": "uniform"}}
    runs = read(*(run_of(tmp_path / name, **setting) for name, setting in settings.items()))
    (axes,) = drawing.alpha_by_type(drawing.entries_of(runs)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ORDER
    plain = []
    for seed in (5, 6):
        last = [
            line
            for line in history(llama_modules(3), [0, 100], 100, seed=seed)
            if line["step"] == 100 and line["balanced"]
        ]
        plain.append(
            [np.mean([line["alpha"] for line in last if line["type"] == kind]) for kind in ORDER]
        )
    (_, adam, bars), (_, adamw, none) = points_of(axes)
    np.testing.assert_allclose(adam, np.mean(plain, axis=0))
    np.testing.assert_allclose(bars, np.std(plain, axis=0, ddof=1))
    np.testing.assert_allclose(adamw, plain[0])
    assert np.isnan(none).all()
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "alphadecay, adam",
        "alphadecay, adamw",
    ]


def test_alphas_of_a_method_without_spectra_are_those_of_its_checkpoint(tmp_path):
    folder = run_of(tmp_path / "u", "uniform")
    weights = llama_weights()
    add_checkpoint(folder, weights)
    (axes,) = drawing.alpha_by_type(drawing.entries_of(read(folder))).axes
    plain = [
        np.mean(
            [
                fit_power_law(eigenvalues(w)).alpha
                for key, w in weights.items()
                if f".{kind}." in key
            ]
        )
        for kind in ORDER
    ]
    np.testing.assert_allclose(points_of(axes)[0][1], plain)


def test_etas_and_models_of_a_method_are_not_averaged(tmp_path):
    runs = read(run_of(tmp_path / "a"), run_of(tmp_path / "b", eta=1e-3))
    (axes,) = drawing.alpha_by_type(drawing.entries_of(runs)).axes
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == [
        "alphadecay, η = 10⁻⁵",
        "alphadecay, η = 10⁻³",
    ]
    runs[1].info["arguments"] |= {"weight_decay": ETA, "model_config": "configs/llama_60m.json"}
    assert [entry.method for entry in drawing.entries_of(runs)] == [
        "alphadecay llama_9m",
        "alphadecay llama_60m",
    ]


def test_method_in_words_where_flags_are_missing(tmp_path):
    (run,) = read(run_of(tmp_path / "a"))
    del run.info["arguments"]["method"], run.info["arguments"]["adamc"]
    assert drawing.entries_of([run])[0].method.startswith("decay by module (alpha")


@pytest.mark.parametrize("blocks", [3, 24])
def test_decays_of_every_module_are_inside_their_panel(blocks, tmp_path):
    (run,) = read(run_of(tmp_path / "a", blocks=blocks))
    figure = drawing.decays(run)
    figure.canvas.draw()
    last = {
        line["module"]: line
        for line in history(llama_modules(blocks), [0, 100], 100, seed=5)
        if line["step"] == 100
    }
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(panels) == ORDER
    for kind, axes in panels.items():
        lines = [line for line in last.values() if line["type"] == kind]
        np.testing.assert_allclose(
            [bar.get_height() for bar in axes.patches],
            [line["weight_decay"] / ETA for line in lines],
        )
        twin = next(
            other
            for other in figure.axes
            if other is not axes and other.bbox.bounds == axes.bbox.bounds
        )
        np.testing.assert_allclose(twin.lines[0].get_ydata(), [line["alpha"] for line in lines])
        low, high = twin.get_ylim()
        assert low < min(twin.lines[0].get_ydata()) and max(twin.lines[0].get_ydata()) < high
        assert max(bar.get_height() for bar in axes.patches) < axes.get_ylim()[1]


def test_spectra_are_those_of_the_newest_checkpoint(tmp_path):
    folder, weights = run_of(tmp_path / "a"), llama_weights(12)
    add_checkpoint(folder, llama_weights(1), step=9)
    add_checkpoint(folder, weights, step=100)
    (run,) = read(folder)
    run.info["arguments"]["xmin_pos"] = 3
    for number, block in ((None, 6), (10, 10), (0, 0)):  # by number, not by letters: 10 follows 9
        figure = drawing.esd(run, number)
        for axes, kind in zip(figure.axes, ORDER, strict=False):
            owner = "self_attn" if kind in LLAMA_TYPES[:4] else "mlp"
            values = (
                torch.linalg.svdvals(
                    weights[f"model.layers.{block}.{owner}.{kind}.weight"].double()
                ).flip(0)
                ** 2
            )
            fit = fit_power_law(values, "median", 3)
            assert axes.get_title() == f"{kind}\nα = {fit.alpha:.2f}, D = {fit.D:.2f}"
            density, edges, _ = axes.patches[0].get_data()
            np.testing.assert_allclose(
                sum(density * np.diff(edges)), (values > 1e-6 * values[-1]).double().mean()
            )
            x, y = axes.lines[0].get_data()
            # What lies under the line from its threshold to infinity is the share of the tail.
            np.testing.assert_allclose(
                y[0] * x[0] / (fit.alpha - 1), fit.tail / len(values), rtol=1e-6
            )
            np.testing.assert_allclose(x, [fit.xmin, values[-1]], rtol=1e-6)
            np.testing.assert_allclose(
                np.diff(np.log(y)) / np.diff(np.log(x)), -fit.alpha, rtol=1e-6
            )
        assert (
            figure.axes[-1].get_legend().get_title().get_text()
            == f"model.layers.{block}\nafter 100 updates"
        )


def test_spectra_of_other_models(tmp_path):
    (run,) = read(folder := run_of(tmp_path / "a"))
    flat = {
        f"blocks.{i}.{part}.weight": torch.eye(60)
        for i in range(2)
        for part in ("attn.proj", "attn.qkv", "mlp.proj")
    }
    add_checkpoint(folder, flat | {"blocks.1.conv.weight": torch.randn(60, 8, 3, 3)})
    titles = [axes.get_title().split("\n") for axes in drawing.esd(run, None).axes]
    assert [name for name, _ in titles] == [
        "attn.proj",
        "attn.qkv",
        "conv",
        "mlp.proj",
    ]  # proj alone would name two
    assert [fit == "no tail to fit" for _, fit in titles] == [True, True, False, True]
    with pytest.raises(UserError, match="no spectra of .*: give --block a number from 0 to 1"):
        drawing.esd(run, 2)
    (folder / "checkpoints" / "model_100" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no checkpoint in .* is complete"):
        drawing.esd(run, None)


def test_results_against_eta(tmp_path):
    settings = [
        ("uniform", "adam", 1e-3, 5),
        ("uniform", "adam", 1e-5, 5),
        ("uniform", "adam", 1e-5, 6),
        ("wd0", "adam", 0, 5),
        ("uniform", "adamw", 0.1, 5),
    ]
    folders = [
        run_of(tmp_path / str(i), *setting, loss=3 + i / 10) for i, setting in enumerate(settings)
    ]
    entries = drawing.entries_of(
        read(*folders, run_of(tmp_path / "unfinished", "uniform", seed=7, loss=9, final=False))
    )
    left, right = drawing.against_decay(entries, "perplexity").axes
    assert (left.get_title(), right.get_title(), left.get_xscale()) == ("adam", "adamw", "log")
    assert left.get_ylim() == right.get_ylim() and left.get_ylabel() == "validation perplexity"
    ((x, y, bars),) = points_of(left)
    np.testing.assert_allclose(np.log10(x), [-5, -3], atol=0.1)
    np.testing.assert_allclose(y, [np.mean(np.exp([3.1, 3.2])), np.exp(3.0)])
    np.testing.assert_allclose(bars, [np.std(np.exp([3.1, 3.2]), ddof=1), np.nan])
    level = next(line for line in left.lines if line.get_linestyle() == "--")
    np.testing.assert_allclose(level.get_ydata(), np.exp(3.3))
    np.testing.assert_allclose(points_of(right)[0][1], np.exp(3.4))
    assert {text.get_text() for text in left.figure.legends[0].get_texts()} == {
        "uniform",
        "wd0, η = 0",
    }


def test_vision_runs_show_top1(tmp_path):
    runs = read(run_of(tmp_path / "a", "uniform", top1=81.5, perplexity=None))
    (axes,) = drawing.against_decay(drawing.entries_of(runs), "top1").axes
    assert points_of(axes)[0][1] == [81.5] and axes.get_ylabel() == "top-1 accuracy (%)"
    del runs[0].evaluations[0]["perplexity"]
    assert [name for name in drawing.planned(runs, None) if "against" in name] == [
        "top1_against_decay"
    ]


def test_run_named_twice_is_one_run(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "a")
    assert (
        command(monkeypatch, run, f"{run}/../a", "--output", tmp_path / "out", "--format", "svg")
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_names_that_no_file_can_have(tmp_path):
    runs = read(run_of(tmp_path / "a"), run_of(tmp_path / "b"))
    runs[0].label, runs[1].label = "a/b $x_1$", "a b/$x_1$"
    names = [path.name for path in drawing.draw(runs, tmp_path / "out", "svg")]
    assert names[1:3] == ["decays_a_b_x_1_.svg", "decays_a_b_x_1__.svg"]


def test_nothing_to_draw_is_one_sentence_each_and_exit_code_2(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "a", "uniform", final=False)
    out = tmp_path / "out"
    assert command(monkeypatch, run, "--output", out) == 2
    said = capsys.readouterr()
    starts = [
        "no alpha_by_type: ",
        "no decays of ",
        "no spectra of ",
        "no perplexity_against_decay: ",
        "error: nothing to draw: give ",
    ]
    assert [
        line.startswith(start) for line, start in zip(said.err.splitlines(), starts, strict=True)
    ] == [True] * 5
    assert said.out == "" and not out.exists()
    assert command(monkeypatch, tmp_path / "none", "--output", out) == 2
    assert "is not a folder; give the folder of a run" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command(monkeypatch, run_of(tmp_path / "b"), "--output", tmp_path / "file") == 2
    assert "give another folder" in capsys.readouterr().err


def test_numbers_on_axes():
    shown = {
        1e-5: "10⁻⁵",
        3e-5: "3·10⁻⁵",
        0.01: "0.01",
        1: "1",
        500: "500",
        1e4: "10⁴",
        2.5e6: "2.5·10⁶",
        0: "0",
    }
    assert {value: drawing.power_of_ten(value) for value in shown} == shown
