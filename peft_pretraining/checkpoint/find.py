"""Find the newest complete checkpoint of a run."""

import shutil
from pathlib import Path

from peft_pretraining.checkpoint.format import checkpoints_of, find_corruption, step_of
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext

# ----------------------------------------------------------------------------------------------------------------- finding


def find_checkpoint(place: str, run_folder: Path, ranks: DistributedContext) -> Path | None:
    """The checkpoint that `--continue_from` means: a checkpoint, the newest whole one of a run folder, or `auto` (the newest whole one
    of this run, None if it has none yet).

    All ranks call it together: rank 0 looks and compares every file with its SHA-256, all return what it found. In a run folder each
    damaged checkpoint that is newer than the one found is a warning. Raises the same UserError on all ranks where there is nothing to
    continue from: no checkpoint, the one that was named is damaged, or all of them are.
    """
    found = problem = None
    if ranks.is_main:
        try:
            found = _find(place, run_folder)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--continue_from {place}: {error.filename} cannot be read ({error.strerror}); make it readable"
    found, problem = ranks.broadcast((found, problem))
    if problem:
        raise UserError(problem)
    return found


def _find(place: str, run_folder: Path) -> Path | None:
    if place == "auto":
        return newest_checkpoint(run_folder)
    folder = Path(place).resolve()
    if step_of(folder) >= 0 and folder.is_dir():
        if damage := find_corruption(folder):
            raise UserError(f"{damage}: continue from an older checkpoint")
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UserError(
            f"--continue_from {place}: no checkpoint there; give a folder checkpoints/model_<step>, a run folder, or auto"
        )
    return newest


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The whole checkpoint with the greatest step in `run_folder`/checkpoints, None if there is no checkpoint at all.

    Warns of each damaged one that is newer. Raises UserError where all are damaged: to start from scratch would be a loss unnoticed.
    """
    from loguru import logger

    restore_replaced(run_folder)
    damages = []
    for folder in sorted(checkpoints_of(run_folder), key=step_of, reverse=True):
        damage = find_corruption(folder)
        if damage is None:
            return folder
        logger.warning(f"{damage}: {folder.name} is passed over for an older checkpoint")
        damages.append(damage)
    if damages:
        raise UserError(
            f"no checkpoint in {run_folder / 'checkpoints'} is whole ({damages[0]}): continue from another run, or start anew in another "
            "--save_dir"
        )
    return None


def archive_newer_checkpoints(run_folder: Path, step: int) -> list[Path]:
    """A run that goes on from an older checkpoint leaves its later ones behind, the damaged too: rename them to
    model_<step>.abandoned, so that `auto` does not take one of them for the newest. Returns those that were there."""
    newer = [p for p in checkpoints_of(run_folder) if step_of(p) > step]
    for folder in newer:
        target = folder.with_name(folder.name + ".abandoned")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    return newer


def restore_replaced(run_folder: Path) -> None:
    """After a kill just between the two renames by which a checkpoint takes the place of one of the same step: the old one again."""
    for folder in (run_folder / "checkpoints").glob("model_*.replaced"):
        if not folder.with_suffix("").exists():
            folder.rename(folder.with_suffix(""))
