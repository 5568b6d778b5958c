"""Draw the figures of scripts/paper/figures.py."""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alphadecay import PowerLaw, UndefinedPowerLaw, eigenvalues, fit_power_law
from alphadecay.cli.presets import method_name
from alphadecay.modules import block_of
from peft_pretraining.checkpoint.find import newest_checkpoint
from peft_pretraining.checkpoint.format import WEIGHTS, step_of
from peft_pretraining.errors import UserError
from peft_pretraining.records import reader
from peft_pretraining.records.reader import Modules, Run
from peft_pretraining.report import plots
from peft_pretraining.report.html import method_name as described_method
from peft_pretraining.report.plots import MARKERS, PALETTE, USUAL_ORDER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


COLUMN, PAGE = 3.4, 7.0  # inches: one column, two columns
# Smaller eigenvalues are left out of the histograms: those of a square matrix of n rows go down to
# about n^-2 of the largest, and rounding leaves some 1e-17 of it where there are none.
LOWEST = 1e-6
RESULTS = {
    "perplexity": "validation perplexity",
    "top1": "top-1 accuracy (%)",
}  # field of an evaluation -> its axis
REPRODUCIBLE_METADATA = {
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
    "png": None,
}  # the same runs give the same file


class Entry(NamedTuple):
    """A run, and what sets it apart from the others in a figure.

    Attributes:
        run: the run.
        method: its name; with the model where the runs have several.
        optimizer: its name.
        eta: the weight decay that the user set.
        colour: number of the method, which is its colour.
    """

    run: Run
    method: str
    colour: int
    optimizer: str
    eta: float


def entries_of(runs: Sequence[Run]) -> list[Entry]:
    """Return the runs, ordered by method, optimizer and eta.

    Methods and optimizers stand in the order in which they first occur.
    """
    models = [
        Path(str(run.argument("model_config", "model") or "model")).name.removesuffix(".json")
        for run in runs
    ]
    methods = [
        method_of(run) + (f" {model}" if len(set(models)) > 1 else "")
        for run, model in zip(runs, models, strict=True)
    ]
    optimizers = [str(run.argument("optimizer") or "unknown optimizer") for run in runs]
    colours = [list(dict.fromkeys(methods)).index(method) for method in methods]
    entries = [
        Entry(run, *rest, run.eta)
        for run, *rest in zip(runs, methods, colours, optimizers, strict=True)
    ]
    return sorted(
        entries, key=lambda entry: (entry.colour, optimizers.index(entry.optimizer), entry.eta)
    )


def method_of(run: Run) -> str:
    """Return the method's name as in names of runs, or in words if run.json lacks a flag."""
    try:
        return method_name(reader.section(run.info, "arguments"))
    except KeyError:
        return described_method(run)


