"""Figures of the report.

matplotlib takes a second to import, so only the functions that draw import it.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_pretraining.records.reader import Modules, Run, column, number, section

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers can tell apart (jfly.uni-koeln.de/color).
# Without black and yellow, which are invisible on a dark or a white page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LEGEND_LENGTH = 60  # characters that fit into a figure's width beside a curve
# Placeholder colours. The page replaces them by its own text and background colours, so that the
# figures follow dark mode.
FOREGROUND, BACKGROUND = "#010203", "#010204"
# The order in which papers list the projections of LLaMA. Other types follow in the order of the
# model.
USUAL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean over a window that is centred on each value.

    A mean over past values only would lie above a falling loss.

    Args:
        values: [n] The values. nan is not counted.
        window: The number of values in a mean, odd. Near the ends it is smaller.

    Returns:
        [n] The means, nan where all values of the window are nan.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    reach = np.minimum(
        window // 2, np.minimum(np.arange(len(values)), len(values) - 1 - np.arange(len(values)))
    )
    low, high = np.arange(len(values)) - reach, np.arange(len(values)) + reach + 1
    inside = counts[high] - counts[low]
    return np.where(inside > 0, (sums[high] - sums[low]) / np.maximum(inside, 1), np.nan)


def thinned(steps: np.ndarray, values: np.ndarray, most: int = 1500) -> np.ndarray:
    """Return the positions of the points that a curve needs at the resolution of a page.

    A curve with more points than pixels makes the page large and slow. Of each of `most` / 2 equal
    parts of the curve, its lowest and its highest point are kept, so no spike is lost.

    Args:
        steps: [n] Where the points are.
        values: [n] The curve; nan is drawn as a gap, of which one point is kept.
        most: The largest number of points that are kept, but for the last one.
    """
    if len(steps) <= most:
        return np.arange(len(steps))
    edges = np.linspace(0, len(steps), most // 2 + 1).astype(int)
    kept: set[int] = {len(steps) - 1}
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part = values[low:high]
        known = np.isfinite(part)
        if known.any():
            kept.add(low + int(np.argmin(np.where(known, part, np.inf))))
            kept.add(low + int(np.argmax(np.where(known, part, -np.inf))))
        if not known.all():
            kept.add(low + int(np.argmin(known)))
    return np.array(sorted(kept))


def smoothing_window(run: Run) -> int:
    """Return the window of the running mean in logged updates: odd, 2 % of the curve or 5."""
    return max(5, len(run.training) // 50 | 1)


def seen_per_update(run: Run) -> float:
    """Return the mean number of tokens or images in an update, for the axis at the top.

    nan if it is not constant, because the batch size changed during the run.
    """
    steps, seen = column(run.training, "update_step"), column(run.training, f"{run.unit}_seen")
    known = np.isfinite(seen) & (steps > 0)
    if not known.any():
        return math.nan
    ratio = seen[known] / steps[known]
    return (
        float(ratio[-1])
        if ratio[-1] > 0 and np.ptp(ratio[len(ratio) // 2 :]) < 0.05 * ratio[-1]
        else math.nan
    )


def total_items_seen(run: Run) -> float:
    """Return the number of tokens or images trained on so far; nan if it was not recorded."""
    lines = run.training + run.evaluations + [section(run.info, "summary")]
    known = [
        value
        for value in (number(row, f"{run.unit}_seen") for row in lines)
        if math.isfinite(value)
    ]
    return max(known, default=math.nan)


def throughput(run: Run) -> float:
    """Return tokens or images per second: from the summary, or the median of logged updates."""
    value = number(section(run.info, "summary"), f"{run.unit}_per_second")
    logged = column(run.training, f"throughput_{run.unit}")
    return (
        value
        if math.isfinite(value) or not np.isfinite(logged).any()
        else float(np.nanmedian(logged))
    )


def utilisation(run: Run) -> float:
    """Return the MFU, padding included: from the summary, or the median of logged updates."""
    value = number(section(run.info, "summary"), "mfu")
    logged = column(run.training, "mfu")
    return (
        value
        if math.isfinite(value) or not np.isfinite(logged).any()
        else float(np.nanmedian(logged))
    )


def last_update(run: Run) -> int:
    """Return the last update that the run has logged."""
    return max(int(row["update_step"]) for row in (run.training + run.evaluations))


def shown_statistic(run: Run, modules: Modules) -> tuple[str, np.ndarray]:
    """Return name and values [analyses, modules] of the statistic that the module figures show.

    This is alpha, or the score if the run computes no alpha.
    """
    if np.isfinite(modules.alpha).any():
        return "α", modules.alpha
    return str(run.argument("esd_metric_for_tb", "metric") or "score"), modules.score


def analysis_time_label(step: int) -> str:
    """Describe when an analysis took place."""
    return "before training" if step == 0 else f"after {int(step):,} updates"


def decay_in_eta(run: Run, modules: Modules) -> tuple[str, np.ndarray]:
    """Return axis name and values [analyses, modules] of the decays.

    In units of eta, or unscaled if eta is zero or unknown.
    """
    return ("decay (η)", modules.decay / run.eta) if run.eta > 0 else ("decay", modules.decay)


def types_in_order(modules: Modules, chosen: np.ndarray | None = None) -> list[str]:
    """Return the types of modules, those of USUAL_ORDER first.

    Args:
        modules: The modules.
        chosen: [modules] Which modules to consider; by default all.
    """
    kept = [kind for i, kind in enumerate(modules.types) if chosen is None or chosen[i]]
    found = list(dict.fromkeys(kept))
    return [kind for kind in USUAL_ORDER if kind in found] + [
        kind for kind in found if kind not in USUAL_ORDER
    ]


def short_rows(modules: Modules) -> tuple[list[str], list[str], str]:
    """Return places (blocks, and modules outside of blocks), their short names, and the prefix.

    The short name of `model.layers.7` is `7`, with the prefix `model.layers.`. Modules outside of
    blocks keep their names.
    """
    rows = list(dict.fromkeys(modules.places))
    prefix = os.path.commonprefix(modules.blocks) if len(modules.blocks) > 1 else ""
    prefix = prefix[: prefix.rfind(".") + 1]
    return rows, [row[len(prefix) :] if row in modules.blocks else row for row in rows], prefix


def short_number(value: float, _position: int | None = None) -> str:
    """Format a number with a suffix: 20k for 20000, 1.5B for 1.5e9.

    The second argument is what matplotlib passes to a tick formatter.
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


