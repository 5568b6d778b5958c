"""Read what a run folder holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_pretraining.errors import UserError

if (
    TYPE_CHECKING
):  # matplotlib takes a second to import: the functions that draw import it themselves
    pass
from dataclasses import dataclass
from typing import TYPE_CHECKING

if (
    TYPE_CHECKING
):  # matplotlib takes a second to import: the functions that draw import it themselves
    pass
pass

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


def read_text(path: Path) -> str:
    """The file's text; UserError where it is missing or cannot be read. Broken characters are left to the JSON reader to refuse."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} holds no {path.name}; give the folder of a run, such as runs/<name>."
        ) from None
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
            raise UserError(
                f"{path}, line {line_number}: not valid JSON; remove or repair that line."
            ) from None
        if not isinstance(row, dict) or math.isnan(number(row, step_key)):
            raise UserError(
                f'{path}, line {line_number}: expected a JSON object with a number under "{step_key}".'
            )
        rows.append(row)
    return rows


def latest_by_step(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each update step, sorted. A resumed run repeats the steps after its checkpoint: the last one written counts."""
    return [row for _, row in sorted({int(row["update_step"]): row for row in rows}.items())]


def read_run(folder: Path | str) -> Run:
    """Read run.json, metrics.jsonl and (if there is one) modules.jsonl. UserError: no such folder, no metrics, a broken file."""
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
    evaluations = latest_by_step([row for row in metrics if "eval_loss" in row])
    training = latest_by_step([row for row in metrics if "eval_loss" not in row and "loss" in row])
    if not evaluations and not training:
        raise UserError(
            f"{folder / 'metrics.jsonl'} holds no logged step and no evaluation yet; nothing to report."
        )
    history = read_lines(folder / "modules.jsonl", "step")
    return Run(
        folder,
        info,
        training,
        evaluations,
        module_table(history),
        label=str(info.get("name") or folder.resolve().name),
    )


def module_table(history: list[dict[str, Any]]) -> Modules | None:
    """Arrange the lines of modules.jsonl as arrays [updates, modules]; None if there are none."""
    if not history:
        return None
    first: dict[str, dict[str, Any]] = {}
    for row in history:
        first.setdefault(str(row.get("module")), row)
    names = list(first)
    steps = np.array(sorted({int(row["step"]) for row in history}))
    column, line = (
        {name: i for i, name in enumerate(names)},
        {step: i for i, step in enumerate(steps.tolist())},
    )
    values = {
        key: np.full((len(steps), len(names)), np.nan) for key in ("alpha", "score", "weight_decay")
    }
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
        blocks=list(
            dict.fromkeys(
                place for name, place in zip(names, places, strict=True) if first[name].get("block")
            )
        ),
        balanced=np.array([first[name].get("balanced") is not False for name in names]),
        alpha=values["alpha"],
        score=values["score"],
        decay=values["weight_decay"],
        reasons=[
            (name, step, text)
            for (name, step), text in sorted(reasons.items(), key=lambda item: item[0][1])
        ],
    )


# ------------------------------------------------------------------------------------------------------- numbers and their names


def column(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """One field of all rows, [rows], nan where it is missing."""
    return np.array([number(row, key) for row in rows])


def final_evaluation(run: Run) -> dict[str, Any] | None:
    """The evaluation marked final, else the latest one; None if the run was never evaluated."""
    final = [row for row in run.evaluations if row.get("final") is True]
    return (final or run.evaluations or [None])[-1]


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
