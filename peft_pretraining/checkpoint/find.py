"""Find the newest complete checkpoint of a run."""

import shutil
from pathlib import Path

from loguru import logger

from peft_pretraining.checkpoint.format import checkpoints_of, find_corruption, step_of
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext


def find_checkpoint(source: str, run_folder: Path, ranks: DistributedContext) -> Path | None:
    """Return the checkpoint that a value of --continue_from names.

    All ranks must call this together. Rank 0 searches and compares the SHA-256 of every file; all
    ranks return what it found. In a run folder, each damaged checkpoint that is newer than the one
    found is logged as a warning.

    Args:
        source: A checkpoint; a run folder, for its newest complete checkpoint; or `auto`, for the
            newest complete checkpoint of this run.
        run_folder: The folder of this run.
        ranks: All processes of the run.

    Returns:
        The checkpoint; None for `auto` if this run has none yet.

    Raises:
        UserError: There is no checkpoint, or the named one is damaged, or all of them are. Raised
            on all ranks.
    """
    found = problem = None
    if ranks.is_main:
        try:
            found = _find(source, run_folder)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"--continue_from {source}: {error.filename} cannot be read ({error.strerror}); "
                "make it readable"
            )
    found, problem = ranks.broadcast_object((found, problem))
    if problem:
        raise UserError(problem)
    return found


def _find(source: str, run_folder: Path) -> Path | None:
    if source == "auto":
        return newest_checkpoint(run_folder)
    folder = Path(source).resolve()
    if step_of(folder) >= 0 and folder.is_dir():
        if corruption := find_corruption(folder):
            raise UserError(f"{corruption}: continue from an older checkpoint")
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UserError(
            f"--continue_from {source}: no checkpoint there; give a folder "
            "checkpoints/model_<step>, a run folder, or auto"
        )
    return newest


def newest_checkpoint(run_folder: Path) -> Path | None:
    """Return the complete checkpoint of a run with the most updates.

    Each damaged checkpoint that is newer is logged as a warning.

    Returns:
        The checkpoint; None if the run has no checkpoint at all.

    Raises:
        UserError: All checkpoints are damaged. The run must not silently start from scratch.
    """
    restore_replaced(run_folder)
    corruptions = []
    for folder in sorted(checkpoints_of(run_folder), key=step_of, reverse=True):
        corruption = find_corruption(folder)
        if corruption is None:
            return folder
        logger.warning(f"{corruption}: {folder.name} is skipped, looking for an older checkpoint")
        corruptions.append(corruption)
    if corruptions:
        raise UserError(
            f"no checkpoint in {run_folder / 'checkpoints'} is complete ({corruptions[0]}): "
            "continue from another run, or start from scratch in another --save_dir"
        )
    return None


def archive_newer_checkpoints(run_folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after an update, complete or damaged, to model_<step>.abandoned.

    A run that continues from an older checkpoint does this, so that `--continue_from auto` does
    not take one of the previous attempt for its newest.

    Args:
        run_folder: The folder of the run.
        step: The number of updates of the checkpoint that the run continues from.

    Returns:
        The paths that the checkpoints had before.
    """
    newer = [p for p in checkpoints_of(run_folder) if step_of(p) > step]
    for folder in newer:
        target = folder.with_name(folder.name + ".abandoned")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    return newer


def restore_replaced(run_folder: Path) -> None:
    """Undo a replacement that was interrupted.

    Saving an update again renames the previous checkpoint to model_<step>.replaced before the new
    one gets its name. If the process was killed in between, the previous one gets its name back.
    """
    for folder in (run_folder / "checkpoints").glob("model_*.replaced"):
        if not folder.with_suffix("").exists():
            folder.rename(folder.with_suffix(""))
