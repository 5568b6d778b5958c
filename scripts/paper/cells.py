"""Arrange runs as the cells of a table: means over seeds, differences between methods by seed."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from peft_pretraining.errors import UserError
from scripts.paper.published import Layout, deviations
from scripts.paper.results import format_setting, is_missing, parse_value, variations

Key = tuple[str, ...]
# Runs of one cell may differ in these arguments: they do not change what is trained, or they are
# the seed.
IGNORED_ARGUMENTS = {
    "activation_checkpointing", "auto_resume", "batch_size", "compile", "continue_from", "device",
    "dist_eval", "enable_wandb", "eval_every", "fsdp_shard_size", "gradient_accumulation",
    "keep_checkpoints", "keep_every", "log_every", "loss", "method", "name", "no_wandb",
    "num_workers", "on_save_error", "output_dir", "parallel", "pin_mem", "profile", "project",
    "resume", "save_ckpt_num", "save_dir", "save_every", "seed", "single_cuda", "start_epoch",
    "tags", "update_freq", "wandb_name", "workers", "dry_run", "same_settings_only", "beta1",
    "log_dir", "wandb_ckpt", "test_code", "data_source", "tokenizer_name", "save_every_minutes",
    "timeout_minutes", "deterministic",
}  # fmt: skip
# Paths that are different on every machine: only their last part is compared.
PATH_ARGUMENTS = {
    "data_path", "dataset", "eval_data_path", "model_config", "tokenizer", "validation_file",
}  # fmt: skip


def row_label(name: str) -> str:
    """Return the name of the column that holds the labels of table rows for a setting."""
    return f"row: {name}"


def column_label(name: str) -> str:
    """Return the name of the column that holds the labels of table columns for a setting."""
    return f"column: {name}"


def label_names(layout: Layout) -> list[str]:
    """Return the names of the columns whose values together identify a cell."""
    return [row_label(name) for name in layout.rows] + [column_label(n) for n in layout.columns]


# ------------------------------------------------------------------------------- choosing runs


def setting_labels(runs: pd.DataFrame, name: str) -> pd.Series:
    """Return a setting of each run as tables print it."""
    if ("settings", name) not in runs.columns:
        return pd.Series("None", index=runs.index, dtype=object)
    return runs["settings", name].map(format_setting).astype(object)


def settings_of_run(runs: pd.DataFrame, position: Hashable) -> dict[str, Any]:
    """Return the settings that a run has."""
    settings = runs["settings"].loc[position].to_dict()
    return {str(name): value for name, value in settings.items() if not is_missing(value)}


def filter_runs(
    runs: pd.DataFrame, where: dict[str, Key], may_vary: tuple[str, ...] | None
) -> pd.DataFrame:
    """Return the runs that belong to a table.

    Args:
        runs: see `results.read_runs`.
        where: setting -> the values, as tables print them, of which a run must have one.
        may_vary: see `Layout`; None: any setting may vary.
    """
    wanted = pd.Series(True, index=runs.index)
    for name, values in where.items():
        wanted &= setting_labels(runs, name).isin(values)
    if may_vary is not None:
        for position in runs.index[wanted]:
            wanted[position] = variations(settings_of_run(runs, position)) <= set(may_vary)
    return runs[wanted]


def best_value(runs: pd.DataFrame, name: str) -> str:
    """Return the value of a setting with the lowest mean validation loss.

    The mean is over the seeds that all values of the setting have.

    Args:
        runs: see `results.read_runs`.
        name: the setting.

    Raises:
        UserError: if no seed has finished runs of all values.
    """
    losses = pd.DataFrame(
        {
            "value": setting_labels(runs, name),
            "seed": setting_labels(runs, "seed"),
            "loss": runs["results", "eval_loss"],
        }
    )
    losses = losses.dropna(subset=["loss"]).drop_duplicates(["value", "seed"], keep="last")
    by_seed = losses.pivot(index="seed", columns="value", values="loss").dropna()
    if by_seed.empty:
        raise UserError(
            f"no finished runs to choose a {name} from: "
            "each of its values needs one with the same seed"
        )
    return str(by_seed.mean()[losses["value"].unique()].idxmin())


def keep_best_setting(runs: pd.DataFrame, layout: Layout, name: str) -> pd.DataFrame:
    """Return the runs of each cell that have its best value of a setting; see `best_value`."""
    labels = [setting_labels(runs, label) for label in layout.rows + layout.columns]
    kept = pd.Series(False, index=runs.index)
    for _, cell in runs.groupby(labels, sort=False):
        if cell["run", "finished"].any():
            kept[cell.index] = setting_labels(cell, name) == best_value(cell, name)
    return runs[kept]


# --------------------------------------------------------------------------------------- cells


def finished_runs_by_cell(runs: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Return one row per finished run, with the labels of its cell.

    Columns: those of `label_names`, path, seed, rehearsal, deviations (from the published run, see
    `published.deviations`), and the measures of the layout.

    Args:
        runs: see `results.read_runs`.
        layout: the table.

    Raises:
        UserError: if two runs of a cell differ in more than the seed, or do not differ at all.
    """
    finished = runs[runs["run", "finished"]]
    by_cell = pd.DataFrame(index=finished.index)
    for name in layout.rows:
        by_cell[row_label(name)] = setting_labels(finished, name)
    for name in layout.columns:
        by_cell[column_label(name)] = setting_labels(finished, name)
    by_cell["path"] = finished["run", "path"]
    by_cell["seed"] = setting_labels(finished, "seed")
    by_cell["deviations"] = [
        deviations(settings_of_run(finished, position)) for position in finished.index
    ]
    by_cell["rehearsal"] = setting_labels(finished, "rehearsal") == "True"
    results = finished["results"]
    for measure in layout.measures:
        by_cell[measure] = results[measure] if measure in results else np.nan
    for _, cell in by_cell.groupby(label_names(layout), sort=False):
        _check_same_settings(finished, cell)
    return by_cell


