"""Print tables of finished runs.

A table shows means over seeds, differences between methods, the published values, and what is
missing.

    python scripts/paper/table.py runs/tables --table adam
        a table of the paper
    python scripts/paper/table.py runs/mine --rows method --columns optimizer
        any other table: its rows and columns are named by arguments, `model` or `method`
    python scripts/paper/table.py runs/mine --where method=uniform --best weight_decay
        the value with the lowest validation loss

It reads run folders (at any depth below those given) and W&B's CSV exports of runs. It writes
Markdown, and with --csv FILE also CSV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from peft_pretraining.cli.common import Parser
from peft_pretraining.cli.main import run_script
from peft_pretraining.errors import UserError
from scripts.paper.published import TABLES, Layout

if TYPE_CHECKING:  # pandas and torch are imported after the arguments have been parsed
    import pandas as pd


# ----------------------------------------------------------------------------------- Markdown


def markdown(cells: pd.DataFrame, layout: Layout, baseline: str | None, rehearsal: bool) -> str:
    """Return the table, the differences to the baseline, and the cells that are missing.

    Args:
        cells: see `cells.summarize_cells`.
        layout: the table.
        baseline: first label of the rows that the others are compared with; None: no comparison.
        rehearsal: some of the runs are rehearsals at a small scale.
    """
    lines = [f"{layout.title}\n", legend(layout) + "\n"]
    if rehearsal:
        lines.append("**Rehearsed at a small scale: the numbers mean nothing.**\n")
    lines += grid(cells, layout, [cell_text(cell, layout) for cell in cells.to_dict("records")])
    if baseline is not None:
        first_labels = cells.index.get_level_values(0)
        lines.append(
            f"\n{layout.measure} minus that of {baseline}, same seeds: mean, and 95 % confidence "
            "interval (paired t-test)\n"
        )
        others = cells[first_labels != baseline]
        texts = [difference_text(cell, layout.measure) for cell in others.to_dict("records")]
        lines += grid(others, layout, texts)
    missing = cells.index[cells["expected"] & (cells["runs"] == 0)]
    if len(missing):
        names = "; ".join(" ".join(key) for key in missing)
        lines.append(f"\nMissing ({len(missing)}): {names}")
    return "\n".join(lines) + "\n"


def legend(layout: Layout) -> str:
    """Return the sentence that explains what a cell shows."""
    text = f"Each cell: {layout.measure}, mean ± standard deviation over seeds [number of seeds]"
    if not layout.published:
        return text + "."
    return (
        f"{text}; in parentheses {layout.published_measure} / the published value, or in which "
        "settings the runs differ from the published ones."
    )


def grid(cells: pd.DataFrame, layout: Layout, texts: list[str]) -> list[str]:
    """Return the lines of a Markdown table with these texts in its cells."""
    split = len(layout.rows)
    labelled = cells.assign(
        text=texts,
        row=[" ".join(key[:split]) for key in cells.index],
        column=[" ".join(key[split:]) for key in cells.index],
    )
    # pivot sorts its labels; the table keeps its own order.
    pivoted = labelled.pivot(index="row", columns="column", values="text")
    pivoted = pivoted.loc[labelled["row"].unique(), labelled["column"].unique()]
    head = [" ".join(layout.rows), *pivoted.columns]
    rows = [[name, *values] for name, values in zip(pivoted.index, pivoted.values, strict=True)]
    return [
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def cell_text(cell: dict, layout: Layout) -> str:
    """Return `32.50 ± 0.10 [3] (31.60 ± 0.10 / 31.56)`: the runs' values and the published one."""
    text = mean_and_std(cell, layout.measure)
    if text:
        text += f" [{cell[f'{layout.measure}_count']:g}]"
    if cell["published"] != cell["published"]:  # NaN: not published
        return text
    if cell["deviations"]:
        return f"{text} ({deviations_text(cell['deviations'])})".strip()
    compared = mean_and_std(cell, layout.published_measure) or "–"
    return f"{text} ({compared} / {cell['published']:g})".strip()


def deviations_text(texts: Sequence[str]) -> str:
    """Return why no published value is printed: `rehearsal`, or the first settings that differ."""
    if list(texts) == ["rehearsal"]:
        return "rehearsal"
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return f"not as published: {', '.join(texts[:3])}{more}"


def mean_and_std(cell: dict, measure: str) -> str:
    """Return `32.50 ± 0.10`, the mean alone for a single run, and "" for none."""
    count, decimals = cell[f"{measure}_count"], decimal_places(measure)
    if not count > 0:  # NaN for a cell without runs
        return ""
    text = f"{cell[f'{measure}_mean']:.{decimals}f}"
    return text + (f" ± {cell[f'{measure}_std']:.{decimals}f}" if count > 1 else "")


def decimal_places(measure: str) -> int:
    """Return the decimals to print: a loss is about three, a perplexity several dozen."""
    return 4 if measure.endswith("loss") else 2


