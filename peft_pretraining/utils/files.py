"""Write files and folders that are complete or absent, lock folders, hash files, describe errors.

A file or folder is written under a temporary name beside its target and renamed when it is
complete. A reader therefore sees the old content or the new content, never a part, even if the
process is killed or the machine loses power. When writing fails, the target is unchanged and the
temporary file or folder is removed; only a killed process leaves one behind, under a name that
ends in `TEMPORARY_SUFFIX`, and the next write to the same target removes it.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import numpy as np

TEMPORARY_SUFFIX = ".tmp"
REPLACED_SUFFIX = ".replaced"


def atomic_write(
    path: Path,
    data: str | bytes | bytearray | memoryview | np.ndarray,
    *,
    durable: bool = True,
    shared: bool = False,
) -> None:
    """Write a file that is complete as soon as it has its name.

    Args:
        path: The file to write; an existing file is replaced. Its folder must exist.
        data: The content. A str is encoded as UTF-8 without translating line ends; of an array
            the elements are written in C order, without shape or type.
        durable: Flush the content and the new name to the disk before returning, so that they
            survive a power failure. False is faster.
        shared: Use a unique temporary name. Needed where several processes may write the same
            file at the same time; the last one then wins.

    Raises:
        OSError: The file cannot be written. The target is unchanged.
    """
    content: bytes | bytearray | memoryview
    if isinstance(data, str):
        content = data.encode()
    elif isinstance(data, bytes | bytearray | memoryview):
        content = data
    else:
        content = data.tobytes() if not data.flags.c_contiguous else data.data
    with atomic_open(path, durable=durable, shared=shared) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_open(path: Path, *, durable: bool = True, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file for writing and give it its name when the block ends without an error.

    Args, Raises: as for `atomic_write`.
    """
    temporary = _temporary_path(path, shared)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_path(path.parent)


@contextlib.contextmanager
def atomic_directory(
    path: Path, *, durable: bool = True, shared: bool = False, keep_existing: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it becomes `path` when the block ends without error.

    Args:
        path: The folder to make. Its parents are made if they do not exist.
        durable: As for `atomic_write`.
        shared: As for `atomic_write`.
        keep_existing: If `path` exists by then, because another process was faster, leave it as
            it is and discard the new folder. Otherwise the new folder replaces it.

    Raises:
        OSError: The folder cannot be written or renamed. `path` is unchanged.
    """
    temporary = _temporary_path(path, shared)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _make_readable(temporary)
        if keep_existing and path.is_dir():
            shutil.rmtree(temporary)
            return
        try:
            replace_directory(temporary, path, durable=durable)
        except OSError:
            if not (keep_existing and path.is_dir()):
                raise
            shutil.rmtree(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _make_readable(folder: Path) -> None:
    """Give the files in a new folder the permissions that the umask asks for.

    safetensors writes files that only their owner can read, so a colleague in the same group could
    not load a checkpoint. The umask is read off a new file, because asking for it changes it.
    """
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | mode)


def replace_directory(new: Path, path: Path, *, durable: bool = True) -> None:
    """Rename the complete folder `new` to `path`; a folder of that name is replaced.

    A non-empty folder cannot be replaced by one rename. The old one is renamed to
    `path` + `REPLACED_SUFFIX` first and deleted last, so that it can be restored after a kill
    between the two renames.

    Args:
        new: A folder on the same file system, with all its content.
        path: The name that it gets.
        durable: Flush the content of `new` and the new names to the disk.

    Raises:
        OSError: A file cannot be flushed, or a folder cannot be renamed.
    """
    if durable:
        for part in (*new.rglob("*"), new):
            fsync_path(part)
    replaced = path.with_name(path.name + REPLACED_SUFFIX)
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
        try:
            new.rename(path)
        except OSError:
            replaced.rename(path)
            raise
    else:
        new.rename(path)
    if durable:
        fsync_path(path.parent)
        fsync_path(path.parent.parent)  # It has a new entry if path.parent was made just now.
    shutil.rmtree(replaced, ignore_errors=True)


def _temporary_path(path: Path, shared: bool) -> Path:
    if not shared:
        return path.with_name(path.name + TEMPORARY_SUFFIX)
    host = socket.gethostname()
    _remove_what_killed_processes_left(path, host)
    unique = f"{host}.{os.getpid()}.{uuid.uuid4().hex}"
    return path.with_name(f"{path.name}.{unique}{TEMPORARY_SUFFIX}")


def _remove_what_killed_processes_left(path: Path, host: str) -> None:
    """Remove temporary files for a target whose writers on this machine have ended."""
    pattern = f"{glob.escape(f'{path.name}.{host}.')}*{TEMPORARY_SUFFIX}"
    for left in path.parent.glob(pattern):
        pid = left.name[len(f"{path.name}.{host}.") :].split(".")[0]
        if not pid.isdigit() or _runs(int(pid)):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Return whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive_lock(
    path: Path, timeout: float | None = None, on_wait: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on a file while the block runs.

    The operating system releases the lock when the process ends, even if it is killed.
    The holder may write to the file, for example its process id.

    Args:
        path: The lock file; made if it does not exist, and left there.
        timeout: Seconds to wait for another holder. None: wait until it is free.
        on_wait: Called once if another process or thread holds the lock, before waiting for it.

    Raises:
        TimeoutError: The lock was not free within `timeout` seconds.
        OSError: The lock file cannot be made.
    """
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire(timeout=-1 if timeout is None else timeout)
    try:
        yield
    finally:
        lock.release()


def walk_files(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it, with `/`, sorted.

    Links to folders are followed; a folder that several links lead to is visited once, and so is
    one that a link below it leads back to.
    """
    found: list[str] = []
    visited: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders.sort()
        found += [Path(place, file).relative_to(folder).as_posix() for file in files]
    return sorted(found)


def is_hidden(name: str) -> bool:
    """Return whether a path has a part that belongs to another program, such as `.cache`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def describe_left_out(left_out: Iterable[tuple[str, str]], shown: int = 3) -> str:
    """Return how many files are left out for which reason, with the first names; "" for none.

    Args:
        left_out: (name, reason) of each file.
        shown: Number of names for each reason.
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out:
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{len(names):,} {reason} ({', '.join(names[:shown])}{', ...' * (len(names) > shown)})"
        for reason, names in by_reason.items()
    )


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file. Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def reason_of(error: BaseException) -> str:
    """Return why an operation failed, on one line.

    Libraries often raise a long error of their own because of an error of the operating system.
    The latter's text ("No space left on device") is returned if there is one among the causes,
    otherwise the text of `error`, or its class where it has no text.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror}: {cause.filename}" if cause.filename else cause.strerror
        context = None if cause.__suppress_context__ else cause.__context__
        cause = cause.__cause__ or context
    return " ".join(str(error).split()) or type(error).__name__
