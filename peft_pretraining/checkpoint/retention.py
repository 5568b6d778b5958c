"""Which checkpoints are kept."""

import shutil
from pathlib import Path

from loguru import logger

from peft_pretraining.checkpoint.find import restore_replaced
from peft_pretraining.checkpoint.format import checkpoints_of, find_corruption, step_of
from peft_pretraining.utils.files import fsync_path, reason_of

# ---------------------------------------------------------------------------------------------------------------- deleting


def delete_old(run_folder: Path, keep: int, milestone_every: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and those whose step is a multiple of `milestone_every`.

    A damaged one does not count, and stays: a person may want to see it. Raises OSError where one cannot be renamed.
    """
    whole = sorted(
        (p for p in checkpoints_of(run_folder) if find_corruption(p, hashes=False) is None),
        key=step_of,
    )
    for folder in whole[:-keep]:
        if milestone_every and step_of(folder) % milestone_every == 0:
            continue
        # Under a name that is no checkpoint's first: a kill in between must not leave a damaged one.
        deleted = folder.with_name(folder.name + ".deleted")
        folder.rename(deleted)
        fsync_path(folder.parent)
        remove_folder(deleted)


def remove_leftovers(run_folder: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    restore_replaced(run_folder)
    for suffix in ("tmp", "deleted", "replaced"):
        for folder in (run_folder / "checkpoints").glob(f"model_*.{suffix}"):
            remove_folder(folder)


def remove_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning(
            f"{folder} could not be deleted ({reason_of(error)}): the next save tries again"
        )
