"""The run folder: its lock, the check before a run starts, and the records up to an update."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

from peft_pretraining.errors import UserError
from peft_pretraining.records.jsonl import LOCK, METRICS, MODULES
from peft_pretraining.utils.files import atomic_write, exclusive_lock

# What a file system without locks answers.
NO_LOCK_ERRORS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def check_no_existing_run(folder: Path) -> None:
    """Check that a run which starts from scratch does not mix its records with those of another.

    Raises:
        UserError: The folder has records already.
    """
    if (folder / METRICS).exists() and (folder / METRICS).stat().st_size:
        raise UserError(
            f"{folder} already holds a run: continue it with --continue_from auto, or give "
            "another --name"
        )


@contextlib.contextmanager
def run_lock(folder: Path, timeout: float = 15.0) -> Iterator[None]:
    """Create the run folder and lock it for this process: two runs in one folder would mix.

    The operating system releases the lock when the process ends, even if it is killed. On a file
    system without locks, the run goes on without one.

    Args:
        folder: The run folder.
        timeout: Seconds to wait for another process that is about to end. torchrun may restart a
            run before the processes that it killed have ended.

    Raises:
        UserError: The folder cannot be written, or another process holds the lock.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            holder = _process_number(path)
            with contextlib.suppress(NotImplementedError):  # the file system has no locks
                stack.enter_context(exclusive_lock(path, timeout))
            if holder is not None:
                path.write_text(f"{os.getpid()}\n")
        except TimeoutError as error:
            hint = f" (its number is {holder})" if holder else ""
            raise UserError(
                f"another process trains in {folder}: end it{hint}, or give another --save_dir"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCK_ERRORS:
                raise UserError(
                    f"the run folder {folder} cannot be written ({error.strerror}): "
                    "give another --save_dir"
                ) from error
        yield


def _process_number(path: Path) -> str | None:
    """Return the number of the last process that held a lock, and "" if it is not known.

    None if the file holds anything else: where the operating system has no locks, filelock keeps
    its own records in the file.
    """
    text = path.read_text().strip() if path.exists() else ""
    return text if not text or text.isdigit() else None


def copy_records_up_to(source: Path, target: Path, step: int) -> None:
    """Copy the records of a run up to an update, and drop later ones.

    A run that went on after its last checkpoint, or that was killed while it wrote a line, has more
    records. The resumed run writes them again.

    Args:
        source: The run folder to copy from.
        target: The run folder to write to; may be the same.
        step: The number of the last update to keep; -1 keeps nothing.

    Raises:
        UserError: The records cannot be written.
    """
    for name, step_key in ((METRICS, "update_step"), (MODULES, "step")):
        kept = []
        path = source / name
        for line in path.read_text(encoding="utf8").splitlines() if path.is_file() else ():
            try:
                if json.loads(line)[step_key] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # the incomplete last line of a killed run
        try:
            target.mkdir(parents=True, exist_ok=True)
            atomic_write(target / name, "".join(kept))
        except OSError as error:
            raise UserError(
                f"{target / name} cannot be written ({error.strerror}): "
                "make room there or make it writable"
            ) from error