def _check_same_settings(runs: pd.DataFrame, cell: pd.DataFrame) -> None:
    """Raise UserError unless the runs of a cell differ in their seed and in nothing else."""
    first = cell.index[0]
    for other in cell.index[1:]:
        names = differences(settings_of_run(runs, first), settings_of_run(runs, other))
        if names:
            raise UserError(
                f"{cell['path'][first]} and {cell['path'][other]} belong to one cell but differ in "
                f"{', '.join(names)}: give --where {names[0]}=VALUE, --pick {names[0]}, "
                "or name it in --columns"
            )
    for _, same_seed in cell.groupby("seed", sort=False):
        if len(same_seed) > 1:
            one, other = same_seed["path"].iloc[:2]
            raise UserError(f"{one} and {other} are the same run: leave one of them out")


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the settings that both runs have, that affect training, and in which they differ."""
    return [
        name
        for name in sorted(one.keys() & other.keys() - IGNORED_ARGUMENTS)
        if one[name] != other[name]
        and not (
            name in PATH_ARGUMENTS and Path(str(one[name])).name == Path(str(other[name])).name
        )
    ]


def repeat_baseline_in_every_column(by_cell: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Copy the runs without weight decay into the columns of all weight decays.

    Otherwise these columns would have no baseline to compare with.

    Args:
        by_cell: see `finished_runs_by_cell`.
        layout: the table; unchanged runs are returned unless its columns are weight decays.
    """
    if "weight_decay" not in layout.columns or "method" not in layout.rows:
        return by_cell
    labels, method, decay = label_names(layout), row_label("method"), column_label("weight_decay")
    others = [column_label(name) for name in layout.columns if name != "weight_decay"]
    published = pd.DataFrame(list(layout.published), columns=labels, dtype=object)
    known = pd.concat([published, by_cell[labels]])
    decays = known.loc[known[method] != "wd0", [*others, decay]].drop_duplicates()
    if decays.empty:
        return by_cell
    is_baseline = by_cell[method] == "wd0"
    baseline = by_cell[is_baseline].rename(columns={decay: "own"}).reset_index(names="run")
    if others:
        repeated = baseline.merge(decays, on=others, how="left")
    else:
        repeated = baseline.merge(decays, how="cross")
    repeated[decay] = repeated[decay].fillna(repeated["own"])
    repeated = repeated.set_index("run").drop(columns="own")
    return pd.concat([by_cell[~is_baseline], repeated]).sort_index(kind="stable")


@dataclass(frozen=True)
class Axes:
    """Labels of the rows and of the columns of a table, in the order in which they are printed."""

    rows: list[Key]
    columns: list[Key]

    @property
    def keys(self) -> list[Key]:
        """Labels of all cells, row by row."""
        return [row + column for row in self.rows for column in self.columns]


def axes_of(by_cell: pd.DataFrame, layout: Layout) -> Axes:
    """Return the labels of a table: those of the published table first, in its order.

    Columns of a table that was not published are sorted.

    Args:
        by_cell: see `finished_runs_by_cell`.
        layout: the table.
    """
    found = by_cell[label_names(layout)].drop_duplicates().itertuples(index=False, name=None)
    keys, split = [*layout.published, *found], len(layout.rows)
    columns = list(dict.fromkeys(key[split:] for key in keys))
    if not layout.published:
        columns.sort(key=_numbers_before_words)
    return Axes(list(dict.fromkeys(key[:split] for key in keys)), columns)


