"""A run's report: one self-contained HTML page with the loss curve and the alpha and decay of every module over time.

    python -m peft_pretraining.report RUN                          writes RUN/report.html
    python -m peft_pretraining.report RUN OTHER_RUN [...]          writes RUN/comparison.html: the runs side by side

It reads what the training scripts leave behind (run.json, metrics.jsonl, modules.jsonl) and nothing else, so it works while a run is
still going and on a machine without an accelerator. Figures are vector graphics inside the page; nothing is fetched when it is opened.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_pretraining.errors import UserError

if TYPE_CHECKING:  # matplotlib takes a second to import: the functions that draw import it themselves
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours, told apart by colour-blind readers (jfly.uni-koeln.de/color), without black and yellow, which vanish on a
# dark or a white page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Stand-ins that matplotlib can draw with; the page replaces them by its own text and background colour, so that figures follow dark mode.
INK, PAPER = "#010203", "#010204"
# The order in which papers name LLaMA's projections; other types follow in the order of the model.
USUAL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The fields of an evaluation line that the page knows; any other number there (an accuracy, say) is shown under its own name.
EVALUATION_FIELDS = (
    "update_step", "eval_loss", "perplexity", "reference_perplexity", "eval_tokens", "eval_images", "eval_seconds", "tokens_seen", "final",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- reading a run


@dataclass
class Modules:
    """What modules.jsonl says, as arrays [updates, modules]; nan where a value is missing."""

    steps: np.ndarray  # [updates], the number of updates made when the decays were set
    names: list[str]
    types: list[str]
    rows: list[str]  # the block of each module, or the module's own name where it is in no block
    blocks: list[str]  # the real blocks among `rows`, in the order of the model
    balanced: np.ndarray  # [modules], bool
    alpha: np.ndarray
    score: np.ndarray
    decay: np.ndarray
    reasons: list[tuple[str, int, str]]  # (module, step, why alpha is undefined)


@dataclass
class Run:
    """One run folder in memory. `training` and `evaluations` are sorted by update step, one line for each."""

    folder: Path
    info: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    modules: Modules | None
    label: str = ""

    def argument(self, *names: str) -> Any:
        """The first of these arguments that run.json holds, else None."""
        arguments = section(self.info, "arguments")
        return next((arguments[name] for name in names if arguments.get(name) is not None), None)

    @property
    def unit(self) -> str:
        """What the run counts its data in: tokens or images."""
        return "images" if any("images_seen" in row for row in self.training) else "tokens"

    @property
    def eta(self) -> float:
        """The decay that the user gave, --weight_decay; nan if unknown."""
        return number({"eta": self.argument("weight_decay")}, "eta")


def section(info: dict[str, Any], name: str) -> dict[str, Any]:
    """info[name] if it is a dictionary, else an empty one."""
    value = info.get(name)
    return value if isinstance(value, dict) else {}


def number(row: dict[str, Any], key: str) -> float:
    """row[key] as a float; nan where it is missing, null, infinite or no number (the logger writes null for what is undefined)."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def read_text(path: Path) -> str:
    """The file's text; UserError where it is missing or cannot be read. Broken characters are left to the JSON reader to refuse."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(f"{path.parent} holds no {path.name}; give the folder of a run, such as runs/<name>.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None


def read_lines(path: Path, step_key: str) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, each with a whole number under `step_key`; a missing file is an empty one.

    A last line that is not valid JSON is a run being written, or one that was killed while writing: it is left out. Any other broken
    line raises UserError with the file and the line.
    """
    if not path.exists():
        return []
    lines = [line for line in enumerate(read_text(path).split("\n"), start=1) if line[1].strip()]
    rows = []
    for position, (line_number, line) in enumerate(lines):
        try:
            row = json.loads(line)
        except ValueError:
            if position == len(lines) - 1:
                break
            raise UserError(f"{path}, line {line_number}: not valid JSON; remove or repair that line.") from None
        if not isinstance(row, dict) or math.isnan(number(row, step_key)):
            raise UserError(f'{path}, line {line_number}: expected a JSON object with a number under "{step_key}".')
        rows.append(row)
    return rows


def latest_by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each update step, sorted. A resumed run repeats the steps after its checkpoint: the last one written counts."""
    return [row for _, row in sorted({int(row["update_step"]): row for row in rows}.items())]


def read_run(folder: Path | str) -> Run:
    """Read run.json, metrics.jsonl and (if there is one) modules.jsonl. UserError: no such folder, no metrics, a broken file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run, the one that holds run.json.")
    try:
        info = json.loads(read_text(folder / "run.json"))
    except ValueError:
        raise UserError(f"{folder / 'run.json'} is not valid JSON.") from None
    if not isinstance(info, dict):
        raise UserError(f"{folder / 'run.json'} must hold a JSON object.")
    metrics = read_lines(folder / "metrics.jsonl", "update_step")
    evaluations = latest_by_step([row for row in metrics if "eval_loss" in row])
    training = latest_by_step([row for row in metrics if "eval_loss" not in row and "loss" in row])
    if not evaluations and not training:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no logged step and no evaluation yet; nothing to report.")
    history = read_lines(folder / "modules.jsonl", "step")
    return Run(folder, info, training, evaluations, module_table(history), label=str(info.get("name") or folder.resolve().name))


