"""The run folder: its lock, checks before a run starts, and records up to an update."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from peft_pretraining.errors import UserError
from peft_pretraining.records.jsonl import LOCK, METRICS, MODULES


def check_no_existing_run(folder: Path) -> None:
    """For a run that begins: raises UserError where its folder holds the records of another."""
    if (folder / METRICS).exists() and (folder / METRICS).stat().st_size:
        raise UserError(
            f"{folder} already holds a run: go on with it by --continue_from auto (main_vit.py: --auto_resume true), or use another"
        )


@contextlib.contextmanager
def run_lock(folder: Path, patience: float = 15.0) -> Iterator[None]:
    """Make the run folder and hold it for this process. Raises UserError where it cannot be written, or where another process holds it:
    two runs in one folder would mix.

    patience: seconds to wait for one that is about to end (torchrun may restart a run before its killed processes are gone).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")
    except OSError as error:
        raise UserError(
            f"the run folder {folder} cannot be written ({error.strerror}): give another --save_dir"
        ) from error
    with file:
        deadline = time.monotonic() + patience
        while not _locked(file):
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process trains in {folder}: end it (its number is in {folder / LOCK}), or give another --save_dir"
                )
            time.sleep(0.2)
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield


def _locked(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        pass
    return True


def copy_records_up_to(source: Path, target: Path, step: int) -> None:
    """Keep of a run's records what lies before a checkpoint: copy the lines of `source` up to `step` to `target`.

    A run that went on past its last checkpoint, or was killed while it wrote a line, has more; it will be written again.
    """
    for name, key in ((METRICS, "update_step"), (MODULES, "step")):
        kept = []
        path = source / name
        for line in path.read_text(encoding="utf8").splitlines() if path.is_file() else ():
            try:
                if json.loads(line)[key] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill
        temporary = target / (name + ".tmp")
        try:
            target.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(kept), encoding="utf8")
            temporary.replace(target / name)
        except OSError as error:
            raise UserError(
                f"{target / name} cannot be written ({error.strerror}): make room there or make it writable"
            ) from error