# ----------------------------------------------------------------------------------- drawing tools


def style() -> dict[str, Any]:
    """Return the matplotlib settings of all figures.

    Figures are 7 inches wide with text of 8 points, which stays text in the SVG. The layout is made
    for DejaVu Sans, which comes with matplotlib, so it does not depend on installed fonts. A
    browser without it uses the other fonts, which are not wider.
    """
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,  # `$` in a name is not a formula
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica", "Liberation Sans"],
        "font.size": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7.5,
        "legend.frameon": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "lines.linewidth": 1.3,
        "figure.constrained_layout.use": True,
        **{
            key: FOREGROUND
            for key in (
                "text.color",
                "axes.edgecolor",
                "axes.labelcolor",
                "xtick.color",
                "ytick.color",
            )
        },
    }


def as_svg(draw: Callable[..., Figure], key: str, *arguments: Any) -> str:
    """Draw a figure in the style of the page and return it as inline SVG.

    Args:
        draw: A function that returns a figure.
        key: A prefix that makes the ids of this figure unique within the page.
        arguments: Passed to `draw`.
    """
    import matplotlib

    buffer = io.StringIO()
    settings: dict[Any, Any] = {**style(), "svg.hashsalt": key}
    with matplotlib.rc_context(settings):
        draw(*arguments).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = (
        text[text.index("<svg") :]
        .replace(FOREGROUND, "currentColor")
        .replace(BACKGROUND, "var(--page, #fff)")
    )
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{key}-", text)
    return text.replace("<svg ", '<svg role="img" ', 1)


