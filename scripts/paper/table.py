"""Tables of finished runs: means over seeds, differences between methods, the published values beside them, and what is missing.

    python scripts/table.py runs/tables --table adam                            a table of the paper
    python scripts/table.py runs/mine --rows method --columns optimizer         any other: names of arguments, `model`, `method`
    python scripts/table.py runs/mine --where method=uniform --best weight_decay     the value with the lowest loss

It reads run folders (any depth below those given) and W&B's CSV exports of runs, and writes Markdown, or CSV with --csv FILE.
"""

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from alphadecay.cli.presets import METHODS  # noqa: E402
from peft_pretraining.cli.common import Parser, method_name  # noqa: E402
from peft_pretraining.cli.main import run_script  # noqa: E402
from peft_pretraining.errors import UserError  # noqa: E402
from peft_pretraining.evaluate_checkpoint import read_evaluations  # noqa: E402
from peft_pretraining.records.jsonl import RUN  # noqa: E402
from peft_pretraining.records.reader import final_evaluation, number, read_run, section  # noqa: E402
from scripts.paper.published import TABLES, Layout  # noqa: E402

# The published setting of every method that does not name another.
USUAL = {
    "esd_metric_for_tb": "alpha", "assign_func": "tb_linear_map", "pl_fitting": "median", "xmin_pos": 2.0, "unbalancedWD_every": 500,
    "balance_scope": "reference", "remove_first_layer": True, "remove_last_layer": True, "filter_zeros": False, "esd_async": False,
}  # fmt: skip
SETTING = "arguments."  # how W&B begins the name of one
# Arguments in which two runs of one cell may differ: what they were called, where they ran, how often they said something.
INCIDENTAL = {
    "name", "wandb_name", "save_dir", "output_dir", "seed", "continue_from", "resume", "auto_resume", "start_epoch", "tags", "method",
    "log_every", "save_every", "keep_checkpoints", "keep_every", "save_ckpt_num", "on_save_error", "eval_every", "batch_size",
    "gradient_accumulation", "update_freq", "workers", "num_workers", "pin_mem", "profile", "no_wandb", "enable_wandb", "project",
    "compile", "loss", "parallel", "fsdp_shard_size", "activation_checkpointing", "single_cuda", "device", "dist_eval",
}  # fmt: skip
# Places that have another path on every machine: their last part counts.
PLACES = {"dataset", "data_path", "eval_data_path", "validation_file", "tokenizer", "model_config"}


# ---------------------------------------------------------------------------------------------------------------- reading runs


