"""Read the records in a run folder. Needs neither torch nor matplotlib."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_pretraining.errors import UserError

# Fields of an evaluation that the report knows. Any other number in it (an accuracy, for example)
# is shown under its own name.
EVALUATION_FIELDS = (
    "update_step",
    "eval_loss",
    "perplexity",
    "reference_perplexity",
    "eval_tokens",
    "eval_images",
    "eval_seconds",
    "tokens_seen",
    "final",
)


# ----------------------------------------------------------------------------------- reading a run


@dataclass
class Modules:
    """The content of modules.jsonl as arrays; nan where a value is missing.

    Attributes:
        steps: [analyses] How many updates were made when the decays were set.
        names: [modules] Names of the modules, in the order of the model.
        types: [modules] The type of each module, such as `q_proj`.
        places: [modules] The block of each module, or its own name if it is in no block.
        blocks: The blocks among `places`, in the order of the model.
        balanced: [modules] True if the method sets the decay of the module.
        alpha: [analyses, modules] Power-law exponents.
        score: [analyses, modules] The statistic that set the decays.
        decay: [analyses, modules] Weight decays.
        reasons: (module, step, reason) for each alpha that is undefined.
    """

    steps: np.ndarray
    names: list[str]
    types: list[str]
    places: list[str]
    blocks: list[str]
    balanced: np.ndarray
    alpha: np.ndarray
    score: np.ndarray
    decay: np.ndarray
    reasons: list[tuple[str, int, str]]


@dataclass
class Run:
    """The records of a run in memory.

    Attributes:
        folder: The run folder.
        info: The content of run.json.
        training: Metrics of logged updates, one for each update, sorted.
        evaluations: Results of evaluations, one for each update, sorted.
        modules: The content of modules.jsonl; None if it is empty or missing.
        label: The name of the run in figures and tables.
    """

    folder: Path
    info: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    modules: Modules | None
    label: str = ""

    def argument(self, *names: str) -> Any:
        """Return the first of these arguments that run.json holds; None if it holds none."""
        arguments = section(self.info, "arguments")
        return next((arguments[name] for name in names if arguments.get(name) is not None), None)

    @functools.cached_property
    def unit(self) -> str:
        """What the run counts its data in: `tokens` or `images`."""
        return "images" if any("images_seen" in record for record in self.training) else "tokens"

    @property
    def eta(self) -> float:
        """The value of --weight_decay; nan if unknown."""
        return number({"eta": self.argument("weight_decay")}, "eta")


def read_text(path: Path) -> str:
    """Read a text file. Invalid UTF-8 is replaced, so that the JSON parser reports it.

    Raises:
        UserError: The file is missing or cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} holds no {path.name}; give the folder of a run, such as runs/<name>."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None


def read_lines(path: Path, step_key: str) -> list[dict[str, Any]]:
    """Read the objects of a .jsonl file; a missing file counts as an empty one.

    A last line that is not valid JSON is ignored: the run is writing it, or was killed while it
    wrote it.

    Args:
        path: The file.
        step_key: A field that must be a number in every object.

    Raises:
        UserError: Any other line is invalid. The message names the file and the line.
    """
    if not path.exists():
        return []
    lines = [line for line in enumerate(read_text(path).split("\n"), start=1) if line[1].strip()]
    records = []
    for position, (line_number, line) in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:
            if position == len(lines) - 1:
                break
            raise UserError(
                f"{path}, line {line_number}: not valid JSON; remove or repair that line."
            ) from None
        if not isinstance(record, dict) or math.isnan(number(record, step_key)):
            raise UserError(
                f"{path}, line {line_number}: expected a JSON object with a number under "
                f'"{step_key}".'
            )
        records.append(record)
    return records