def new_figure(height: float) -> Figure:
    """Return an empty figure, 7 inches wide and `height` inches high."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7.0, height))


def legend_text(text: str) -> str:
    """Shorten a label for a legend, and escape a leading `_`, with which matplotlib hides it."""
    short = text if len(text) <= LEGEND_LENGTH else text[: LEGEND_LENGTH - 1] + "…"
    return f" {short}" if short.startswith("_") else short


def depth_colours() -> Any:
    """Return viridis without its two ends, which are invisible on a dark or a white page."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.2, 0.87, 48)))


def update_axis(axes: Axes, max_ticks: int, label: str = "update") -> None:
    """Label an x axis of updates, with ticks such as 20k."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(max_ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.set_xlabel(label)


def data_axis(axes: Axes, ratio: float, unit: str) -> None:
    """Add an x axis of tokens or images at the top, `ratio` for each update; none if it is nan."""
    from matplotlib.ticker import FuncFormatter

    if math.isfinite(ratio):
        top = axes.secondary_xaxis(
            "top",
            functions=(
                lambda step: np.asarray(step, float) * ratio,
                lambda seen: np.asarray(seen, float) / ratio,
            ),
        )
        top.xaxis.set_major_formatter(FuncFormatter(short_number))
        top.set_xlabel(f"{unit} seen")
        top.spines["top"].set_visible(True)


def block_axis(axes: Axes, modules: Modules, max_ticks: int = 12) -> None:
    """Label an x axis of depth with the names of the blocks."""
    rows, names, prefix = short_rows(modules)
    every = max(1, math.ceil(len(rows) / max_ticks))
    long = max(len(name) for name in names[::every]) > 3
    axes.set_xticks(
        range(0, len(rows), every),
        names[::every],
        rotation=60 if long else 0,
        ha="right" if long else "center",
    )
    axes.set_xlabel(f"block ({prefix}*)" if prefix else "block")


# ----------------------------------------------------------------------------------------- figures


def lowest(values: np.ndarray) -> list[float]:
    """Return [the 0.5 % quantile of the finite values], or [] if there are none.

    This is the lower limit of a noisy curve without its outliers.
    """
    known = values[np.isfinite(values)]
    return [float(np.quantile(known, 0.005))] if len(known) else []


def loss_limits(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Return bottom and top of the loss axis; None to show everything.

    The loss of the first updates is several times the range of the rest, which it would compress.
    The axis is fitted to the loss after the first 4 % of the updates.
    """
    values: list[float] = []
    for run in runs:
        for rows, key in ((run.training, "loss"), (run.evaluations, "eval_loss")):
            loss, steps = column(rows, key), column(rows, "update_step")
            smooth = running_mean(loss, smoothing_window(run)) if key == "loss" else loss
            late = (steps >= 0.04 * last_update(run)) & np.isfinite(smooth)
            values += smooth[late].tolist() + lowest(loss[late])
    if sum(len(run.training) for run in runs) < 20 or not values:
        return None
    margin = max(0.04 * (max(values) - min(values)), 0.01)
    return min(values) - margin, max(values) + 2 * margin


def draw_training(axes: Axes, run: Run, colour: str, label: str, raw: bool) -> None:
    """Draw the running mean of the training loss, with the logged values behind it if `raw`."""
    steps, loss = column(run.training, "update_step"), column(run.training, "loss")
    few = len(steps) < 5
    if raw and not few:
        points = thinned(steps, loss)
        axes.plot(
            steps[points],
            loss[points],
            color=colour,
            alpha=0.4,
            linewidth=0.6,
            label="training, each logged update",
        )
    if len(steps):
        curve = loss if few else running_mean(loss, smoothing_window(run))
        points = thinned(steps, curve)
        axes.plot(
            steps[points],
            curve[points],
            color=colour,
            marker="o" if few else "",
            markersize=4,
            label=label,
        )


def draw_validation(
    axes: Axes, run: Run, colour: str, marker: str, label: str | None, joined: bool
) -> None:
    """Draw the validation losses as points, joined by a thin line if `joined`."""
    steps, loss = column(run.evaluations, "update_step"), column(run.evaluations, "eval_loss")
    size = 4.5 if len(steps) <= 30 else 2.5
    axes.plot(
        steps,
        loss,
        color=colour,
        marker=marker,
        markersize=size,
        markeredgecolor=BACKGROUND,
        markeredgewidth=0.5,
        linestyle="-" if joined else "",
        linewidth=0.8,
        label=label,
        zorder=3,
    )