def _numbers_before_words(labels: Sequence[str]) -> list[tuple[int, float, str]]:
    """Return a sorting key: numbers by their value, then words."""
    values = [(label, parse_value(label)) for label in labels]
    return [
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, label)
        for label, value in values
    ]


def summarize_cells(by_cell: pd.DataFrame, layout: Layout, baseline: str | None) -> pd.DataFrame:
    """Return one row per cell of the table, in the order of `axes_of`.

    Args:
        by_cell: see `finished_runs_by_cell`.
        layout: the table.
        baseline: first label of the rows that the others are compared with; None: no comparison.

    Returns:
        Index: the labels of the cells. Columns: runs (how many), seeds, MEASURE_mean, MEASURE_std
        and MEASURE_count of each measure (over the runs where it is known), published, expected
        (the published table has this cell, or there is none), deviations (of its runs from the
        published one), and, with a baseline, difference, low, high and pairs (see
        `paired_difference`) and no_difference (the reason if there is none).
    """
    labels = label_names(layout)
    groups = by_cell.groupby(labels, sort=False)
    index = pd.MultiIndex.from_tuples(axes_of(by_cell, layout).keys, names=labels)
    cells = pd.DataFrame(index=index)
    cells["runs"] = groups.size().reindex(index).fillna(0).astype(int)
    cells["seeds"] = groups["seed"].agg(lambda seeds: " ".join(sorted(seeds)))
    for measure in layout.measures:
        for statistic in ("mean", "std", "count"):
            cells[f"{measure}_{statistic}"] = groups[measure].agg(statistic)
    found = {key: cell for key, cell in groups}
    cells["deviations"] = [
        list(dict.fromkeys(text for texts in found[key]["deviations"] for text in texts))
        if key in found and layout.published_of_training
        else []
        for key in index
    ]
    cells["published"] = [layout.published.get(key, np.nan) for key in index]
    cells["expected"] = [not layout.published or key in layout.published for key in index]
    if baseline is not None:
        values = {key: cell.set_index("seed")[layout.measure] for key, cell in found.items()}
        compared = [
            paired_difference(values.get(key), values.get((baseline, *key[1:])))
            if key[0] != baseline
            else None
            for key in index
        ]
        columns = ["difference", "low", "high", "pairs"]
        cells[columns] = pd.DataFrame([c or (np.nan,) * 4 for c in compared], index=index)
        cells["no_difference"] = [
            why_no_difference(values.get(key), values.get((baseline, *key[1:])), baseline)
            if key[0] != baseline
            else ""
            for key in index
        ]
    return cells


def why_no_difference(
    values: pd.Series | None, baseline: pd.Series | None, baseline_name: str
) -> str:
    """Return why two cells cannot be compared; "" if they can, or if the first one has no run.

    Args:
        values, baseline: see `paired_difference`.
        baseline_name: label of the baseline's row.
    """
    if values is None or not len(values.dropna()):
        return ""
    if baseline is None or not len(baseline.dropna()):
        return f"no run of {baseline_name}"
    own, other = (sorted(series.dropna().index) for series in (values, baseline))
    if not set(own) & set(other):
        return f"no common seed: {' '.join(own)}, {baseline_name} {' '.join(other)}"
    return ""


def paired_difference(
    values: pd.Series | None, baseline: pd.Series | None
) -> tuple[float, float, float, int] | None:
    """Compare runs with the baseline's runs of the same seeds.

    Args:
        values: a number for each seed; None or NaN where unknown.
        baseline: likewise, of the baseline.

    Returns:
        Mean difference, lower and upper end of its 95 % confidence interval (paired t-test; NaN for
        a single pair), number of pairs. None if the two have no seed in common.
    """
    if values is None or baseline is None:
        return None
    pairs = pd.concat([values.dropna(), baseline.dropna()], axis=1, join="inner").to_numpy()
    if not len(pairs):
        return None
    mean = float(np.mean(pairs[:, 0] - pairs[:, 1]))
    if len(pairs) == 1:
        return mean, np.nan, np.nan, 1
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():  # equal differences have no t statistic, but an interval
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = ttest_rel(pairs[:, 0], pairs[:, 1]).confidence_interval(0.95)
    return mean, float(interval.low), float(interval.high), len(pairs)
