"""Delete old checkpoints, and what killed processes left behind."""

import json
import shutil
from pathlib import Path

from loguru import logger

from peft_pretraining.checkpoint.find import restore_replaced
from peft_pretraining.checkpoint.format import TRAINER, checkpoints_of, find_corruption, step_of
from peft_pretraining.utils.files import fsync_path, reason_of


def tidy(run_folder: Path, newest: Path, keep: int | None, milestone_every: int | None) -> None:
    """Delete what a killed process left behind and would have deleted.

    Args:
        run_folder: The folder of the run.
        newest: The checkpoint that the run continues from, which has been verified. If it is not
            the newest one of this run, no checkpoint is deleted.
        keep, milestone_every: See `delete_old`.
    """
    try:
        remove_leftovers(run_folder)
    except OSError as error:
        logger.warning(f"{run_folder} could not be tidied ({reason_of(error)})")
    if max(checkpoints_of(run_folder), key=step_of, default=None) == newest:
        delete_old_or_warn(run_folder, keep, milestone_every)


def delete_old_or_warn(run_folder: Path, keep: int | None, milestone_every: int | None) -> None:
    """Delete old checkpoints, see `delete_old`; log a warning if that fails."""
    try:
        delete_old(run_folder, keep, milestone_every)
    except OSError as error:
        logger.warning(
            f"an old checkpoint could not be deleted ({reason_of(error)}): "
            "the next save tries again"
        )


def delete_old(run_folder: Path, keep: int | None, milestone_every: int | None) -> None:
    """Delete old checkpoints.

    A damaged checkpoint is not counted and not deleted: a person may want to look at it. A
    temporary one, which was saved because of the time that had passed, is deleted as soon as there
    is a newer one, and is not counted otherwise.

    Args:
        run_folder: The folder of the run.
        keep: How many of the newest checkpoints stay. None: all that are not temporary.
        milestone_every: Checkpoints whose number of updates is a multiple of this stay as well.

    Raises:
        OSError: A checkpoint cannot be renamed.
    """
    complete = sorted(
        (p for p in checkpoints_of(run_folder) if find_corruption(p, compare_hashes=False) is None),
        key=step_of,
    )
    temporary = [folder for folder in complete[:-1] if _is_temporary(folder)]
    others = [folder for folder in complete if folder not in temporary]
    for folder in temporary + (others[:-keep] if keep else []):
        if milestone_every and step_of(folder) % milestone_every == 0:
            continue
        # Rename it first: a kill during the deletion must not leave a damaged checkpoint.
        deleted = folder.with_name(folder.name + ".deleted")
        folder.rename(deleted)
        fsync_path(folder.parent)
        remove_folder(deleted)


def _is_temporary(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / TRAINER).read_text(encoding="utf8")).get("temporary"))
    except (OSError, ValueError, AttributeError):
        return False


def remove_leftovers(run_folder: Path) -> None:
    """Delete the folders that a killed process left half written or half deleted."""
    restore_replaced(run_folder)
    for suffix in ("tmp", "deleted", "replaced"):
        for folder in (run_folder / "checkpoints").glob(f"model_*.{suffix}"):
            remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder with all that is in it; log a warning if that fails."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning(
            f"{folder} could not be deleted ({reason_of(error)}): the next save tries again"
        )