def latest_by_step(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one record for each update, sorted.

    A resumed run repeats the updates after its checkpoint; the record that was written last counts.
    """
    by_step = {int(record["update_step"]): record for record in records}
    return [record for _, record in sorted(by_step.items())]


def read_run(folder: Path | str) -> Run:
    """Read run.json, metrics.jsonl and, if it exists, modules.jsonl.

    Raises:
        UserError: There is no such folder, it holds no metrics, or a file is invalid.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder; give the folder of a run, the one that holds run.json."
        )
    try:
        info = json.loads(read_text(folder / "run.json"))
    except ValueError:
        raise UserError(f"{folder / 'run.json'} is not valid JSON.") from None
    if not isinstance(info, dict):
        raise UserError(f"{folder / 'run.json'} must hold a JSON object.")
    metrics = read_lines(folder / "metrics.jsonl", "update_step")
    evaluations = latest_by_step([r for r in metrics if "eval_loss" in r])
    training = latest_by_step([r for r in metrics if "eval_loss" not in r and "loss" in r])
    if not evaluations and not training:
        raise UserError(
            f"{folder / 'metrics.jsonl'} holds no logged update and no evaluation yet; "
            "nothing to report."
        )
    return Run(
        folder,
        info,
        training,
        evaluations,
        module_table(read_lines(folder / "modules.jsonl", "step")),
        label=str(info.get("name") or folder.resolve().name),
    )


def read_runs(folders: Sequence[Path | str]) -> tuple[list[Run], list[str]]:
    """Read several runs; one without metrics does not keep the others from being read.

    Returns:
        The runs that can be read, and for each other one a sentence that says why not.

    Raises:
        UserError: A folder does not exist or holds no run.json, or no run can be read.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            if not (Path(folder) / "run.json").is_file():
                raise  # the path is mistyped
            problems.append(str(error))
    if not runs:
        raise UserError(" ".join(problems))
    return runs, problems


def module_table(history: list[dict[str, Any]]) -> Modules | None:
    """Arrange the records of modules.jsonl as arrays; None if there are no records."""
    if not history:
        return None
    first: dict[str, dict[str, Any]] = {}
    for record in history:
        first.setdefault(str(record.get("module")), record)
    names = list(first)
    steps = np.array(sorted({int(record["step"]) for record in history}))
    column_of = {name: i for i, name in enumerate(names)}
    row_of = {step: i for i, step in enumerate(steps.tolist())}
    values = {
        key: np.full((len(steps), len(names)), np.nan) for key in ("alpha", "score", "weight_decay")
    }
    reasons: dict[tuple[str, int], str] = {}
    for record in history:
        name, step = str(record.get("module")), int(record["step"])
        for key, array in values.items():
            array[row_of[step], column_of[name]] = number(record, key)
        if record.get("reason"):
            reasons[name, step] = str(record["reason"])
    blocks = {name: str(first[name]["block"]) for name in names if first[name].get("block")}
    return Modules(
        steps=steps,
        names=names,
        types=[str(first[name].get("type") or name.rsplit(".", 1)[-1]) for name in names],
        places=[blocks.get(name, name) for name in names],
        blocks=list(dict.fromkeys(blocks.values())),
        balanced=np.array([first[name].get("balanced") is not False for name in names]),
        alpha=values["alpha"],
        score=values["score"],
        decay=values["weight_decay"],
        reasons=[
            (name, step, text)
            for (name, step), text in sorted(reasons.items(), key=lambda item: item[0][1])
        ],
    )


# ------------------------------------------------------------------------------ fields of records


def column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    """Return one field of all records as an array [records], nan where it is missing."""
    return np.array([number(record, key) for record in records])


def final_evaluation(run: Run) -> dict[str, Any] | None:
    """Return the evaluation marked final, or else the latest; None if there is no evaluation."""
    final = [record for record in run.evaluations if record.get("final") is True]
    candidates = final or run.evaluations
    return candidates[-1] if candidates else None


def section(info: dict[str, Any], name: str) -> dict[str, Any]:
    """Return info[name] if it is a dictionary, and an empty dictionary otherwise."""
    value = info.get(name)
    return value if isinstance(value, dict) else {}


def number(record: dict[str, Any], key: str) -> float:
    """Return record[key] as a float.

    nan if it is missing, null, infinite or not a number. Records hold null for undefined values.
    """
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)
