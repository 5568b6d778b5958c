"""Read the settings and results of runs into a table of pandas.

Sources are run folders and the CSV files that W&B exports. `read_runs` returns one row for each
run. Its columns have two levels:

    run / path, finished      where the run was read, and whether it has a final evaluation
    settings / NAME           the arguments of the run; `model` and `method` as tables name them
    results / NAME            numbers of the final evaluation; NaN where unknown

A setting that a run does not have is NaN; a setting that is null in run.json is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from alphadecay.cli.presets import method_flags, method_name
from peft_pretraining.errors import UserError
from peft_pretraining.records.jsonl import RUN
from peft_pretraining.records.reader import final_evaluation, number, read_run, section

# The published setting of every method whose preset does not name another.
DEFAULT_SETTINGS: dict[str, object] = {
    "esd_metric_for_tb": "alpha",
    "assign_func": "tb_linear_map",
    "pl_fitting": "median",
    "xmin_pos": 2.0,
    "unbalancedWD_every": 500,
    "balance_scope": "reference",
    "remove_first_layer": True,
    "remove_last_layer": True,
    "filter_zeros": False,
    "esd_async": False,
}
WANDB_SETTING_PREFIX = "arguments."  # of the columns of an export that hold settings


@dataclass
class Result:
    """One run.

    Args:
        path: the run folder, or the CSV file with the name of the run.
        settings: arguments of the run, with `model`, `method` and `rehearsal`.
        results: numbers of the final evaluation; empty while the run is training.
    """

    path: str
    settings: dict[str, Any]
    results: dict[str, float] = field(default_factory=dict)


def read_runs(paths: Sequence[str]) -> pd.DataFrame:
    """Return one row for each run below the folders and in the CSV files.

    Args:
        paths: folders that hold run folders at any depth, and CSV files that W&B exported.

    Raises:
        UserError: if there is no run.
    """
    found: list[Result] = []
    for path in map(Path, paths):
        if path.suffix == ".csv":
            found += read_export(path)
            continue
        folders = sorted(file.parent for file in path.rglob(RUN) if "wandb" not in file.parts)
        found += map(read_folder, folders)
    if not found:
        raise UserError(
            f"no run in {', '.join(paths)}: give folders that hold run folders, "
            "or CSV files that W&B exported"
        )
    return to_frame(found)


def to_frame(results: Sequence[Result]) -> pd.DataFrame:
    """Return the runs as a table; see the top of this file for its columns."""
    index = range(len(results))
    run = {"path": [r.path for r in results], "finished": [bool(r.results) for r in results]}
    numbers = pd.DataFrame([r.results for r in results], index=index, dtype=float)
    if "eval_loss" not in numbers:  # so that there are results even if no run has finished
        numbers["eval_loss"] = math.nan
    parts = {
        "run": pd.DataFrame(run, index=index),
        "settings": pd.DataFrame([r.settings for r in results], index=index, dtype=object),
        "results": numbers.replace([np.inf, -np.inf], np.nan),
    }
    return pd.concat(parts, axis=1)


def read_folder(folder: Path) -> Result:
    """Read a run folder; results are empty unless the run has its final evaluation."""
    from peft_pretraining.evaluate_checkpoint import read_evaluations

    try:
        info = json.loads((folder / RUN).read_text(encoding="utf8"))
    except ValueError:
        raise UserError(
            f"{folder / RUN} is not valid JSON: repair it, or move the run elsewhere"
        ) from None
    result = Result(str(folder), settings_of(section(info, "arguments"), str(info.get("data", ""))))
    try:
        run = read_run(folder)
    except UserError:  # nothing has been logged yet
        return result
    final = final_evaluation(run)
    if final is None or final.get("final") is not True:
        return result
    result.results = {
        name: number(final, name) for name in final if not isinstance(final[name], bool)
    }
    summary = section(info, "summary")
    analyses = number(summary, "analyses") or math.nan
    result.results["analysis_seconds"] = number(summary, "analysis_seconds") / analyses
    for record in read_evaluations(folder):
        result.results |= {
            f"{record['documents']}:{name}": number(record, name)
            for name in ("eval_loss", "perplexity", "reference_perplexity")
        }
    return result


def read_export(path: Path) -> list[Result]:
    """Read the runs of a CSV file of W&B.

    Columns `arguments.NAME` are settings, the others results.

    Args:
        path: the file.

    Raises:
        UserError: if the file is missing.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    # Text, so that each cell is interpreted by itself: a column may mix numbers and words.
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except pd.errors.EmptyDataError:
        return []
    found = []
    for position, row in enumerate(rows.to_dict("records"), start=1):
        cells = {str(name): parse_value(text) for name, text in row.items() if text}
        arguments = {
            name.removeprefix(WANDB_SETTING_PREFIX): value
            for name, value in cells.items()
            if name.startswith(WANDB_SETTING_PREFIX)
        }
        numbers = {
            name: float(value)
            for name, value in cells.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        finished = cells.get("State") == "finished" and "final_eval_loss" in numbers
        name = f"{path}: {cells.get('Name', position)}"
        found.append(Result(name, settings_of(arguments), numbers if finished else {}))
    return found


def parse_value(text: str) -> Any:
    """Return the number, boolean, list or null that a text stands for, else the text itself."""
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def format_setting(value: object) -> str:
    """Return a setting as tables print it: 1e-05 and 0.00001 are the same, and so are 5 and 5.0."""
    if is_missing(value):
        return "None"
    return f"{value:g}" if isinstance(value, float) else str(value)


def is_missing(value: object) -> bool:
    """Return True for the NaN of a setting that a run does not have, and False for None."""
    return isinstance(value, float) and math.isnan(value)


def settings_of(arguments: dict[str, Any], data: str = "") -> dict[str, Any]:
    """Return the arguments with the model's and the method's name as tables have them.

    A rehearsal (`run.sh --scale`) is counted under the model and the analysis interval that it
    stands for, which its tags name.

    Args:
        arguments: the arguments in run.json, or in the columns of an export.
        data: the line about the data in run.json; empty if unknown.
    """
    model = str(arguments.get("model_config") or arguments.get("model") or "?")
    if model.endswith("deit_tiny_patch16_224"):
        label = "vit"
    else:
        label = Path(model).stem.removeprefix("llama_")
    tags = arguments.get("tags") if isinstance(arguments.get("tags"), list) else []
    facts = dict(tag.split(" ", 1) for tag in tags or [] if " " in tag)
    settings = arguments | {
        "model": facts.get("rehearses", label),
        "rehearsal": "rehearses" in facts,
    }
    try:
        settings["method"] = method_name(arguments)
    except KeyError:  # an export without the columns that say so
        settings.setdefault("method", "?")
    # `NAME, ...; tokenizer NAME`, as `load_data` describes it. Prepared data has the name of the
    # source that it was prepared from.
    source, _, tokenizer = data.partition(", ")[0], *data.rpartition("; tokenizer ")[1:]
    settings["data_source"] = source or arguments.get("dataset")
    settings["tokenizer_name"] = tokenizer or arguments.get("tokenizer")
    if "usual_gap" in facts and str(settings.get("unbalancedWD_every")) == facts["usual_gap"]:
        settings["unbalancedWD_every"] = DEFAULT_SETTINGS["unbalancedWD_every"]
    return settings


def variations(settings: dict[str, Any]) -> set[str]:
    """Return the names of the settings that differ from the published ones of the run's method."""
    try:
        preset = method_flags(str(settings["method"]))
    except ValueError:  # the name is not known
        preset = {}
    return {
        name
        for name, default in DEFAULT_SETTINGS.items()
        if settings.get(name, default) != preset.get(name, default)
    }