def difference_text(cell: dict, measure: str) -> str:
    """Return `-0.70 [-1.20, -0.20]`: the mean difference and its confidence interval.

    If there is no difference, return the reason, and "" for a cell without runs.
    """
    if not cell["pairs"] > 0:  # NaN for a cell without a pair
        return cell["no_difference"]
    form = f"+.{decimal_places(measure)}f"
    if cell["pairs"] == 1:
        return f"{cell['difference']:{form}} (one seed)"
    return f"{cell['difference']:{form}} [{cell['low']:{form}}, {cell['high']:{form}}]"


# ---------------------------------------------------------------------------------------- CSV


def write_csv(path: Path, cells: pd.DataFrame, layout: Layout, compared: bool) -> None:
    """Write one line per cell, including the missing ones.

    Args:
        path: the file.
        cells: see `cells.summarize_cells`.
        layout: the table.
        compared: write the differences to the baseline too.
    """
    kept = cells[cells["expected"] | (cells["runs"] > 0)]
    kept = kept.rename_axis(list(layout.rows + layout.columns))
    columns = ["runs", "seeds"]
    columns += [f"{name}_{what}" for name in layout.measures for what in ("mean", "std")]
    columns.append("published")
    if compared:
        kept = kept.assign(
            half_interval=(kept["high"] - kept["low"]) / 2, pairs=kept["pairs"].astype("Int64")
        )
        columns += ["difference", "half_interval", "pairs"]
    kept[columns].to_csv(path, lineterminator="\r\n")


# ------------------------------------------------------------------------------------ command


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line.

    Raises:
        UserError: if --where is not NAME=VALUE.
    """
    parser = Parser(
        prog="table.py",
        description="Print tables of finished runs, with spreads and the published values.",
    )
    add = parser.add_argument
    add(
        "paths",
        nargs="+",
        metavar="RUNS",
        help="folders that hold run folders, or CSV files that W&B exported",
    )
    add("--table", choices=TABLES, help="a table of the paper")
    add(
        "--rows",
        nargs="+",
        default=["method"],
        metavar="NAME",
        help="arguments whose values name the rows (default method)",
    )
    add(
        "--columns",
        nargs="+",
        default=["model", "optimizer", "weight_decay"],
        metavar="NAME",
        help="arguments whose values name the columns (default model optimizer weight_decay)",
    )
    add(
        "--measure",
        metavar="NAME",
        help="perplexity (default), eval_loss, top1, or c4:perplexity of evaluate_checkpoint",
    )
    add(
        "--where",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="only runs with these arguments, e.g. seed=5,6",
    )
    add("--against", metavar="ROW", help="print also the differences of all rows to this one")
    add(
        "--pick",
        metavar="NAME",
        help="of each cell use only the value of this argument with the lowest validation loss",
    )
    add("--best", metavar="NAME", help="print that value for all runs together, and nothing else")
    add("--csv", type=Path, metavar="FILE", help="write the cells to this file too, a line each")
    args = parser.parse_args(argv)
    for pair in args.where:
        if "=" not in pair:
            raise UserError(f"--where {pair}: give NAME=VALUE, for instance optimizer=adam")
    return args


def baseline_row(labels: pd.Series, against: str | None, layout: Layout) -> str | None:
    """Return the row that the others are compared with, None for no comparison.

    Args:
        labels: first label of the row of each finished run.
        against: the value of --against.
        layout: the table. If its own baseline has no run, the table is printed without differences.

    Raises:
        UserError: no row is called `against`.
    """
    found = list(labels.unique())
    if against is not None and against not in found:
        raise UserError(f"--against {against}: no such row; there are {', '.join(found)}")
    return against or (layout.against if layout.against in found else None)


def main() -> None:
    """Print a table."""
    args = parse_arguments()
    from scripts.paper import cells as table
    from scripts.paper.results import format_setting, parse_value, read_runs

    if args.table:
        layout = TABLES[args.table]
    else:
        layout = Layout("Runs", tuple(args.rows), tuple(args.columns))
    if args.measure:
        layout = layout.with_measure(args.measure)
    where = dict(layout.where)
    for name, values in (pair.split("=", 1) for pair in args.where):
        where[name] = tuple(format_setting(parse_value(value)) for value in values.split(","))

    runs = table.filter_runs(read_runs(args.paths), where, layout.may_vary)
    if runs.empty:
        raise UserError(
            f"none of the runs in {', '.join(args.paths)} belongs to this table: "
            "check --table and --where"
        )
    if args.best:
        print(table.best_value(runs, args.best))
        return
    unfinished = runs["run", "path"][~runs["run", "finished"]]
    if args.pick:
        runs = table.keep_best_setting(runs, layout, args.pick)
    by_cell = table.finished_runs_by_cell(runs, layout)
    by_cell = table.repeat_baseline_in_every_column(by_cell, layout)
    baseline = baseline_row(by_cell[table.row_label(layout.rows[0])], args.against, layout)
    cells = table.summarize_cells(by_cell, layout, baseline)
    print(markdown(cells, layout, baseline, bool(by_cell["rehearsal"].any())), end="")
    if layout.against and baseline is None:
        print(f"\nNo differences: there is no finished run of {layout.against}")
    if len(unfinished):
        print(f"\nNot finished: {', '.join(unfinished)}")
    if args.csv:
        write_csv(args.csv, cells, layout, compared=baseline is not None)


if __name__ == "__main__":
    sys.exit(run_script(main))