def loss_figure(run: Run) -> Figure:
    """Draw training and validation loss of a run over updates, and the learning rate below."""
    from matplotlib.ticker import MaxNLocator

    rates = np.isfinite(column(run.training, "lr")).any()
    figure = new_figure(3.9 if rates else 3.1)
    if rates:
        axes, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    else:
        axes = lower = figure.subplots()
    label = "training"
    if len(run.training) >= 5:
        label = f"training, mean over {smoothing_window(run)} logged updates"
    draw_training(axes, run, PALETTE[0], label, raw=True)
    if run.evaluations:
        draw_validation(axes, run, PALETTE[1], "o", "validation", joined=False)
    axes.set_ylabel("loss (nats per token)" if has_perplexity(run) else "loss")
    axes.legend(loc="upper right")
    limits = loss_limits([run])
    if limits:
        axes.set_ylim(*limits)
    if rates:
        steps, lr = column(run.training, "update_step"), column(run.training, "lr")
        points = thinned(steps, lr)
        lower.plot(
            steps[points],
            lr[points],
            color=FOREGROUND,
            linewidth=1,
            marker="o" if len(run.training) < 5 else "",
            markersize=3,
        )
        lower.set_ylabel("learning rate")
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_locator(MaxNLocator(3))
        figure.align_ylabels([axes, lower])
    lower.set_xlim(left=0, right=last_update(run) * 1.02 or 1)
    update_axis(lower, 8)
    data_axis(axes, seen_per_update(run), run.unit)
    return figure


ACCURACY_NAMES = {
    "top1": "top-1",
    "ema_top1": "top-1, moving average of the weights",
    "top5": "top-5",
    "ema_top5": "top-5, moving average of the weights",
}


def accuracies(run: Run) -> list[str]:
    """Return the accuracies that a run of an image classifier records, such as `top1`."""
    return [name for name in ACCURACY_NAMES if np.isfinite(column(run.evaluations, name)).any()]


def accuracy_figure(runs: Sequence[Run]) -> Figure:
    """Draw the validation accuracies over updates.

    Of a single run all are drawn, of several runs top-1 only: solid of the model, dashed of the
    moving average of its weights.
    """
    figure = new_figure(2.6)
    axes = figure.subplots()
    if len(runs) == 1:
        names = accuracies(runs[0])
        curves = [(i, runs[0], name, ACCURACY_NAMES[name]) for i, name in enumerate(names)]
    else:
        # The legend has one line for each run, that of its first curve.
        curves = [
            (i, run, name, "_" if j else legend_text(run.label))
            for i, run in enumerate(runs)
            for j, name in enumerate(n for n in accuracies(run) if n.endswith("top1"))
        ]
    for position, run, name, label in curves:
        steps = column(run.evaluations, "update_step")
        axes.plot(
            steps,
            column(run.evaluations, name),
            color=PALETTE[position % len(PALETTE)],
            marker=MARKERS[position % len(MARKERS)],
            markersize=3.5 if len(steps) <= 30 else 2,
            linestyle="--" if name.startswith("ema") else "-",
            linewidth=0.9,
            label=label,
        )
    axes.set_ylabel("accuracy (%)" if len(runs) == 1 else "top-1 accuracy (%)")
    axes.legend(loc="lower right")
    axes.set_xlim(left=0, right=max(last_update(run) for run in runs) * 1.02 or 1)
    update_axis(axes, 8)
    return figure


def has_perplexity(run: Run) -> bool:
    """Return True for the run of a language model, whose losses are in nats per token."""
    return bool(
        np.isfinite(column(run.evaluations, "perplexity")).any()
    ) or "perplexity" in section(run.info, "summary")


