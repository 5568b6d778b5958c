"""Start or resume a run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from loguru import logger
from torch.optim import Optimizer

from peft_pretraining.checkpoint.find import archive_newer_checkpoints, find_checkpoint
from peft_pretraining.checkpoint.format import TRAINER, checkpoints_of, step_of
from peft_pretraining.checkpoint.load import load_checkpoint
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records.jsonl import RUN
from peft_pretraining.records.run_dir import check_no_existing_run, copy_records_up_to
from peft_pretraining.train.signals import was_restarted
from peft_pretraining.train.step import WeightDecayScheduler


def resolve_checkpoint(
    resume_from: str | None, run_folder: Path, ranks: DistributedContext
) -> tuple[str | None, Path | None]:
    """Return the place to resume from, and the checkpoint that it means.

    A run that torchrun has restarted after a failure always resumes from its own checkpoints.

    Args:
        resume_from: a checkpoint, a run folder, `auto` or None; see `find_checkpoint`.
        run_folder: the run folder.
        ranks: the processes of the run.

    Returns:
        The place, which is `auto` in a restarted run, and the checkpoint; None for the latter means
        that the training starts from scratch.

    Raises:
        UserError: the run would start in a folder that contains another run.
    """
    # With several nodes, torchrun counts the restart only on nodes where a process failed.
    restarted = int(ranks.sum(torch.tensor(int(was_restarted())))) > 0
    if restarted and (checkpoints_of(run_folder) or not resume_from):
        resume_from = "auto"
    checkpoint = find_checkpoint(resume_from, run_folder, ranks) if resume_from else None
    if ranks.is_main:
        # A run folder without checkpoints can be restarted from scratch; only its logs are lost.
        starts_again = bool(resume_from) and not checkpoints_of(run_folder)
        own = resume_from == "auto" or (
            checkpoint is not None and checkpoint.parents[1] == run_folder.resolve()
        )
        if not (own or starts_again):
            check_no_existing_run(run_folder)
        if resume_from == "auto" and not checkpoint:
            logger.info(f"no checkpoint in {run_folder} yet: training from the start")
    return resume_from, checkpoint


def resume(
    checkpoint: Path,
    arguments: Mapping[str, Any],
    total_updates: int,
    model: nn.Module,
    optimizer: Optimizer,
    decay: WeightDecayScheduler | None,
    data_fingerprint: str,
    ranks: DistributedContext,
    config: dict | None = None,
    extra: dict[str, nn.Module] | None = None,
) -> dict:
    """Load a checkpoint into the model and all else that the training depends on.

    Args:
        checkpoint: folder of the checkpoint.
        arguments: the arguments of this run by name. A difference from those in the checkpoint is
            a warning.
        total_updates: updates of the whole run.
        model, optimizer, decay: what the checkpoint is loaded into.
        data_fingerprint: of this run's data; see `Data`.
        ranks: the processes of the run.
        config, extra: see `load_checkpoint`.

    Returns:
        The progress that was saved: update_step and other counters.

    Raises:
        UserError: the checkpoint belongs to other data or to another kind of weight decay, does not
            fit the decay flags, was renamed, or has made all updates.
    """
    trainer = load_checkpoint(checkpoint, model, optimizer, ranks, config, extra)
    step = trainer["progress"]["update_step"]
    if step != step_of(checkpoint):
        raise UserError(
            f"{checkpoint} was saved after update {step}, but its name says "
            f"{step_of(checkpoint)}: rename it to model_{step}, or continue from another checkpoint"
        )
    if trainer["data"] != data_fingerprint:
        raise UserError(
            f"{checkpoint} was trained on other data: give the flags of group 'model and data' "
            "(see --help) that it was trained with"
        )
    if (decay is None) != (trainer["decay"] is None):
        raise UserError(
            f"{checkpoint} was trained with another kind of weight decay: give the decay flags "
            "that it was trained with"
        )
    if decay is not None:
        try:
            decay.load_state_dict(trainer["decay"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{checkpoint} does not fit the decay flags: {error}") from error
        # The first records are of the initial weights, which have just been replaced.
        decay.history.clear()
    for name, value in trainer["arguments"].items():
        if arguments.get(name, value) != value:
            logger.warning(
                f"--{name} is {arguments[name]}, was {value} in the checkpoint: the run will not "
                "be the one it continues"
            )
    if has_finished(checkpoint, total_updates):
        raise UserError(
            f"{checkpoint} has made all {total_updates} updates already: give more "
            "--num_training_steps or --epochs"
        )
    logger.info(f"continue from {checkpoint}")
    return trainer["progress"]


def check_same_settings(
    checkpoint: Path | None, run_folder: Path, arguments: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Check that the run which a command would continue was made with the same settings.

    Args:
        checkpoint: the checkpoint to continue from. None: the run has none yet, and its run.json
            says which settings it was started with.
        run_folder: the run folder.
        arguments: the arguments of this run by name.
        names: the arguments that must be equal.

    Raises:
        UserError: the message names every argument that differs.
    """
    if checkpoint:
        saved = json.loads((checkpoint / TRAINER).read_text(encoding="utf8"))["arguments"]
        what = str(checkpoint)
    else:
        try:
            saved = json.loads((run_folder / RUN).read_text(encoding="utf8"))["arguments"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # there is no run yet
        what = f"the run in {run_folder}"
    # A choice that the run makes itself at its start, such as --loss auto, is taken over.
    changed = [
        f"--{name} {saved[name]} there, {arguments[name]} here"
        for name in names
        if name in saved and arguments[name] not in (saved[name], "auto")
    ]
    if changed:
        raise UserError(
            f"{what} was made with other settings ({'; '.join(changed)}): give --name NEW for "
            "another run, or --continue_from auto to continue this one with the new settings"
        )


def has_finished(checkpoint: Path, total_updates: int) -> bool:
    """Return whether the run that wrote a checkpoint had nothing left to do.

    Args:
        checkpoint: folder of a checkpoint that `find_checkpoint` has verified.
        total_updates: updates of the whole run.
    """
    progress = json.loads((checkpoint / TRAINER).read_text(encoding="utf8"))["progress"]
    return step_of(checkpoint) >= total_updates and not progress.get("evaluation_due")


def saved_argument(checkpoint: Path, name: str) -> Any:
    """Return an argument of the run that wrote a checkpoint, or None if it is not stored.

    Args:
        checkpoint: folder of a checkpoint that `find_checkpoint` has verified.
        name: name of the argument.
    """
    return json.loads((checkpoint / TRAINER).read_text(encoding="utf8"))["arguments"].get(name)


def truncate_records_after(checkpoint: Path | None, run_folder: Path) -> None:
    """Remove the records after a checkpoint from the run folder; rank 0 calls this.

    A run that went on after its last checkpoint, or never had one, has records of updates that will
    be made again. Newer checkpoints are renamed.

    Args:
        checkpoint: the checkpoint that is resumed; None if the run starts from scratch.
        run_folder: the run folder.
    """
    done = step_of(checkpoint) if checkpoint else 0
    copy_records_up_to(
        checkpoint.parents[1] if checkpoint else run_folder, run_folder, done if checkpoint else -1
    )
    for newer in archive_newer_checkpoints(run_folder, done):
        logger.warning(
            f"{newer} is newer than the checkpoint being resumed: renamed to {newer.name}.abandoned"
        )


def describe_start(arguments: Mapping[str, Any], run_folder: Path, names: Sequence[str]) -> str:
    """Return where a run would start, for a dry run. Loads no weights.

    Args:
        arguments: the arguments of this run by name, with those of `complete_resume`.
        run_folder: the run folder.
        names: see `check_same_settings`.

    Raises:
        UserError: the run would start in a folder that contains another run.
    """
    where = arguments["continue_from"]
    if where not in (None, "auto"):
        return f"from {where}"
    if where is None:
        check_no_existing_run(run_folder)
        return "from scratch"
    newest = max(checkpoints_of(run_folder), key=step_of, default=None)
    if arguments["same_settings_only"]:
        check_same_settings(newest, run_folder, arguments, names)
    return f"from {newest}, the newest checkpoint of this run" if newest else "from scratch"