def module_table(history: list[dict[str, Any]]) -> Modules | None:
    """Arrange the lines of modules.jsonl as arrays [updates, modules]; None if there are none."""
    if not history:
        return None
    first: dict[str, dict[str, Any]] = {}
    for row in history:
        first.setdefault(str(row.get("module")), row)
    names = list(first)
    steps = np.array(sorted({int(row["step"]) for row in history}))
    column, line = {name: i for i, name in enumerate(names)}, {step: i for i, step in enumerate(steps.tolist())}
    values = {key: np.full((len(steps), len(names)), np.nan) for key in ("alpha", "score", "weight_decay")}
    reasons: dict[tuple[str, int], str] = {}
    for row in history:
        name, step = str(row.get("module")), int(row["step"])
        for key, array in values.items():
            array[line[step], column[name]] = number(row, key)
        if row.get("reason"):
            reasons[name, step] = str(row["reason"])
    places = [str(first[name].get("block") or name) for name in names]
    return Modules(
        steps=steps,
        names=names,
        types=[str(first[name].get("type") or name.rsplit(".", 1)[-1]) for name in names],
        rows=places,
        blocks=list(dict.fromkeys(place for name, place in zip(names, places, strict=True) if first[name].get("block"))),
        balanced=np.array([first[name].get("balanced") is not False for name in names]),
        alpha=values["alpha"],
        score=values["score"],
        decay=values["weight_decay"],
        reasons=[(name, step, text) for (name, step), text in sorted(reasons.items(), key=lambda item: item[0][1])],
    )


# ------------------------------------------------------------------------------------------------------- numbers and their names


def column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """One field of all rows, [rows], nan where it is missing."""
    return np.array([number(row, key) for row in rows])