def loss_difference(run: Run, first: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return updates at which both runs were evaluated, and loss of `run` minus that of `first`."""
    base = dict(
        zip(
            column(first.evaluations, "update_step"),
            column(first.evaluations, "eval_loss"),
            strict=True,
        )
    )
    shared = [row for row in run.evaluations if row["update_step"] in base]
    steps = column(shared, "update_step")
    return steps, column(shared, "eval_loss") - np.array([base[step] for step in steps])


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """Draw runs side by side over updates.

    From top to bottom: losses, difference in validation loss to the first run, mean decay, learning
    rate.
    """
    figure = new_figure(6.6)
    axes, gap, decay, rate = figure.subplots(4, 1, sharex=True, height_ratios=[3.4, 1.6, 1, 0.8])
    for i, run in enumerate(runs):
        colour, marker = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
        steps = column(run.training, "update_step")
        draw_training(axes, run, colour, "_", raw=False)
        draw_validation(axes, run, colour, marker, legend_text(run.label), joined=not run.training)
        shared, difference = loss_difference(run, runs[0])
        gap.plot(shared, difference, color=colour, marker=marker, markersize=3.5, linewidth=0.9)
        dot = "o" if len(steps) < 5 else ""
        for panel, key in ((decay, "weight_decay"), (rate, "lr")):
            # These curves often coincide; dashes make the one behind visible.
            dashes = ("-", "--", ":", "-.")[i % 4]
            values = column(run.training, key)
            points = thinned(steps, values)
            panel.plot(
                steps[points],
                values[points],
                color=colour,
                linewidth=1.2,
                linestyle=dashes,
                marker=dot,
                markersize=3,
            )
    limits = loss_limits(runs)
    if limits:
        axes.set_ylim(*limits)
    axes.legend(loc="upper right", title="line: training (running mean); points: validation")
    axes.get_legend().get_title().set_fontsize(7.5)
    gap.axhline(0, color=FOREGROUND, linewidth=0.5, alpha=0.5, zorder=0)
    for panel, label in (
        (axes, "loss"),
        (gap, "validation loss\nminus first run's"),
        (decay, "mean decay"),
        (rate, "learning\nrate"),
    ):
        panel.set_ylabel(label)
    for panel in (decay, rate):
        panel.set_ylim(bottom=0)
        panel.locator_params(axis="y", nbins=3)
    rate.set_xlim(0, max(last_update(run) for run in runs) * 1.02 or 1)
    update_axis(rate, 8)
    figure.align_ylabels()
    ratios = [seen_per_update(run) for run in runs]
    same_unit = len({run.unit for run in runs}) == 1
    # Only if all runs have the same amount of data in an update. False for nan.
    if same_unit and np.ptp(ratios) < 0.01 * ratios[0]:
        data_axis(axes, ratios[0], runs[0].unit)
    return figure


def over_time_figure(modules: Modules, values: np.ndarray, name: str, base: float | None) -> Figure:
    """Draw a statistic over time: a panel for each type, a line for each module.

    The lines are coloured by depth; a thick line is the mean of the type.

    Args:
        modules: The modules; only balanced ones are drawn.
        values: [analyses, modules] The statistic.
        name: The label of the axis.
        base: Where to draw a dashed horizontal line, such as eta among decays. None: nowhere.
    """
    chosen = modules.balanced & np.isfinite(values).any(axis=0)
    kinds = types_in_order(modules, chosen)
    wide = min(3 if len(kinds) in (5, 6, 9) else 4, len(kinds))
    tall = math.ceil(len(kinds) / wide)
    figure = new_figure(0.6 + 1.5 * tall)
    grid = figure.subplots(tall, wide, sharex=True, sharey=True, squeeze=False).ravel()
    rows = short_rows(modules)[0]
    colours, deepest = depth_colours(), max(len(rows) - 1, 1)
    for axes, kind in zip(grid, kinds, strict=False):
        members = [i for i in range(len(modules.names)) if chosen[i] and modules.types[i] == kind]
        for i in members:
            axes.plot(
                modules.steps,
                values[:, i],
                color=colours(rows.index(modules.places[i]) / deepest),
                linewidth=0.8,
                marker="." if len(modules.steps) < 4 else "",
                markersize=4,
            )
        if len(members) > 1:
            axes.plot(
                modules.steps, mean_of_known(values[:, members]), color=FOREGROUND, linewidth=1.7
            )
        if base is not None:
            axes.axhline(
                base, color=FOREGROUND, linewidth=0.6, linestyle=(0, (4, 3)), alpha=0.6, zorder=0
            )
        axes.set_title(kind, pad=3)
        update_axis(axes, 4, "")
    for position, axes in enumerate(grid):
        if position >= len(kinds):
            axes.set_axis_off()
        elif position + wide >= len(kinds):  # the lowest panel of a column has the axis labels
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("update")
    for axes in grid[::wide]:
        axes.set_ylabel(name)
    add_depth_bar(figure, grid, len(kinds), modules)
    return figure


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Return the mean of the finite values over the last axis; nan if there are none."""
    known = np.isfinite(values)
    return np.where(
        known.any(axis=-1),
        np.where(known, values, 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1),
        np.nan,
    )


def draw_bar_as_vectors(bar: Colorbar) -> None:
    """Draw a colour bar without pixels, without gaps between its colours and without a frame."""
    if bar.solids is not None:
        bar.solids.set_rasterized(False)
        bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)


