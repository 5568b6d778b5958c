"""Parts of the figures, and their independence of installed fonts."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager

from peft_pretraining.records.reader import read_run
from peft_pretraining.report.plots import (
    accuracies,
    accuracy_figure,
    as_svg,
    cell_text,
    heat_map_figure,
    legend_text,
    loss_difference,
    loss_figure,
    running_mean,
    short_number,
    thinned,
)
from tests.support.run_folders import metrics, tiny_run, vit_run, write_run


def test_running_mean_follows_the_plain_definition():
    values = np.array([3.0, 1.0, math.nan, 5.0, 2.0, 8.0])
    for window in (3, 5, 9):
        reach = [
            min(window // 2, i, len(values) - 1 - i) for i in range(len(values))
        ]  # the same on both sides
        plain = [np.nanmean(values[i - r : i + r + 1]) for i, r in enumerate(reach)]
        np.testing.assert_allclose(running_mean(values, window), plain)
    np.testing.assert_array_equal(running_mean(np.array([math.nan, 4.0]), 9), [math.nan, 4.0])


def test_the_difference_of_two_runs(tmp_path):
    """It is known at the updates at which both were evaluated."""
    first = read_run(write_run(tmp_path / "a", "a", metrics(1000, 10, 100)))
    second = read_run(write_run(tmp_path / "b", "b", metrics(1000, 10, 50, floor=3.4, seed=1)))
    steps, difference = loss_difference(second, first)
    assert steps.tolist() == list(range(100, 1001, 100))
    np.testing.assert_allclose(difference, 0.1)


def test_figures_do_not_depend_on_installed_fonts(tmp_path, monkeypatch):
    """The layout and the text stay the same where other common fonts are installed.

    A narrow font takes the place of each of them, so that a figure which uses it differs.
    """
    run = read_run(tiny_run(tmp_path / "run"))

    def draw():
        return as_svg(loss_figure, "a", run), as_svg(heat_map_figure, "b", run, run.modules)

    expected = draw()
    narrow = Path(matplotlib.get_data_path()) / "fonts/ttf/cmr10.ttf"
    others = [
        font_manager.FontEntry(
            fname=str(narrow),
            name=name,
            style="normal",
            variant="normal",
            weight=400,
            stretch="normal",
            size="scalable",
        )
        for name in ("Arial", "Helvetica", "Liberation Sans", "Verdana")
    ]
    monkeypatch.setattr(
        font_manager.fontManager, "ttflist", [*others, *font_manager.fontManager.ttflist]
    )
    font_manager.fontManager._findfont_cached.cache_clear()
    try:
        assert "cmr10" in font_manager.findfont("Liberation Sans")
        assert draw() == expected
    finally:
        font_manager.fontManager._findfont_cached.cache_clear()


@pytest.mark.parametrize(
    "value, text", [(20000, "20k"), (1.5e9, "1.5B"), (999, "999"), (-2.5e6, "-2.5M"), (0, "0")]
)
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    "value, text",
    [(2.345, "2.35"), (0, "0.00"), (1.23e-5, "1.2e-5"), (4567, "4.6e3"), (math.nan, "–")],
)
def test_a_statistic_fits_its_cell(value, text):
    assert cell_text(value) == text and len(text) <= 6


def test_legend_texts():
    assert legend_text("_hidden") == " _hidden"
    assert len(legend_text("x" * 100)) == 60 and legend_text("x" * 60) == "x" * 60


def test_a_thinned_curve_keeps_its_shape():
    """The plain twin looks at every point: no part of the curve loses its lowest or highest one."""
    steps, values = np.arange(10_007), np.random.default_rng(0).normal(size=10_007)
    values[5000], values[7001], values[9000:9100] = 40.0, -30.0, math.nan
    kept = thinned(steps, values, most=100)
    assert len(kept) <= 150 and kept[-1] == 10_006 and (np.diff(kept) > 0).all()
    assert {5000, 7001} <= set(kept)
    for part in np.array_split(np.arange(10_007), 50):
        inside = [i for i in kept if part[0] - 1 <= i <= part[-1] + 1]
        assert np.nanmax(values[inside]) >= np.nanmax(values[part[1:-1]])
        assert np.nanmin(values[inside]) <= np.nanmin(values[part[1:-1]])
    assert np.isnan(values[kept]).any()  # the gap stays a gap
    np.testing.assert_array_equal(thinned(steps[:100], values[:100], most=100), np.arange(100))


def drawn(figure):
    """Return {label: values} of the curves of a figure, and the texts of its legend."""
    axes = figure.axes[0]
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    return curves, [text.get_text() for text in axes.get_legend().get_texts()]


def test_accuracy_curves_of_one_run_and_of_several(tmp_path):
    one = read_run(vit_run(tmp_path / "one"))
    two = read_run(vit_run(tmp_path / "two", "two", ema=False))
    assert accuracies(one) == ["top1", "ema_top1", "top5", "ema_top5"]
    assert accuracies(read_run(tiny_run(tmp_path / "llama"))) == []
    curves, legend = drawn(accuracy_figure([one]))
    top1 = [line["top1"] for line in one.evaluations]
    assert curves["top-1"] == top1 and legend[0] == "top-1" and len(legend) == 4
    one.label = "one"
    curves, legend = drawn(accuracy_figure([one, two]))
    assert legend == ["one", "two"] and curves["one"] == top1
    assert curves["two"] == [line["top1"] for line in two.evaluations]
    assert len(curves) == 3  # and the moving average of the first run
