"""Delete old checkpoints, and what killed processes left behind."""

import shutil
from pathlib import Path

from loguru import logger

from peft_pretraining.checkpoint.find import restore_replaced
from peft_pretraining.checkpoint.format import checkpoints_of, find_corruption, step_of
from peft_pretraining.utils.files import fsync_path, reason_of


def delete_old(run_folder: Path, keep: int, milestone_every: int | None) -> None:
    """Delete old checkpoints.

    A damaged checkpoint is not counted and not deleted: a person may want to look at it.

    Args:
        run_folder: The folder of the run.
        keep: How many of the newest checkpoints stay.
        milestone_every: Checkpoints whose number of updates is a multiple of this stay as well.

    Raises:
        OSError: A checkpoint cannot be renamed.
    """
    complete = sorted(
        (p for p in checkpoints_of(run_folder) if find_corruption(p, compare_hashes=False) is None),
        key=step_of,
    )
    for folder in complete[:-keep]:
        if milestone_every and step_of(folder) % milestone_every == 0:
            continue
        # Rename it first: a kill during the deletion must not leave a damaged checkpoint.
        deleted = folder.with_name(folder.name + ".deleted")
        folder.rename(deleted)
        fsync_path(folder.parent)
        remove_folder(deleted)


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