def grouped(entries: Iterable[Entry], *keys: str) -> dict[tuple, list[Entry]]:
    """Group the entries by these fields, in the order in which they occur."""
    groups: dict[tuple, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(tuple(getattr(entry, key) for key in keys), []).append(entry)
    return groups


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (n - 1) of the finite values.

    The standard deviation of fewer than two values is NaN.
    """
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan, float(np.std(known, ddof=1)) if len(
        known
    ) > 1 else math.nan


def usual(kinds: Iterable[str]) -> list[str]:
    """Return the distinct types: first those of a transformer's projections, in usual order."""
    return sorted(
        dict.fromkeys(kinds),
        key=lambda kind: (*USUAL_ORDER, "qkv", "proj", "fc1", "fc2", kind).index(kind),
    )


# ----------------------------------------------------------------------------------- drawing: tools


def style() -> dict[str, Any]:
    """Return matplotlib's settings: those of the report, on white, with embedded fonts."""
    black = {key: "black" for key, value in plots.style().items() if value == plots.FOREGROUND}
    return {
        **plots.style(),
        **black,
        "legend.fontsize": 7,
        "pdf.fonttype": 42,
        "svg.hashsalt": "figures",
        "errorbar.capsize": 1.5,
    }


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this width and height, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def look(colour: int, marker: int, hollow: bool = False) -> dict[str, Any]:
    """Return colour and marker for these numbers.

    Beyond the palette the colours repeat, with dashed lines and hollow markers.
    """
    again, ink = colour >= len(PALETTE), PALETTE[colour % len(PALETTE)]
    return {
        "color": ink,
        "marker": MARKERS[marker % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 1,
        "elinewidth": 0.8,
        "linestyle": "--" if again else "-",
        "markerfacecolor": "white" if again or hollow else ink,
    }


def panels(count: int, share: bool) -> tuple[Figure, list[Axes], list[Axes]]:
    """Return a figure of small panels, four in a row.

    Args:
        count: number of panels.
        share: give all panels the same axes.

    Returns:
        The figure, its panels, and the empty places of the last row.
    """
    wide = min(4, count)
    tall = math.ceil(count / wide)
    figure = new_figure(PAGE if wide > 2 else COLUMN, 0.9 + 1.35 * tall)
    grid = figure.subplots(tall, wide, sharex=share, sharey=share, squeeze=False).ravel().tolist()
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count], grid[count:]


def add_legend(
    figure: Figure,
    shown: dict[str, Any],
    columns: int,
    free: Sequence[Axes] = (),
    title: str | None = None,
) -> None:
    """Add a legend: in an empty panel if there is one, otherwise above the axes.

    Args:
        shown: label -> the artist that it explains.
    """
    place = (
        {"loc": "center"}
        if free
        else {
            "loc": "outside upper center",
            "ncols": min(columns, len(shown)),
            "columnspacing": 1.2,
        }
    )
    labels = [plots.legend_text(text) for text in shown]
    (free[-1] if free else figure).legend(
        shown.values(), labels, title=title, title_fontsize=8, handletextpad=0.5, **place
    )


def power_of_ten(value: float, _position: int | None = None) -> str:
    """Format a number for a tick: 0.01 as 0.01, 3e-5 as 3·10⁻⁵, 1e-5 as 10⁻⁵.

    matplotlib calls tick formatters with a second argument, which is not used.
    """
    if value <= 0 or 0.01 <= value < 1000:
        return f"{value:g}"
    digits, exponent = f"{value:.2e}".split("e")
    factor = "" if float(digits) == 1 else f"{float(digits):g}·"
    return factor + "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# --------------------------------------------------------------------------------- drawing: figures


def type_means(modules: Modules) -> dict[str, float]:
    """Return the mean alpha of each type of balanced module at the last analysis that has any."""
    alpha = np.where(modules.balanced, modules.alpha, np.nan)
    known = np.isfinite(alpha).any(axis=1)
    if not known.any():
        return {}
    last = alpha[known][-1]
    kinds = plots.types_in_order(modules, np.isfinite(last))
    return {kind: float(np.nanmean(last[np.array(modules.types) == kind])) for kind in kinds}


def alpha_by_type(entries: Sequence[Entry]) -> Figure:
    """Draw the mean alpha of each module type, with a colour for each method.

    Where a method has several optimizers or etas, each has its own point.
    """
    means = {
        id(entry.run): entry.run.modules
        and type_means(entry.run.modules)
        or checkpoint_means(entry.run)
        for entry in entries
    }
    entries = [entry for entry in entries if means.get(id(entry.run))]
    if not entries:
        raise UserError(
            "no alpha_by_type: no run has an alpha in modules.jsonl or a checkpoint to read it "
            "off; give runs that kept one"
        )
    kinds = usual(kind for entry in entries for kind in means[id(entry.run)])
    groups, optimizers = (
        grouped(entries, "method", "optimizer", "eta"),
        list(grouped(entries, "optimizer")),
    )
    figure, shown = (
        new_figure(
            PAGE if len(groups) * len(kinds) > 28 else COLUMN,
            2.3 + 0.12 * math.ceil(len(groups) / 2),
        ),
        {},
    )
    axes = figure.subplots()
    for i, ((method, optimizer, eta), members) in enumerate(groups.items()):
        spreads = [
            mean_and_std([means[id(entry.run)].get(kind, math.nan) for entry in members])
            for kind in kinds
        ]
        places = np.arange(len(kinds)) + 0.7 * ((i + 0.5) / len(groups) - 0.5)
        label = method + (f", {optimizer}" if len(optimizers) > 1 else "")
        label += (
            f", η = {power_of_ten(eta)}"
            if sum(key[:2] == (method, optimizer) for key in groups) > 1
            else ""
        )
        drawn = look(members[0].colour, i, hollow=optimizers.index((optimizer,)) % 2 == 1) | {
            "linestyle": ""
        }
        shown[label] = axes.errorbar(places, *np.transpose(spreads), **drawn)
    for edge in range(1, len(kinds)):
        axes.axvline(edge - 0.5, color="0.85", linewidth=0.6, zorder=0)
    narrow = figure.get_figwidth() == COLUMN
    axes.set_xticks(
        range(len(kinds)),
        kinds,
        **({"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if narrow else {}),
    )
    axes.set_xlim(-0.5, len(kinds) - 0.5)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("mean α of the type")
    add_legend(figure, shown, 2 if narrow else 4)
    return figure


def decays(run: Run) -> Figure:
    """Draw decay (bars) and alpha (line) of every module at the last analysis.

    There is one panel for each module type. The horizontal axis is depth.
    """
    modules = run.modules
    if modules is None or not np.isfinite(modules.decay[-1, modules.balanced]).any():
        raise UserError(
            f"no decays of {run.label}: modules.jsonl names no decay of a module; give a run "
            "of a module-wise method"
        )
    from matplotlib.patches import Patch

    (decay_name, decay), (name, statistic) = (
        plots.decay_in_eta(run, modules),
        plots.shown_statistic(run, modules),
    )
    kinds, rows = plots.types_in_order(modules, modules.balanced), plots.short_rows(modules)[0]
    heights, levels = (
        plots.cell_means(modules, values[-1], rows, kinds) for values in (decay, statistic)
    )
    dashed = {"color": "black", "linewidth": 0.6, "linestyle": (0, (4, 3))}
    figure, grid, free = panels(len(kinds), share=True)
    shown = {"decay": Patch(color="0.75")} | (
        {"η": grid[0].axhline(1, **dashed)} if run.eta > 0 else {}
    )
    twins = [axes.twinx() for axes in grid + free] if np.isfinite(levels).any() else []
    for twin in twins[
        1:
    ]:  # before anything is drawn: later the axes would keep the range of the first panel
        twin.sharey(twins[0])
    for k, axes in enumerate(grid):
        axes.bar(
            range(len(rows)),
            np.nan_to_num(heights[:, k]),
            color=PALETTE[k % len(PALETTE)],
            alpha=0.55,
        )
        axes.set_title(kinds[k], pad=3)
        if run.eta > 0 and k:
            axes.axhline(1, **dashed)
        if twins:
            known = np.flatnonzero(np.isfinite(levels[:, k]))
            (shown[name],) = twins[k].plot(
                known, levels[known, k], color="black", marker=".", markersize=4, linewidth=0.8
            )
    outer_axes(grid, free, twins, modules, decay_name, name)
    add_legend(figure, shown, 3, free)
    return figure


def outer_axes(
    grid: list[Axes], free: list[Axes], twins: list[Axes], modules: Modules, left: str, right: str
) -> None:
    """Label the axes at the left and at the bottom of the figure only.

    An empty place in the last row leaves its label to the panel above it.
    """
    for axes in grid + free:
        axes.set_axis_on()
        plots.block_axis(axes, modules, 6)
        axes.set(xlabel="block", ylabel=left)
        axes.label_outer()
    for twin, axes in zip(twins, grid + free, strict=False):
        outer = axes.get_subplotspec().is_last_col()
        twin.spines["right"].set_visible(outer or axes in grid)
        twin.tick_params(right=outer or axes in grid, labelright=outer)
        twin.set_ylabel(right if outer else "")
    for axes in free:
        axes.tick_params(left=False)
    for axes in free + twins:
        axes.spines["left"].set_visible(False)


@contextlib.contextmanager
def block_weights(run: Run) -> Iterator[tuple[Path, Any, list[str]]]:
    """Open the newest checkpoint, and list the matrices and kernels of its blocks.

    Raises:
        UserError: the run has no checkpoint that can be read.
    """
    checkpoint = newest_checkpoint(run.folder)
    if checkpoint is None:
        raise UserError(f"no spectra of {run.label}: the run has no checkpoint")
    try:
        with safe_open(checkpoint / WEIGHTS, "pt") as file:
            keys = [
                key
                for key in file.keys()
                if key.endswith(".weight") and len(file.get_slice(key).get_shape()) in (2, 4)
            ]
            yield checkpoint, file, [key for key in keys if block_of(key)]
    except (
        OSError,
        SafetensorError,
        ValueError,
    ) as error:  # a run that goes on may delete a checkpoint; weights may be nan
        raise UserError(
            f"no spectra of {run.label}: {checkpoint.name} cannot be read ({error})"
        ) from None


def block_spectra(run: Run, number: int | None) -> tuple[str, dict[str, Tensor]]:
    """Return the spectra of one block in the newest checkpoint.

    Args:
        run: the run.
        number: number of the block, counted from 0. None: the middle one.

    Returns:
        A title that names block and update, and the eigenvalues of each module by its name.

    Raises:
        UserError: there is no such block, or no checkpoint.
    """
    with block_weights(run) as (checkpoint, file, keys):
        # Names cut into texts and numbers, which sort as 2 < 10.
        blocks = sorted(
            {block_of(key) for key in keys},
            key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)],
        )
        if not blocks or number is not None and not 0 <= number < len(blocks):
            hint = (
                f"give --block a number from 0 to {len(blocks) - 1}"
                if blocks
                else "its weights are in no numbered block"
            )
            raise UserError(f"no spectra of {run.label}: {hint}")
        block = blocks[len(blocks) // 2 if number is None else number]
        names = {
            key: key.removeprefix(f"{block}.").removesuffix(".weight")
            for key in keys
            if block_of(key) == block
        }
        spectra = {name: eigenvalues(file.get_tensor(key)) for key, name in names.items()}
    short = {name: name.rsplit(".", 1)[-1] for name in spectra}
    if len(set(short.values())) == len(short):
        spectra = {short[name]: values for name, values in spectra.items()}
    return f"{block}\n{plots.analysis_time_label(step_of(checkpoint))}", {
        name: spectra[name] for name in usual(spectra)
    }


def checkpoint_means(run: Run) -> dict[str, float]:
    """Return the mean alpha of each module type in the newest checkpoint.

    For methods that compute no spectra during training.
    """
    alphas: dict[str, list[float]] = {}
    try:
        with block_weights(run) as (_, file, keys):
            for key in keys:
                if fit := fitted_tail(run, eigenvalues(file.get_tensor(key))):
                    alphas.setdefault(key.split(".")[-2], []).append(fit.alpha)
    except UserError:  # it is left out of the figure, as runs without an alpha are
        return {}
    return {kind: float(np.mean(values)) for kind, values in alphas.items()}


def fitted_tail(run: Run, values: Tensor) -> PowerLaw | None:
    """Return the fit that the run's flags ask for, or None if the spectrum has no tail."""
    method, position = run.argument("pl_fitting") or "median", run.argument("xmin_pos") or 2.0
    try:
        return fit_power_law(
            values, method, position, filter_zeros=bool(run.argument("filter_zeros"))
        )
    except UndefinedPowerLaw:
        return None


def draw_spectrum(axes: Axes, values: np.ndarray, fit: PowerLaw | None) -> None:
    """Draw a histogram of eigenvalues over logarithmic bins, and the power law of its tail."""
    inside = values[values > max(0.0, LOWEST * values[-1])]
    if not len(inside):
        return
    edges = np.geomspace(
        inside[0] * 0.999, inside[-1] * 1.001, min(50, max(8, len(inside) // 8)) + 1
    )
    density = np.histogram(inside, edges)[0] / np.diff(edges) / len(values)
    # From far below the frame: a logarithmic axis has no zero to stand on.
    axes.stairs(density, edges, baseline=1e-300, fill=True, color=PALETTE[5], label="eigenvalues")
    drawn = density[density > 0]
    if fit is not None:
        line = np.array([fit.xmin, values[-1]])
        tail = fit.tail / len(values) * (fit.alpha - 1) / fit.xmin * (line / fit.xmin) ** -fit.alpha
        axes.plot(line, tail, color=PALETTE[1], linewidth=1.3, label="fitted power law")
        axes.axvline(
            fit.xmin, color="black", linewidth=0.7, linestyle=":", label="threshold of the fit"
        )
        drawn = np.append(drawn, tail)
    axes.set_ylim(drawn.min() / 2, drawn.max() * 2)


def esd(run: Run, number: int | None) -> Figure:
    """Draw the eigenvalues of each module of a block with the fitted tail, on logarithmic axes.

    The title of each panel gives alpha and the Kolmogorov-Smirnov distance D.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    title, spectra = block_spectra(run, number)
    (figure, grid, free), shown = panels(len(spectra), share=False), {}
    for axes, (name, values) in zip(grid, spectra.items(), strict=True):
        fit = fitted_tail(run, values)
        axes.set_title(
            f"{name}\n" + (f"α = {fit.alpha:.2f}, D = {fit.D:.2f}" if fit else "no tail to fit"),
            pad=3,
        )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="eigenvalue λ" if axes.get_subplotspec().is_last_row() else "",
        )
        axes.set_ylabel("density" if axes.get_subplotspec().is_first_col() else "")
        draw_spectrum(axes, values.cpu().numpy(), fit)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(numticks=5))
            axis.set_major_formatter(FuncFormatter(power_of_ten))
            axis.set_minor_locator(NullLocator())
        shown |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    add_legend(figure, shown, 3, free, title)
    return figure


def final_result(run: Run, field: str) -> float:
    """Return a number of the final evaluation, or NaN if the run has none yet."""
    evaluation = reader.final_evaluation(run) or {}
    return reader.number(evaluation, field) if evaluation.get("final") is True else math.nan


def against_decay(entries: Sequence[Entry], field: str) -> Figure:
    """Draw the final result against eta: one line for each method, one panel for each optimizer.

    Runs without decay are a horizontal line. Points of several methods are moved a little along
    the axis, because their error bars would hide one another.
    """
    entries = [
        entry
        for entry in entries
        if math.isfinite(final_result(entry.run, field)) and entry.eta >= 0
    ]
    if not entries:
        raise UserError(
            f"no {field}_against_decay: no run has a final evaluation; give finished runs"
        )
    methods, optimizers = list(grouped(entries, "method")), grouped(entries, "optimizer")
    columns = 4 if len(optimizers) > 1 else 2
    figure, shown = (
        new_figure(
            PAGE if len(optimizers) > 1 else COLUMN, 2.2 + 0.14 * math.ceil(len(methods) / columns)
        ),
        {},
    )
    grid = figure.subplots(1, len(optimizers), sharey=True, squeeze=False).ravel()
    for axes, ((optimizer,), members) in zip(grid, optimizers.items(), strict=True):
        axes.set_title(optimizer if len(optimizers) > 1 else "")
        for (method, colour), same in grouped(members, "method", "colour").items():
            points = [
                (eta, *mean_and_std([final_result(entry.run, field) for entry in repeats]))
                for (eta,), repeats in grouped(same, "eta").items()
            ]
            if points[0][0] == 0:
                shown[f"{method}, η = 0"] = draw_level(
                    axes, *points.pop(0)[1:], PALETTE[colour % len(PALETTE)]
                )
            if points:
                shift = 10 ** (
                    min(0.04, 0.3 / len(methods))
                    * (methods.index((method,)) - (len(methods) - 1) / 2)
                )
                etas, means, stds = np.transpose(points)
                shown[method] = axes.errorbar(etas * shift, means, stds, **look(colour, colour))
        eta_axis(axes, sorted({entry.eta for entry in members if entry.eta > 0}))
    grid[0].set_ylabel(RESULTS[field])
    add_legend(figure, shown, columns)
    return figure


def draw_level(axes: Axes, mean: float, std: float, colour: str) -> Any:
    """Draw a dashed horizontal line, with its standard deviation as a pale band."""
    if math.isfinite(std):
        axes.axhspan(mean - std, mean + std, color=colour, alpha=0.15, linewidth=0, zorder=0)
    return axes.axhline(mean, color=colour, linewidth=1, linestyle="--", zorder=1)


def eta_axis(axes: Axes, etas: list[float]) -> None:
    """Format the axis of eta: logarithmic, half a decade wider than the etas on each side.

    A few etas are the ticks of the axis.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xlabel("weight decay η")
    if not etas:
        axes.set_xticks([])
        return
    axes.set_xscale("log")
    axes.set_xlim(etas[0] / 3, etas[-1] * 3)
    if len(etas) <= 5:
        axes.xaxis.set_major_locator(FixedLocator(etas))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(power_of_ten))


# ------------------------------------------------------------------------------------- all figures


def planned(runs: Sequence[Run], block: int | None) -> dict[str, Callable[[], Figure]]:
    """Return the functions that draw the figures, by the figures' names.

    A function raises UserError if its figure has nothing to show.
    """
    entries = entries_of(runs)
    fields = [
        field for field in RESULTS if any(field in row for run in runs for row in run.evaluations)
    ] or ["perplexity"]
    return {
        "alpha_by_type": partial(alpha_by_type, entries),
        **{
            f"decays_{run.label}": partial(decays, run)
            for run in [run for run in runs if run.modules is not None] or runs[:1]
        },
        **{f"esd_{run.label}": partial(esd, run, block) for run in runs},
        **{f"{field}_against_decay": partial(against_decay, entries, field) for field in fields},
    }


def draw(
    runs: Sequence[Run], folder: Path, kind: str = "pdf", block: int | None = None
) -> Iterator[Path]:
    """Draw the figures for which the runs have data, and yield the path of each file.

    For each figure that has nothing to show, one sentence is printed to stderr.
    """
    import matplotlib

    written: set[Path] = set()
    for name, figure in planned(runs, block).items():
        buffer = io.BytesIO()
        with matplotlib.rc_context(style()):
            try:
                figure().savefig(buffer, format=kind, dpi=300, metadata=REPRODUCIBLE_METADATA[kind])
            except UserError as error:
                print(error, file=sys.stderr)
                continue
        path = folder / (re.sub(r"[^\w.+=-]+", "_", name) + "." + kind)
        while path in written:  # labels that differ only in what no file name should hold
            path = path.with_stem(path.stem + "_")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
        except OSError as error:
            raise UserError(
                f"--output {folder}: {path} cannot be written ({error.strerror or error}); "
                "give another folder"
            ) from None
        written.add(path)
        yield path