def final_evaluation(run: Run) -> dict[str, Any] | None:
    """The evaluation marked final, else the latest one; None if the run was never evaluated."""
    final = [row for row in run.evaluations if row.get("final") is True]
    return (final or run.evaluations or [None])[-1]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` (odd) values centred on each one, over fewer of them near the ends; missing values do not count.

    Centred, because a mean over the past alone would lie above a falling loss.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    reach = np.minimum(window // 2, np.minimum(np.arange(len(values)), len(values) - 1 - np.arange(len(values))))
    low, high = np.arange(len(values)) - reach, np.arange(len(values)) + reach + 1
    inside = counts[high] - counts[low]
    return np.where(inside > 0, (sums[high] - sums[low]) / np.maximum(inside, 1), np.nan)


def smoothing_window(run: Run) -> int:
    """Logged lines in one running mean, an odd number: a fiftieth of the curve, at least 5."""
    return max(5, len(run.training) // 50 | 1)


def seen_per_update(run: Run) -> float:
    """Mean tokens or images in one update, for the axis at the top; nan where they do not grow in proportion (a run changed its batch)."""
    steps, seen = column(run.training, "update_step"), column(run.training, f"{run.unit}_seen")
    known = np.isfinite(seen) & (steps > 0)
    if not known.any():
        return math.nan
    ratio = seen[known] / steps[known]
    return float(ratio[-1]) if ratio[-1] > 0 and np.ptp(ratio[len(ratio) // 2 :]) < 0.05 * ratio[-1] else math.nan


def seen_so_far(run: Run) -> float:
    """Tokens or images trained on so far, from the last line that says so."""
    lines = run.training + run.evaluations + [section(run.info, "summary")]
    known = [value for value in (number(row, f"{run.unit}_seen") for row in lines) if math.isfinite(value)]
    return max(known, default=math.nan)


def throughput(run: Run) -> float:
    """Tokens or images a second: the summary's, else the median of the logged ones."""
    value = number(section(run.info, "summary"), f"{run.unit}_per_second")
    logged = column(run.training, f"throughput_{run.unit}")
    return value if math.isfinite(value) or not np.isfinite(logged).any() else float(np.nanmedian(logged))


def utilisation(run: Run) -> float:
    """MFU, pads counted: the summary's, else the median of the logged ones."""
    value = number(section(run.info, "summary"), "mfu")
    logged = column(run.training, "mfu")
    return value if math.isfinite(value) or not np.isfinite(logged).any() else float(np.nanmedian(logged))


def last_update(run: Run) -> int:
    """The greatest update step that the run has logged."""
    return max(int(row["update_step"]) for row in (run.training + run.evaluations))


def shown_statistic(run: Run, modules: Modules) -> tuple[str, np.ndarray]:
    """(name, values [updates, modules]) of what the module figures show: alpha, or the score of a run that computes no alpha."""
    if np.isfinite(modules.alpha).any():
        return "α", modules.alpha
    return str(run.argument("esd_metric_for_tb", "metric") or "score"), modules.score


def definition(name: str) -> str:
    """A statistic's name as a caption introduces it."""
    return "α, the power-law exponent of the weight's spectrum," if name == "α" else name


def moment_name(step: int) -> str:
    """When an analysis took place, in words."""
    return "before training" if step == 0 else f"after {int(step):,} updates"


def decay_in_eta(run: Run, modules: Modules) -> tuple[str, np.ndarray]:
    """(axis name, decays [updates, modules]) in units of eta, or as they are where eta is zero or unknown."""
    return ("decay (η)", modules.decay / run.eta) if run.eta > 0 else ("decay", modules.decay)


def types_in_order(modules: Modules, chosen: np.ndarray | None = None) -> list[str]:
    """The module types (of the chosen modules, all by default), the projections of a transformer in their usual order."""
    kept = [kind for i, kind in enumerate(modules.types) if chosen is None or chosen[i]]
    found = list(dict.fromkeys(kept))
    return [kind for kind in USUAL_ORDER if kind in found] + [kind for kind in found if kind not in USUAL_ORDER]


def short_rows(modules: Modules) -> tuple[list[str], list[str], str]:
    """(rows, their short names, what was cut off): `model.layers.7` becomes `7`; modules outside the blocks keep their names."""
    rows = list(dict.fromkeys(modules.rows))
    prefix = os.path.commonprefix(modules.blocks) if len(modules.blocks) > 1 else ""
    prefix = prefix[: prefix.rfind(".") + 1]
    return rows, [row[len(prefix) :] if row in modules.blocks else row for row in rows], prefix


def short_number(value: float, _position: int | None = None) -> str:
    """20000 -> 20k, 1.5e9 -> 1.5B. The second argument is what matplotlib hands to a tick formatter."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def shown(value: float, pattern: str = "{:.4f}") -> str:
    """A number for a table, or an en dash where there is none."""
    return pattern.format(value) if math.isfinite(value) else "–"


# ---------------------------------------------------------------------------------------------------------------- drawing: tools


def style() -> dict[str, Any]:
    """matplotlib settings of every figure: 7 inches wide at 8 points, text kept as text, thin frames, no grid."""
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,  # a `$` in a name is a dollar
        "font.family": "sans-serif",
        "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
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
        **{key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    }


def as_svg(draw: Callable[..., Figure], key: str, *arguments: Any) -> str:
    """Call `draw(*arguments)` under the page's style and return the figure as inline SVG; `key` keeps its ids apart from the others'."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({**style(), "svg.hashsalt": key}):
        draw(*arguments).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "var(--page, #fff)")
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{key}-", text)
    return text.replace("<svg ", '<svg role="img" ', 1)


def new_figure(height: float) -> Figure:
    """An empty figure, 7 inches wide."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7.0, height))


def legend_text(text: str) -> str:
    """A label as matplotlib's legends want it: short, and not starting with `_`, which would hide it."""
    short = text if len(text) <= 42 else text[:41] + "…"
    return f" {short}" if short.startswith("_") else short


def depth_colours() -> Any:
    """Viridis without its two ends, which a dark and a white page would swallow."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.2, 0.87, 48)))


def update_axis(axes: Axes, most_ticks: int, label: str = "update") -> None:
    """Name the x axis of updates and write its ticks as 20k."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(most_ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.set_xlabel(label)


def data_axis(axes: Axes, ratio: float, unit: str) -> None:
    """A second x axis at the top: tokens or images seen, `ratio` of them in each update; nothing where the ratio is unknown."""
    from matplotlib.ticker import FuncFormatter

    if math.isfinite(ratio):
        top = axes.secondary_xaxis("top", functions=(lambda step: step * ratio, lambda seen: seen / ratio))
        top.xaxis.set_major_formatter(FuncFormatter(short_number))
        top.set_xlabel(f"{unit} seen")
        top.spines["top"].set_visible(True)


def block_axis(axes: Axes, modules: Modules, most_ticks: int = 12) -> None:
    """Name the x axis of depth and its ticks after the blocks."""
    rows, names, prefix = short_rows(modules)
    every = max(1, math.ceil(len(rows) / most_ticks))
    long = max(len(name) for name in names[::every]) > 3
    axes.set_xticks(range(0, len(rows), every), names[::every], rotation=60 if long else 0, ha="right" if long else "center")
    axes.set_xlabel(f"block ({prefix}*)" if prefix else "block")


# -------------------------------------------------------------------------------------------------------------- drawing: figures


def lowest(values: np.ndarray) -> list[float]:
    """[the value that 0.5 % of the known values lie below], [] where none is known: the noise's floor without its outliers."""
    known = values[np.isfinite(values)]
    return [float(np.quantile(known, 0.005))] if len(known) else []


def loss_limits(runs: Sequence[Run]) -> tuple[float, float] | None:
    """(bottom, top) of the loss axis; None to show everything.

    The loss of the first updates is several times the later range and would press the rest flat: the axis is fitted to what comes
    after the first 4 % of the updates.
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
    """The running mean of the training loss, the logged values behind it if `raw`."""
    steps, loss = column(run.training, "update_step"), column(run.training, "loss")
    few = len(steps) < 5
    if raw and not few:
        every = max(1, len(steps) // 3000)  # more points than pixels only make the page heavy
        axes.plot(steps[::every], loss[::every], color=colour, alpha=0.4, linewidth=0.6, label="training, each logged update")
    if len(steps):
        window = smoothing_window(run)
        axes.plot(steps, loss if few else running_mean(loss, window), color=colour, marker="o" if few else "", markersize=4, label=label)


def draw_validation(axes: Axes, run: Run, colour: str, marker: str, label: str | None, joined: bool) -> None:
    """The validation losses as points, joined by a thin line if `joined`."""
    steps, loss = column(run.evaluations, "update_step"), column(run.evaluations, "eval_loss")
    size = 4.5 if len(steps) <= 30 else 2.5
    axes.plot(
        steps, loss, color=colour, marker=marker, markersize=size, markeredgecolor=PAPER, markeredgewidth=0.5,
        linestyle="-" if joined else "", linewidth=0.8, label=label, zorder=3,
    )  # fmt: skip


def loss_figure(run: Run) -> Figure:
    """Figure 1 of one run: training and validation loss over updates, the learning rate beneath."""
    from matplotlib.ticker import MaxNLocator

    rates = np.isfinite(column(run.training, "lr")).any()
    figure = new_figure(3.9 if rates else 3.1)
    if rates:
        axes, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1])
    else:
        axes = lower = figure.subplots()
    draw_training(axes, run, PALETTE[0], f"training, mean over {smoothing_window(run)} logged updates" if len(run.training) >= 5 else
                  "training", raw=True)  # fmt: skip
    if run.evaluations:
        draw_validation(axes, run, PALETTE[1], "o", "validation", joined=False)
    axes.set_ylabel("loss (nats per token)" if has_perplexity(run) else "loss")
    axes.legend(loc="upper right")
    limits = loss_limits([run])
    if limits:
        axes.set_ylim(*limits)
    if rates:
        lower.plot(column(run.training, "update_step"), column(run.training, "lr"), color=INK, linewidth=1,
                   marker="o" if len(run.training) < 5 else "", markersize=3)  # fmt: skip
        lower.set_ylabel("learning rate")
        lower.set_ylim(bottom=0)
        lower.yaxis.set_major_locator(MaxNLocator(3))
        figure.align_ylabels([axes, lower])
    lower.set_xlim(left=0, right=last_update(run) * 1.02 or 1)
    update_axis(lower, 8)
    data_axis(axes, seen_per_update(run), run.unit)
    return figure


def has_perplexity(run: Run) -> bool:
    """True for a language model's run: its losses are nats per token."""
    return bool(np.isfinite(column(run.evaluations, "perplexity")).any()) or "perplexity" in section(run.info, "summary")


def loss_difference(run: Run, first: Run) -> tuple[np.ndarray, np.ndarray]:
    """(steps, validation loss of `run` minus that of `first`) at the steps where both were evaluated."""
    base = dict(zip(column(first.evaluations, "update_step"), column(first.evaluations, "eval_loss"), strict=True))
    shared = [row for row in run.evaluations if row["update_step"] in base]
    steps = column(shared, "update_step")
    return steps, column(shared, "eval_loss") - np.array([base[step] for step in steps])


def comparison_figure(runs: Sequence[Run]) -> Figure:
    """Losses of all runs, the difference in validation loss to the first, the mean decay and the learning rate, over updates."""
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
        for panel, key in ((decay, "weight_decay"), (rate, "lr")):  # these often coincide: dashes let the run beneath show
            dashes = ("-", "--", ":", "-.")[i % 4]
            panel.plot(steps, column(run.training, key), color=colour, linewidth=1.2, linestyle=dashes, marker=dot, markersize=3)
    limits = loss_limits(runs)
    if limits:
        axes.set_ylim(*limits)
    axes.legend(loc="upper right", title="line: training (running mean); points: validation")
    axes.get_legend().get_title().set_fontsize(7.5)
    gap.axhline(0, color=INK, linewidth=0.5, alpha=0.5, zorder=0)
    for panel, label in ((axes, "loss"), (gap, "validation loss\nminus first run's"), (decay, "mean decay"), (rate, "learning\nrate")):
        panel.set_ylabel(label)
    for panel in (decay, rate):
        panel.set_ylim(bottom=0)
        panel.locator_params(axis="y", nbins=3)
    rate.set_xlim(0, max(last_update(run) for run in runs) * 1.02 or 1)
    update_axis(rate, 8)
    figure.align_ylabels()
    ratios = [seen_per_update(run) for run in runs]
    same_unit = len({run.unit for run in runs}) == 1
    if same_unit and np.ptp(ratios) < 0.01 * ratios[0]:  # false for nan: no axis unless every run has as much in an update
        data_axis(axes, ratios[0], runs[0].unit)
    return figure


def over_time_figure(modules: Modules, values: np.ndarray, name: str, base: float | None) -> Figure:
    """Figures 2 and 3: one small panel for each module type, one line for each module coloured by depth, the mean of the type thick.

    values is [updates, modules]; `base` draws a thin level line (eta among the decays).
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
            axes.plot(modules.steps, values[:, i], color=colours(rows.index(modules.rows[i]) / deepest), linewidth=0.8,
                      marker="." if len(modules.steps) < 4 else "", markersize=4)  # fmt: skip
        if len(members) > 1:
            axes.plot(modules.steps, mean_of_known(values[:, members]), color=INK, linewidth=1.7)
        if base is not None:
            axes.axhline(base, color=INK, linewidth=0.6, linestyle=(0, (4, 3)), alpha=0.6, zorder=0)
        axes.set_title(kind, pad=3)
        update_axis(axes, 4, "")
    for position, axes in enumerate(grid):
        if position >= len(kinds):
            axes.set_axis_off()
        elif position + wide >= len(kinds):  # nothing beneath: this panel carries the names of the axis
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("update")
    for axes in grid[::wide]:
        axes.set_ylabel(name)
    add_depth_bar(figure, grid, len(kinds), modules)
    return figure


def mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without the nan; nan where nothing is known."""
    known = np.isfinite(values)
    return np.where(known.any(axis=-1), np.where(known, values, 0).sum(axis=-1) / np.maximum(known.sum(axis=-1), 1), np.nan)


def add_depth_bar(figure: Figure, grid: np.ndarray, used: int, modules: Modules) -> None:
    """The legend of depth: a colour bar in the last empty panel of the grid, or at the right where every panel is used."""
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
        grid[-1].legend([Line2D([], [], color=INK, linewidth=1.7)], ["mean of the type"], loc="upper center", bbox_to_anchor=(0.5, 0.98))
    else:
        bar = figure.colorbar(mapping, ax=grid.tolist(), aspect=30, pad=0.015)
    bar.solids.set_rasterized(False)
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    ends = [0, len(rows) // 2, len(rows) - 1] if len(rows) > 2 else [0, 1]
    long = used < len(grid) and max(len(names[i]) for i in ends) > 8
    bar.set_ticks(ends[:: len(ends) - 1] if long else ends, labels=[names[i] for i in (ends[:: len(ends) - 1] if long else ends)])
    bar.set_label("block")


def by_type_figure(modules: Modules, panels: Sequence[tuple[str, np.ndarray, float | None]]) -> Figure:
    """Figures 2 and 3 of a run with a single update: a strip of points for each type instead of lines of one point.

    panels holds (axis name, values [1, modules], level line) of each strip chart.
    """
    kinds, rows = types_in_order(modules, modules.balanced), short_rows(modules)[0]
    colours, deepest = depth_colours(), max(len(rows) - 1, 1)
    figure = new_figure(2.5)
    grid = figure.subplots(1, len(panels), squeeze=False).ravel()
    for axes, (name, values, base) in zip(grid, panels, strict=True):
        for i in np.flatnonzero(modules.balanced):
            depth = rows.index(modules.rows[i]) / deepest
            axes.plot(kinds.index(modules.types[i]) + 0.5 * (depth - 0.5), values[0, i], "o", color=colours(depth), markersize=3.5)
        if base is not None:
            axes.axhline(base, color=INK, linewidth=0.6, linestyle=(0, (4, 3)), alpha=0.6, zorder=0)
        axes.set_xticks(range(len(kinds)), kinds, rotation=40, ha="right")
        axes.set_xlim(-0.6, len(kinds) - 0.4)
        axes.set_ylabel(name)
    add_depth_bar(figure, grid, len(grid), modules)
    return figure


def cell_means(modules: Modules, values: np.ndarray, rows: list[str], kinds: list[str]) -> np.ndarray:
    """values [modules] as a table [rows, types]; modules that share a cell (the experts of one block) are averaged."""
    table = np.full((len(rows), len(kinds)), np.nan)
    for r, row in enumerate(rows):
        for k, kind in enumerate(kinds):
            members = [i for i in range(len(values)) if modules.rows[i] == row and modules.types[i] == kind]
            if members:
                table[r, k] = mean_of_known(values[members])
    return table


def heat_map_figure(run: Run, modules: Modules) -> Figure:
    """Figure 4: the last decays as colours, block by type, with the statistic that set them printed in each cell."""
    import matplotlib

    rows, names, prefix = short_rows(modules)
    kinds = types_in_order(modules)
    label, decays = decay_in_eta(run, modules)
    colour = cell_means(modules, np.where(modules.balanced, decays[-1], np.nan), rows, kinds)
    printed = cell_means(modules, shown_statistic(run, modules)[1][-1], rows, kinds)
    present = {(modules.rows[i], modules.types[i]) for i in range(len(modules.names))}
    figure = new_figure(0.75 + max(len(rows), 5) * (0.2 if len(rows) <= 40 else 0.15))
    axes = figure.subplots()
    lowest, highest = (np.nanmin(colour), np.nanmax(colour)) if np.isfinite(colour).any() else (0.0, 1.0)
    palette = matplotlib.colormaps["cividis"].resampled(64)
    mesh = axes.pcolormesh(np.ma.masked_invalid(colour), cmap=palette, vmin=lowest, vmax=highest, edgecolors=PAPER, linewidth=0.8)
    for r, row in enumerate(rows):
        for k, kind in enumerate(kinds):
            if (row, kind) in present:
                relative = (colour[r, k] - lowest) / ((highest - lowest) or 1)
                ink = INK if np.isnan(relative) else ("#ffffff" if relative < 0.5 else "#000001")
                axes.text(k + 0.5, r + 0.5, cell_text(printed[r, k]), color=ink, ha="center", va="center_baseline", fontsize=6.5)
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, rotation=0 if len(kinds) <= 8 else 40)
    axes.set_yticks(np.arange(len(rows)) + 0.5, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(f"block ({prefix}*)" if prefix else "block")
    axes.invert_yaxis()
    bar = figure.colorbar(mesh, ax=axes, aspect=25, pad=0.015)
    bar.solids.set_rasterized(False)
    bar.solids.set_edgecolor("face")
    bar.outline.set_visible(False)
    bar.set_label(label)
    return figure


def cell_text(value: float) -> str:
    """A statistic in at most five characters."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 or value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def depth_figure(run: Run, modules: Modules) -> Figure:
    """Figure 5: the statistic against depth, one line for each type, at the first and at the last update."""
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
            axes.plot(np.arange(len(rows))[known], table[known, k], color=PALETTE[k % len(PALETTE)], marker=MARKERS[k % len(MARKERS)],
                      markersize=3.2, linewidth=1, linestyle="-" if k < len(PALETTE) else "--",
                      markerfacecolor=PALETTE[k % len(PALETTE)] if k < len(PALETTE) else PAPER)  # fmt: skip
        axes.set_title(moment_name(modules.steps[moment]))
        block_axis(axes, modules)
        axes.set_xlim(-0.5, len(rows) - 0.5)
    grid[0].set_ylabel(name)
    figure.legend(grid[0].get_lines(), [legend_text(kind) for kind in kinds], loc="outside right center", labelspacing=0.7)
    return figure


# --------------------------------------------------------------------------------------------------------------------- the page


def escape(value: Any) -> str:
    """Any value as HTML text."""
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """An HTML table of plain texts, escaped here; the first column holds names."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr><th>" + escape(row[0]) + "</th>" + "".join(f"<td>{escape(c)}</td>" for c in row[1:]) + "</tr>" for row in rows)
    return f'<table class="{kind}">' + (f"<thead><tr>{top}</tr></thead>" if top else "") + f"<tbody>{body}</tbody></table>"


def figure_html(position: int, svg: str, caption: str) -> str:
    """A numbered figure with its caption (plain text)."""
    return f"<figure>{svg}<figcaption><b>Figure {position}.</b> {escape(caption)}</figcaption></figure>"


def method_name(run: Run) -> str:
    """The method in words: what the arguments call it, or what the files show."""
    given = run.argument("method", "decay_method")
    if isinstance(given, str):
        return given
    if run.modules is None:
        means = column(run.training, "weight_decay")
        means = means[np.isfinite(means)]
        if len(means) and np.ptp(means) > 1e-6 * abs(means).max():
            return "one decay for the whole network, changing over time"
        return "no weight decay" if run.eta == 0 else "uniform weight decay"
    bounds = [run.argument("wd_min_ratio"), run.argument("wd_max_ratio")]
    details = [str(part) for part in (run.argument("esd_metric_for_tb"), run.argument("assign_func")) if part]
    details += [f"{bounds[0]} η to {bounds[1]} η"] if None not in bounds else []
    return "decay by module" + (f" ({', '.join(details)})" if details else "")


def run_line(run: Run) -> str:
    """One line that says what the run was: model, size, method, optimizer, eta, updates, data, device."""
    model = run.argument("model_config", "model", "model_name") or section(run.info, "model_config").get("model_type")
    parts = [Path(model).stem if isinstance(model, str) and model.endswith(".json") else model]
    size, eta, planned = number(run.info, "parameters"), run.eta, run.argument("num_training_steps")
    parts.append(f"{short_number(float(f'{size:.3g}'))} parameters" if math.isfinite(size) else None)
    parts += [method_name(run), run.argument("optimizer")]
    parts.append(f"η = {eta:g}" if math.isfinite(eta) else None)
    done = last_update(run)
    parts.append(f"{done:,} of {planned:,} updates" if isinstance(planned, int) and planned != done else f"{done:,} updates")
    seen = seen_so_far(run)
    parts.append(f"{short_number(float(f'{seen:.3g}'))} {run.unit}" if math.isfinite(seen) else None)
    parts.append(run.info.get("device"))
    return " · ".join(part if isinstance(part, str) else escape(part) for part in parts if part is not None)


def analysis_cost(run: Run) -> tuple[float, float]:
    """(mean seconds of one analysis, share of the run's time), nan where run.json has no summary or no module was analysed."""
    summary = section(run.info, "summary")
    if run.modules is None:
        return math.nan, math.nan
    return number(summary, "analysis_seconds") / (number(summary, "analyses") or math.nan), number(summary, "analysis_share")


def result_rows(run: Run) -> list[tuple[str, str]]:
    """(name, value) of each line in the result table."""
    evaluation, (seconds, share) = final_evaluation(run), analysis_cost(run)
    rows: list[tuple[str, str]] = []
    if evaluation is None:
        rows.append(("validation", "not evaluated yet"))
    else:
        word = "final" if evaluation.get("final") is True else f"latest (update {int(evaluation['update_step']):,})"
        rows.append((f"{word} validation loss", shown(number(evaluation, "eval_loss"))))
        rows.append((f"{word} validation perplexity", shown(number(evaluation, "perplexity"), "{:.2f}")))
        rows.append(("reference perplexity ¹", shown(number(evaluation, "reference_perplexity"), "{:.2f}")))
        rows += [(key, shown(number(evaluation, key))) for key in other_results(evaluation)]
    rows.append((f"{run.unit} seen", shown(seen_so_far(run), "{:,.0f}")))
    rows.append((f"{run.unit} per second", shown(throughput(run), "{:,.0f}")))
    rows.append(("MFU", shown(100 * utilisation(run), "{:.1f} %")))
    rows.append(("seconds of one analysis", shown(seconds, "{:.3g}")))
    rows.append(("analysis, share of the run", shown(100 * share, "{:.2g} %")))
    return [row for row in rows if row[1] != "–"]


def other_results(evaluation: dict[str, Any]) -> list[str]:
    """The fields of an evaluation that are shown under their own names, as accuracies are."""
    return [key for key in evaluation if key not in EVALUATION_FIELDS]


def reference_note(runs: Sequence[Run]) -> str:
    """The footnote on reference perplexity, where any run has one."""
    if not any(math.isfinite(number(final_evaluation(run) or {}, "reference_perplexity")) for run in runs):
        return ""
    text = (
        "The reference implementation's evaluation counts one batch too many and reports exp(L·n/(n+1)) for n batches of mean loss L; "
        "given only to compare with published tables."
    )
    return f'<p class="note">¹ {escape(text)}</p>'


def module_figures(run: Run, position: int) -> str:
    """Figures about the modules, numbered from `position`; a sentence where the run has none."""
    modules = run.modules
    if modules is None:
        return "<p>No figures of single modules: this run set no decay by module (modules.jsonl is empty or missing).</p>"
    name, values = shown_statistic(run, modules)
    decay_name, decays = decay_in_eta(run, modules)
    base = 1.0 if run.eta > 0 else None
    drawn = modules.balanced.any() and np.isfinite(values[:, modules.balanced]).any()
    parts: list[tuple[str, str]] = []
    if drawn and len(modules.steps) == 1:
        strip = as_svg(by_type_figure, f"f{position}", modules, [(name, values, None), (decay_name, decays, base)])
        dashed = " Dashed: η." if base else ""
        parts.append((strip, f"{definition(name)} and decay of every balanced module by type, at this run's only analysis.{dashed}"))
    elif drawn:
        lines = "One line for each module, coloured by depth; thick: the mean of the type."
        svg = as_svg(over_time_figure, f"f{position}", modules, values, name, None)
        parts.append((svg, f"{definition(name)} of every balanced module. {lines}"))
        svg = as_svg(over_time_figure, f"f{position + 1}", modules, decays, decay_name, base)
        parts.append((svg, f"Decay of every balanced module{' in units of η (dashed)' if base else ''}. {lines}"))
    if np.isfinite(decays[-1]).any():
        svg = as_svg(heat_map_figure, f"f{position + len(parts)}", run, modules)
        rest = "" if modules.balanced.all() else " Without colour: not balanced, keeps η."
        parts.append((svg, f"Decays (colour) and {name} (number) of every module, {moment_name(modules.steps[-1])}.{rest}"))
    if np.isfinite(values).any():
        svg = as_svg(depth_figure, f"f{position + len(parts)}", run, modules)
        when = "first and the last" if len(modules.steps) > 1 else "only"
        parts.append((svg, f"{name} of every module against depth at the {when} analysis."))
    return "".join(figure_html(position + i, svg, caption) for i, (svg, caption) in enumerate(parts)) + flagged_modules(modules)


def flagged_modules(modules: Modules, most: int = 40) -> str:
    """A table of the modules whose alpha was undefined, and why; nothing where there are none."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, step, reason in modules.reasons:
        groups.setdefault((name, reason), []).append(step)
    if not groups:
        return ""
    rows = [(name, reason, f"{len(steps)} of {len(modules.steps)}", f"{steps[-1]:,}") for (name, reason), steps in groups.items()]
    more = f'<p class="note">and {len(rows) - most} more in modules.jsonl</p>' if len(rows) > most else ""
    return "<h2>Modules without alpha</h2>" + table(("module", "why", "updates", "last at"), rows[:most], "texts") + more


def details(run: Run, summary: str) -> str:
    """Everything run.json says, folded away."""
    info = run.info
    named = ("arguments", "model_config", "versions", "summary")
    parts = [("run", {"folder": run.folder.name, **{key: value for key, value in info.items() if key not in named}})]
    parts += [(key.replace("_", " "), section(info, key)) for key in named]
    tables = [
        f"<h3>{escape(title)}</h3>" + table((), [(str(key), value if isinstance(value, str) else json.dumps(value, default=str))
                                                for key, value in values.items()], "texts")
        for title, values in parts if values
    ]  # fmt: skip
    return f"<details><summary>{escape(summary)}</summary>{''.join(tables)}</details>"


def loss_caption(runs: Sequence[Run]) -> str:
    """The caption's second half of a loss figure: what lies outside its frame."""
    limits = loss_limits(runs)
    highest = max((value for run in runs for value in column(run.training, "loss") if math.isfinite(value)), default=math.nan)
    return f" The first updates (loss up to {highest:.2f}) lie above the frame." if limits and highest > limits[1] else ""


def single_page(run: Run) -> str:
    """The body of one run's report."""
    lower = " Beneath: the learning rate." if np.isfinite(column(run.training, "lr")).any() else ""
    parts = [
        f'<h1>{escape(run.label)}</h1><p class="lead">{escape(run_line(run))}</p>',
        table((), result_rows(run)),
        reference_note([run]),
        figure_html(1, as_svg(loss_figure, "f1", run), f"Training and validation loss.{lower}{loss_caption([run])}"),
        module_figures(run, 2),
        details(run, "All arguments, model config and versions"),
    ]
    return "\n".join(parts)


def differing_arguments(runs: Sequence[Run]) -> list[list[str]]:
    """Rows (argument, value in each run) of the arguments in which the runs differ."""
    arguments = [section(run.info, "arguments") for run in runs]
    names = dict.fromkeys(name for one in arguments for name in one)
    rows = [[name] + [json.dumps(one[name], default=str) if name in one else "–" for one in arguments] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def comparison_row(run: Run) -> dict[str, str]:
    """What the table of results says of a run, by the names of its columns."""
    evaluation, (seconds, share) = final_evaluation(run) or {}, analysis_cost(run)
    return {
        "run": run.label,
        "method": method_name(run),
        "update": f"{int(evaluation['update_step']):,}" if evaluation else "–",
        "validation loss": shown(number(evaluation, "eval_loss")),
        "perplexity": shown(number(evaluation, "perplexity"), "{:.2f}"),
        "reference perplexity ¹": shown(number(evaluation, "reference_perplexity"), "{:.2f}"),
        **{key: shown(number(evaluation, key)) for key in other_results(evaluation)},
        f"{run.unit}/s": shown(throughput(run), "{:,.0f}"),
        "MFU": shown(100 * utilisation(run), "{:.1f} %"),
        "s per analysis": shown(seconds, "{:.3g}"),
        "share": shown(100 * share, "{:.2g} %"),
    }


def comparison_page(runs: Sequence[Run]) -> str:
    """The body of a report of several runs: results, what differs, and the curves over one another."""
    rows = [comparison_row(run) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    head = [name for name in columns if any(row.get(name, "–") != "–" for row in rows)]
    results = [[row.get(name, "–") for name in head] for row in rows]
    unfinished = [run.label for run in runs if (final_evaluation(run) or {}).get("final") is not True]
    differences = differing_arguments(runs)
    caption = f"Losses, validation loss minus that of {runs[0].label}, parameter-weighted mean decay, and learning rate."
    parts = [
        f"<h1>{escape(' vs. '.join(run.label for run in runs))}</h1>",
        *(f'<p class="lead"><b>{escape(run.label)}</b>: {escape(run_line(run))}</p>' for run in runs),
        "<h2>Final validation</h2>" + table(head, results, "results"),
        f'<p class="note">Latest, not final, evaluation: {escape(", ".join(unfinished))}.</p>' if unfinished else "",
        reference_note(runs),
        figure_html(1, as_svg(comparison_figure, "f1", runs), caption + loss_caption(runs)),
        "<h2>Arguments that differ</h2>" if differences else "<p>The runs' arguments are the same.</p>",
        table(("argument", *(run.label for run in runs)), differences, "texts") if differences else "",
        *(details(run, f"All arguments, model config and versions of {run.label}") for run in runs),
    ]
    return "\n".join(parts)


def page(title: str, body: str) -> str:
    """A whole HTML document around `body`."""
    css = """
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --faint: #5f6368; --rule: #d9d9d9; }
@media (prefers-color-scheme: dark) { :root { --page: #17191c; --text: #e6e6e6; --faint: #a0a4a8; --rule: #3a3d42; } }
@media print { :root { --page: #fff; --text: #000; --faint: #444; --rule: #bbb; } body { padding: 0; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif;
       max-width: 58rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; } h3 { font-size: 1rem; }
.lead { margin: 0 0 .4rem; color: var(--faint); } .note { color: var(--faint); font-size: .85rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
table { border-top: 1.5px solid; border-bottom: 1.5px solid; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; } tbody th { font-weight: normal; }
thead th { border-bottom: 1px solid; font-weight: 600; } td { text-align: right; } thead th:not(:first-child) { text-align: right; }
td:last-child, th:last-child { padding-right: 0; }
.results td, .results th { overflow-wrap: normal; } .results td:nth-child(2), .results th:nth-child(2) { text-align: left; }
.texts td, .texts thead th:not(:first-child) { text-align: left; } .texts { font-size: .85rem; width: 100%; }
figure { margin: 2.2rem 0; break-inside: avoid; } figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: .9rem; color: var(--faint); margin-top: .4rem; } details { margin-top: 2rem; } summary { cursor: pointer; }
"""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{css}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


# ------------------------------------------------------------------------------------------------------------------- the command


def write_atomically(path: Path, text: str) -> None:
    """Write the file under a temporary name and rename it: a reader sees the old page or the new one, never half of one."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from None


def name_apart(runs: Sequence[Run]) -> None:
    """Give runs of the same name labels that tell them apart: the folder's name, and a number where that is the same too."""
    for label_of in (lambda run, i: run.folder.resolve().name, lambda run, i: f"{run.label} #{i + 1}"):
        labels = [run.label for run in runs]
        for i, run in enumerate(runs):
            if labels.count(run.label) > 1:
                run.label = label_of(run, i)


def write_report(run_folder: Path | str, *others: Path | str, output: Path | str | None = None) -> Path:
    """Write the report of a run, or of several side by side, and return its path.

    run_folder, others: folders that hold run.json, metrics.jsonl and perhaps modules.jsonl.
    output: the file to write; by default report.html in the run's folder, or comparison.html in the first run's folder for several.
    Raises UserError for a folder that is no run, a run without metrics, a broken line (a torn last line is left out) and a path that
    cannot be written.
    """
    runs = [read_run(folder) for folder in (run_folder, *others)]
    name_apart(runs)
    path = Path(output) if output is not None else Path(run_folder) / ("comparison.html" if others else "report.html")
    body = comparison_page(runs) if others else single_page(runs[0])
    write_atomically(path, page(" vs. ".join(run.label for run in runs), body))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 and the report's path on stdout, or 2 and one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m peft_pretraining.report", description="Write a run's report, or compare several runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; several are set side by side")
    parser.add_argument("--output", metavar="FILE", help="the HTML file (default: RUN/report.html, or RUN/comparison.html for several)")
    options = parser.parse_args(arguments)
    try:
        print(write_report(*options.runs, output=options.output))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