@dataclass
class Result:
    """A run: its settings (arguments, and `model` and `method` as tables name them) and the numbers at its end (none while it trains)."""

    place: str
    settings: dict
    values: dict[str, float] = field(default_factory=dict)

    def label(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(shown(self.settings.get(name)) for name in names)


def shown(value: object) -> str:
    """A setting as tables print it: 1e-05 and 0.00001 are one."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_results(places: Sequence[str]) -> list[Result]:
    """All runs below the folders, and in the CSV files. Raises UserError where there is none."""
    results: list[Result] = []
    for place in map(Path, places):
        if place.suffix == ".csv":
            results += read_export(place)
        else:
            results += [
                read_folder(path.parent)
                for path in sorted(place.rglob(RUN))
                if "wandb" not in path.parts
            ]
    if not results:
        raise UserError(
            f"no run in {', '.join(places)}: give folders that hold run folders, or CSV files that W&B exported"
        )
    return results


def read_folder(folder: Path) -> Result:
    info = json.loads((folder / RUN).read_text(encoding="utf8"))
    result = Result(str(folder), settings_of(info.get("arguments", {})))
    try:
        run = read_run(folder)
    except UserError:  # it has logged nothing yet
        return result
    final = final_evaluation(run)
    if final is None or final.get("final") is not True:
        return result
    result.values = {
        name: number(final, name) for name in final if not isinstance(final[name], bool)
    }
    summary = section(info, "summary")
    result.values["analysis_seconds"] = number(summary, "analysis_seconds") / (
        number(summary, "analyses") or math.nan
    )
    for record in read_evaluations(folder):
        result.values |= {
            f"{record['documents']}:{name}": number(record, name)
            for name in ("eval_loss", "perplexity", "reference_perplexity")
        }
    return result


def read_export(path: Path) -> list[Result]:
    """The finished runs of a CSV file of W&B: columns `arguments.NAME` are settings, the others numbers at the end."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    results = []
    with path.open(newline="", encoding="utf8") as file:
        for row in csv.DictReader(file):
            cells = {name: parsed(text) for name, text in row.items() if name and text}
            settings = settings_of(
                {
                    name.removeprefix(SETTING): cell
                    for name, cell in cells.items()
                    if name.startswith(SETTING)
                }
            )
            values = {
                name: float(cell)
                for name, cell in cells.items()
                if isinstance(cell, int | float) and not isinstance(cell, bool)
            }
            finished = cells.get("State") == "finished" and "final_eval_loss" in values
            results.append(
                Result(
                    f"{path}: {cells.get('Name', len(results) + 1)}",
                    settings,
                    values if finished else {},
                )
            )
    return results


def parsed(text: str) -> object:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def settings_of(arguments: dict) -> dict:
    """Arguments with the model's and the method's name as tables have them; a rehearsal is filed under what it rehearses."""
    model = str(arguments.get("model_config") or arguments.get("model") or "?")
    label = (
        "vit"
        if model.endswith("deit_tiny_patch16_224")
        else Path(model).stem.removeprefix("llama_")
    )
    tags = arguments.get("tags") if isinstance(arguments.get("tags"), list) else []
    facts = dict(tag.split(" ", 1) for tag in tags if " " in tag)
    settings = dict(arguments) | {
        "model": facts.get("rehearses", label),
        "rehearsal": "rehearses" in facts,
    }
    try:
        settings["method"] = method_name(argparse.Namespace(**arguments))
    except AttributeError:  # an export without those columns
        settings.setdefault("method", "?")
    if settings["method"] == "uniform" and settings.get("weight_decay") == 0:
        settings["method"] = "wd0"
    if "usual_gap" in facts and str(settings.get("unbalancedWD_every")) == facts["usual_gap"]:
        settings["unbalancedWD_every"] = USUAL["unbalancedWD_every"]
    return settings


def variations(settings: dict) -> set[str]:
    """The arguments in which a run leaves the published setting of its method."""
    named = METHODS.get(str(settings["method"]).split("+")[0], {})
    return {
        name for name, usual in USUAL.items() if settings.get(name, usual) != named.get(name, usual)
    }


# --------------------------------------------------------------------------------------------------------------------- cells


@dataclass
class Cell:
    """The runs of one place in the table, at most one for each seed."""

    runs: dict[object, Result] = field(default_factory=dict)

    def values(self, measure: str) -> dict[object, float]:
        """By seed, where known."""
        found = {seed: run.values.get(measure, math.nan) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}


def chosen(
    results: list[Result], where: dict[str, tuple[str, ...]], free: tuple[str, ...] | None
) -> list[Result]:
    """Those whose settings are among the values named; free: see `Layout`, None: whatever they vary."""
    named = [
        r
        for r in results
        if all(shown(r.settings.get(name)) in values for name, values in where.items())
    ]
    return [r for r in named if free is None or variations(r.settings) <= set(free)]


def cells_of(results: list[Result], layout: Layout) -> dict[tuple[str, ...], Cell]:
    """Finished runs by their row's and column's labels. Raises UserError where those of a cell differ in more than the seed."""
    cells: dict[tuple[str, ...], Cell] = {}
    for result in results:
        if not result.values:
            continue
        runs = cells.setdefault(result.label(layout.rows + layout.columns), Cell()).runs
        other = next(iter(runs.values()), result)
        if odd := differences(other.settings, result.settings):
            raise UserError(
                f"{other.place} and {result.place} are of one cell but differ in {', '.join(odd)}: "
                f"give --where {odd[0]}=VALUE, --pick {odd[0]}, or name it in --columns"
            )
        twin = runs.setdefault(result.settings.get("seed"), result)
        if twin is not result:
            raise UserError(
                f"{twin.place} and {result.place} are the same run: leave one of them out"
            )
    return cells


def differences(one: dict, other: dict) -> list[str]:
    """Settings that both have and that decide what is trained, in which they differ."""
    names = sorted(one.keys() & other.keys() - INCIDENTAL)
    return [
        n
        for n in names
        if one[n] != other[n]
        and not (n in PLACES and Path(str(one[n])).name == Path(str(other[n])).name)
    ]


def repeat_baseline_in_every_column(
    cells: dict[tuple[str, ...], Cell], layout: Layout
) -> dict[tuple[str, ...], Cell]:
    """Where columns are decays, the runs without one stand in the column of each: otherwise nothing would stand beside them."""
    if "weight_decay" not in layout.columns or "method" not in layout.rows:
        return cells
    method, place = (
        layout.rows.index("method"),
        len(layout.rows) + layout.columns.index("weight_decay"),
    )
    known = [key for key in (*layout.published, *cells) if key[method] != "wd0"]
    spread_out: dict[tuple[str, ...], Cell] = {}
    for key, cell in cells.items():
        first, last = key[len(layout.rows) : place], key[place + 1 :]
        decays = {
            other[place]
            for other in known
            if (other[len(layout.rows) : place], other[place + 1 :]) == (first, last)
        }
        if key[method] != "wd0" or not decays:
            decays = {key[place]}
        spread_out |= {(*key[:place], decay, *last): cell for decay in decays}
    return spread_out


def best_value(results: list[Result], name: str) -> object:
    """The value of a setting with the lowest mean loss over the seeds that all its values have. Raises UserError where there is none."""
    losses: dict[object, dict[object, float]] = {}
    for result in results:
        if "eval_loss" in result.values:
            losses.setdefault(result.settings.get(name), {})[result.settings.get("seed")] = (
                result.values["eval_loss"]
            )
    seeds = set.intersection(*map(set, losses.values())) if losses else set()
    if not seeds:
        raise UserError(
            f"no finished runs to choose a {name} from: each of its values needs one with the same seed"
        )
    return min(losses, key=lambda value: statistics.fmean(losses[value][seed] for seed in seeds))


def picked(results: list[Result], layout: Layout, name: str) -> list[Result]:
    """Of each cell only the runs with its best value of a setting."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.label(layout.rows + layout.columns), []).append(result)
    kept = []
    for group in groups.values():
        if any(result.values for result in group):
            best = best_value(group, name)
            kept += [result for result in group if result.settings.get(name) == best]
    return kept


def difference(cell: Cell, base: Cell, measure: str) -> tuple[float, float, int] | None:
    """Of runs of the same seed: the mean difference, half the width of its 95 % interval (Student's t; nan for one pair), and the pairs."""
    ours, theirs = cell.values(measure), base.values(measure)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not pairs:
        return None
    if len(pairs) == 1:
        return pairs[0], math.nan, 1
    from scipy.stats import t

    return (
        statistics.fmean(pairs),
        float(t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs)),
        len(pairs),
    )


# ------------------------------------------------------------------------------------------------------------------- writing


def markdown(
    cells: dict[tuple[str, ...], Cell],
    layout: Layout,
    against: str | None,
    unfinished: list[Result],
) -> str:
    """The table, the differences to the row `against`, and what is missing."""
    rows, columns, split = *axes(cells, layout), len(layout.rows)
    lines = [f"{layout.title}\n", legend(layout) + "\n"]
    if any(run.settings.get("rehearsal") for cell in cells.values() for run in cell.runs.values()):
        lines.append("**Rehearsed at a small scale: the numbers mean nothing.**\n")
    lines += grid(
        rows,
        columns,
        layout,
        lambda key: cell_text(cells.get(key), layout, layout.published.get(key)),
    )
    if against:
        base_row = next((row for row in rows if row[0] == against), None)
        if base_row is None:
            raise UserError(
                f"--against {against}: no such row; there are {', '.join(row[0] for row in rows)}"
            )
        lines.append(
            f"\n{layout.measure} minus that of {against}, same seeds: mean, and 95 % interval (Student's t)\n"
        )
        others = [row for row in rows if row != base_row]
        lines += grid(
            others,
            columns,
            layout,
            lambda key: difference_text(cells, key, base_row + key[split:], layout.measure),
        )
    missing = [
        row + column
        for row in rows
        for column in columns
        if expected(row + column, layout) and row + column not in cells
    ]
    if missing:
        lines.append(f"\nMissing ({len(missing)}): " + "; ".join(" ".join(key) for key in missing))
    if unfinished:
        lines.append(f"\nNot finished: {', '.join(result.place for result in unfinished)}")
    return "\n".join(lines) + "\n"


def legend(layout: Layout) -> str:
    text = f"A cell: {layout.measure}, mean ± standard deviation over seeds [how many]"
    return text + (
        f"; in parentheses {layout.compared} / the published value." if layout.published else "."
    )


def axes(
    cells: dict[tuple[str, ...], Cell], layout: Layout
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Labels of rows and of columns: those of the published table first, in its order."""
    split = len(layout.rows)
    keys = [*layout.published, *cells]
    columns = list(dict.fromkeys(key[split:] for key in keys))
    return list(
        dict.fromkeys(key[:split] for key in keys)
    ), columns if layout.published else sorted(columns, key=in_order)


def in_order(labels: tuple[str, ...]) -> list[tuple]:
    """Numbers by size, before words."""
    numbers = [parsed(label) for label in labels]
    return [
        (0, float(x), "") if isinstance(x, int | float) else (1, 0.0, label)
        for x, label in zip(numbers, labels, strict=True)
    ]


def expected(key: tuple[str, ...], layout: Layout) -> bool:
    """Whether a table has such a cell: of a published one those that were published."""
    return not layout.published or key in layout.published


def grid(rows, columns, layout: Layout, text) -> list[str]:
    head = [" ".join(layout.rows), *(" ".join(column) for column in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return lines + [
        "| " + " | ".join([" ".join(row), *(text(row + column) for column in columns)]) + " |"
        for row in rows
    ]


def cell_text(cell: Cell | None, layout: Layout, published: float | None) -> str:
    values = list(cell.values(layout.measure).values()) if cell else []
    text = f"{spread(values, layout.measure)} [{len(values)}]" if values else ""
    if published is None:
        return text
    compared = list(cell.values(layout.compared).values()) if cell else []
    return (
        f"{text} ({spread(compared, layout.compared) if compared else '–'} / {published:g})".strip()
    )


def spread(values: list[float], measure: str) -> str:
    """Mean ± standard deviation with n - 1; the mean alone for one value."""
    mean = f"{statistics.fmean(values):.{digits(measure)}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits(measure)}f}" if len(values) > 1 else mean


def digits(measure: str) -> int:
    """Decimals worth printing: a loss is some three units, a perplexity dozens."""
    return 4 if measure.endswith("loss") else 2


def difference_text(
    cells: dict[tuple[str, ...], Cell], key: tuple[str, ...], base: tuple[str, ...], measure: str
) -> str:
    found = difference(cells[key], cells[base], measure) if key in cells and base in cells else None
    if found is None:
        return ""
    mean, half, pairs = found
    form = f"+.{digits(measure)}f"
    return (
        f"{mean:{form}} [{mean - half:{form}}, {mean + half:{form}}]"
        if pairs > 1
        else f"{mean:{form}} (one seed)"
    )


def write_csv(
    path: Path, cells: dict[tuple[str, ...], Cell], layout: Layout, against: str | None
) -> None:
    """A line for each cell, missing ones included."""
    rows, columns = axes(cells, layout)
    measures = dict.fromkeys(
        (layout.measure, layout.compared) if layout.published else (layout.measure,)
    )
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.writer(file)
        statistics_of = [f"{name}_{what}" for name in measures for what in ("mean", "std")]
        extra = ["difference", "half_interval", "pairs"] if against else []
        writer.writerow(
            [*layout.rows, *layout.columns, "runs", "seeds", *statistics_of, "published", *extra]
        )
        for key in (
            row + column
            for row in rows
            for column in columns
            if expected(row + column, layout) or row + column in cells
        ):
            cell = cells.get(key, Cell())
            numbers = [
                x for name in measures for x in mean_and_std(list(cell.values(name).values()))
            ]
            base = cells.get((against, *key[1:])) if against and key[0] != against else None
            found = (difference(cell, base, layout.measure) if base else None) or ("", "", "")
            seeds = " ".join(map(str, sorted(cell.runs, key=str)))
            writer.writerow(
                [
                    *key,
                    len(cell.runs),
                    seeds,
                    *numbers,
                    layout.published.get(key, ""),
                    *(found if against else ()),
                ]
            )


def mean_and_std(values: list[float]) -> tuple[object, object]:
    return statistics.fmean(values) if values else "", statistics.stdev(values) if len(
        values
    ) > 1 else ""


# ------------------------------------------------------------------------------------------------------------------- command


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="table.py",
        description="Tables of finished runs, with spreads and the published values.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="RUNS",
        help="folders that hold run folders, or CSV files that W&B exported",
    )
    parser.add_argument("--table", choices=TABLES, help="a table of the paper")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["method"],
        metavar="NAME",
        help="arguments that name a row (default method)",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=["model", "optimizer", "weight_decay"],
        metavar="NAME",
        help="and a column",
    )
    parser.add_argument(
        "--measure",
        metavar="NAME",
        help="perplexity (default), eval_loss, top1, or c4:perplexity of evaluate_checkpoint",
    )
    parser.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="only runs with these arguments, e.g. seed=5,6",
    )
    parser.add_argument(
        "--against", metavar="ROW", help="also the differences of all rows to this one, by seed"
    )
    parser.add_argument(
        "--pick",
        metavar="NAME",
        help="of each cell only the value of this argument with the lowest validation loss",
    )
    parser.add_argument(
        "--best", metavar="NAME", help="print that value for all runs together, and nothing else"
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="write the cells there too, a line each"
    )
    args = parser.parse_args(words)
    for pair in args.where:
        if "=" not in pair:
            raise UserError(f"--where {pair}: give NAME=VALUE, for instance optimizer=adam")
    return args


def main() -> None:
    args = parse_arguments()
    layout = (
        TABLES[args.table] if args.table else Layout("Runs", tuple(args.rows), tuple(args.columns))
    )
    if args.measure:
        layout = layout.measuring(args.measure)
    where = dict(layout.where)
    for name, value in (pair.split("=", 1) for pair in args.where):
        where[name] = tuple(shown(parsed(one)) for one in value.split(","))
    results = chosen(read_results(args.places), where, layout.free)
    if not results:
        raise UserError(
            f"none of the runs in {', '.join(args.places)} belongs here: look at --table and --where"
        )
    if args.best:
        print(shown(best_value(results, args.best)))
        return
    cells = repeat_baseline_in_every_column(
        cells_of(picked(results, layout, args.pick) if args.pick else results, layout), layout
    )
    print(
        markdown(
            cells,
            layout,
            args.against or layout.against,
            [result for result in results if not result.values],
        ),
        end="",
    )
    if args.csv:
        write_csv(args.csv, cells, layout, args.against or layout.against)


if __name__ == "__main__":
    sys.exit(run_script(main))