def add_depth_bar(figure: Figure, grid: np.ndarray, used: int, modules: Modules) -> None:
    """Add a colour bar of depth: in the last panel if it is empty, otherwise at the right."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    rows, names, _ = short_rows(modules)
    if len(rows) < 2:
        return
    mapping = ScalarMappable(Normalize(0, len(rows) - 1), depth_colours())
    if used < len(grid):
        place = grid[-1].inset_axes([0.08, 0.5, 0.84, 0.09])
        bar = figure.colorbar(mapping, cax=place, orientation="horizontal")
        grid[-1].legend(
            [Line2D([], [], color=FOREGROUND, linewidth=1.7)],
            ["mean of the type"],
            loc="upper center",
            bbox_to_anchor=(0.5, 0.98),
        )
    else:
        bar = figure.colorbar(mapping, ax=grid.tolist(), aspect=30, pad=0.015)
    draw_bar_as_vectors(bar)
    ends = [0, len(rows) // 2, len(rows) - 1] if len(rows) > 2 else [0, 1]
    long = used < len(grid) and max(len(names[i]) for i in ends) > 8
    bar.set_ticks(
        ends[:: len(ends) - 1] if long else ends,
        labels=[names[i] for i in (ends[:: len(ends) - 1] if long else ends)],
    )
    bar.set_label("block")


def by_type_figure(
    modules: Modules, panels: Sequence[tuple[str, np.ndarray, float | None]]
) -> Figure:
    """Draw statistics of a run with a single analysis: a strip of points for each type.

    Args:
        modules: The modules; only balanced ones are drawn.
        panels: Label, values [1, modules], and position of a dashed line or None, for each panel.
    """
    kinds, rows = types_in_order(modules, modules.balanced), short_rows(modules)[0]
    colours, deepest = depth_colours(), max(len(rows) - 1, 1)
    figure = new_figure(2.5)
    grid = figure.subplots(1, len(panels), squeeze=False).ravel()
    for axes, (name, values, base) in zip(grid, panels, strict=True):
        for i in np.flatnonzero(modules.balanced):
            depth = rows.index(modules.places[i]) / deepest
            axes.plot(
                kinds.index(modules.types[i]) + 0.5 * (depth - 0.5),
                values[0, i],
                "o",
                color=colours(depth),
                markersize=3.5,
            )
        if base is not None:
            axes.axhline(
                base, color=FOREGROUND, linewidth=0.6, linestyle=(0, (4, 3)), alpha=0.6, zorder=0
            )
        axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
        axes.set_xlim(-0.6, len(kinds) - 0.4)
        axes.set_ylabel(name)
    add_depth_bar(figure, grid, len(grid), modules)
    return figure


def cell_means(
    modules: Modules, values: np.ndarray, rows: list[str], kinds: list[str]
) -> np.ndarray:
    """Arrange values [modules] as a table [rows, types].

    Modules in the same cell, such as the experts of a block, are averaged. Empty cells are nan.
    """
    table = np.full((len(rows), len(kinds)), np.nan)
    for r, row in enumerate(rows):
        for k, kind in enumerate(kinds):
            members = [
                i
                for i in range(len(values))
                if modules.places[i] == row and modules.types[i] == kind
            ]
            if members:
                table[r, k] = mean_of_known(values[members])
    return table


def heat_map_figure(run: Run, modules: Modules) -> Figure:
    """Draw the last decays as colours, block by type, and print the statistic in each cell."""
    import matplotlib

    rows, names, prefix = short_rows(modules)
    kinds = types_in_order(modules)
    label, decays = decay_in_eta(run, modules)
    colour = cell_means(modules, np.where(modules.balanced, decays[-1], np.nan), rows, kinds)
    printed = cell_means(modules, shown_statistic(run, modules)[1][-1], rows, kinds)
    present = {(modules.places[i], modules.types[i]) for i in range(len(modules.names))}
    figure = new_figure(0.75 + max(len(rows), 5) * (0.2 if len(rows) <= 40 else 0.15))
    axes = figure.subplots()
    lowest, highest = (
        (np.nanmin(colour), np.nanmax(colour)) if np.isfinite(colour).any() else (0.0, 1.0)
    )
    palette = matplotlib.colormaps["cividis"].resampled(64)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(colour),
        cmap=palette,
        vmin=lowest,
        vmax=highest,
        edgecolors=BACKGROUND,
        linewidth=0.8,
    )
    for r, row in enumerate(rows):
        for k, kind in enumerate(kinds):
            if (row, kind) in present:
                relative = (colour[r, k] - lowest) / ((highest - lowest) or 1)
                ink = (
                    FOREGROUND
                    if np.isnan(relative)
                    else ("#ffffff" if relative < 0.5 else "#000001")
                )
                axes.text(
                    k + 0.5,
                    r + 0.5,
                    cell_text(printed[r, k]),
                    color=ink,
                    ha="center",
                    va="center_baseline",
                    fontsize=6.5,
                )
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=0 if len(kinds) <= 8 else 40)
    axes.set_yticks(np.arange(len(rows)) + 0.5, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(f"block ({prefix}*)" if prefix else "block")
    axes.invert_yaxis()
    bar = figure.colorbar(mesh, ax=axes, aspect=25, pad=0.015)
    draw_bar_as_vectors(bar)
    bar.set_label(label)
    return figure


def cell_text(value: float) -> str:
    """Format a statistic in at most five characters."""
    if not math.isfinite(value):
        return "–"
    return (
        f"{value:.2f}"
        if 0.1 <= abs(value) < 100 or value == 0
        else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    )


def depth_figure(run: Run, modules: Modules) -> Figure:
    """Draw the statistic over depth, a line for each type, at the first and the last analysis."""
    name, values = shown_statistic(run, modules)
    kinds = types_in_order(modules)
    rows = short_rows(modules)[0]
    moments = [0, -1] if len(modules.steps) > 1 else [0]
    figure = new_figure(2.7)
    grid = figure.subplots(1, len(moments), sharey=True, squeeze=False).ravel()
    for axes, moment in zip(grid, moments, strict=True):
        table = cell_means(modules, values[moment], rows, kinds)
        for k in range(len(kinds)):
            known = np.isfinite(table[:, k])
            first_cycle, colour = k < len(PALETTE), PALETTE[k % len(PALETTE)]
            axes.plot(
                np.arange(len(rows))[known],
                table[known, k],
                color=colour,
                marker=MARKERS[k % len(MARKERS)],
                markersize=3.2,
                linewidth=1,
                linestyle="-" if first_cycle else "--",
                markerfacecolor=colour if first_cycle else BACKGROUND,
            )
        axes.set_title(analysis_time_label(modules.steps[moment]))
        block_axis(axes, modules)
        axes.set_xlim(-0.5, len(rows) - 0.5)
    grid[0].set_ylabel(name)
    figure.legend(
        grid[0].get_lines(),
        [legend_text(kind) for kind in kinds],
        loc="outside right center",
        labelspacing=0.7,
    )
    return figure
