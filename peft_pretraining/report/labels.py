"""Short names for the runs of a comparison."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_pretraining.records.reader import Run, section
from peft_pretraining.report.plots import LEGEND_LENGTH

# Arguments that do not change what is trained, and those that the name of the method contains.
BOOKKEEPING = {
    "activation_checkpointing", "auto_resume", "batch_size", "compile", "continue_from", "device",
    "dist_eval", "dry_run", "enable_wandb", "eval_every", "gradient_accumulation",
    "keep_checkpoints", "keep_every", "log_dir", "log_every", "loss", "name", "no_wandb",
    "num_workers", "on_save_error", "output_dir", "pin_mem", "profile", "project", "resume",
    "same_settings_only", "save_ckpt_num", "save_dir", "save_every", "save_every_minutes", "tags",
    "deterministic", "timeout_minutes", "update_freq", "wandb_ckpt", "wandb_name", "workers",
}  # fmt: skip
IN_METHOD = {
    "adamc", "alpha_positively_with_WD", "assign_func", "cautious_decay", "esd_metric_for_tb",
    "iso_budget", "method", "one_shot", "shuffle_decays", "type_constant", "use_AWD_NeurIPS2023",
    "use_AdaDecay", "use_modulewise_wd",
}  # fmt: skip
FIRST = ("model_config", "model", "optimizer", "lr", "weight_decay", "seed")
WORDS = {"weight_decay": "decay", "model_config": "", "model": "", "optimizer": ""}


def label_runs(runs: Sequence[Run]) -> None:
    """Give the runs of a comparison labels that differ and fit into a legend.

    Names that are short and differ are kept. Otherwise the runs are named by the settings in which
    they differ, or else by the parts of their names that differ.

    Args:
        runs: The runs, whose labels are changed.
    """
    names = [run.label for run in runs]
    if _usable(names):
        return
    for labels in (_by_settings(runs), _without_common_parts(names)):
        if _usable(labels):
            break
    else:
        folders = [run.folder.resolve().name for run in runs]
        labels = folders if _usable(folders) else _numbered(names)
    for run, label in zip(runs, labels, strict=True):
        run.label = label


def _usable(labels: Sequence[str]) -> bool:
    return len(set(labels)) == len(labels) and all(0 < len(x) <= LEGEND_LENGTH for x in labels)


def _by_settings(runs: Sequence[Run]) -> list[str]:
    """Return labels such as `alphadecay, lr 0.001, seed 5`, of the settings that differ."""
    settings = [_settings(run) for run in runs]
    known = dict.fromkeys(name for one in settings for name in one)
    order = ["method", *FIRST, *sorted(known.keys() - {"method", *FIRST})]
    differing = [name for name in order if len({str(one.get(name)) for one in settings}) > 1]
    labels = [""] * len(runs)
    for position, name in enumerate(differing):
        if position and name not in FIRST and len(set(labels)) == len(labels):
            break  # the main settings are all named; of the others only as many as it takes
        labels = [
            ", ".join(filter(None, [label, _words(name, one.get(name))]))
            for label, one in zip(labels, settings, strict=True)
        ]
    return labels


def _settings(run: Run) -> dict[str, Any]:
    """Return the settings by which a run can be named."""
    found = {
        name: value
        for name, value in section(run.info, "arguments").items()
        if name not in BOOKKEEPING
    }
    if isinstance(run.info.get("method"), str):
        found = {name: value for name, value in found.items() if name not in IN_METHOD}
        found["method"] = run.info["method"]
    if isinstance(found.get("model_config"), str):
        found["model_config"] = Path(found["model_config"]).stem
    return found


def _words(name: str, value: Any) -> str:
    """Return a setting as a part of a label."""
    if isinstance(value, bool) or value is None:
        return name if value else f"no {name}"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if name == "method" else f"{WORDS.get(name, name)} {text}".strip()


def _without_common_parts(names: Sequence[str]) -> list[str]:
    """Return the names without what all of them begin and end with, up to a word's end."""
    start = os.path.commonprefix(list(names))
    start = start[: max(start.rfind("-"), start.rfind("_"), start.rfind(" ")) + 1]
    rest = [name[len(start) :] for name in names]
    end = os.path.commonprefix([name[::-1] for name in rest])[::-1]
    places = [place for place in (end.find("-"), end.find("_"), end.find(" ")) if place >= 0]
    end = end[min(places) :] if places else ""
    return [name[: len(name) - len(end)] for name in rest]


def _numbered(names: Sequence[str]) -> list[str]:
    width = LEGEND_LENGTH - 5
    return [f"{name[:width]} #{i + 1}" for i, name in enumerate(names)]
