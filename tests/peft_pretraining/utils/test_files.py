"""Files and folders are written completely or not at all; locks end with their process."""

import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

from peft_pretraining.utils import files


@pytest.mark.parametrize(
    "data, content",
    [
        ("naïve\r\n", "naïve\r\n".encode()),
        (b"\x00\xff", b"\x00\xff"),
        (bytearray(b"ab"), b"ab"),
        (np.array([[1, 2], [3, 4]], "<u2"), b"\1\0\2\0\3\0\4\0"),
        (np.array([[1, 2], [3, 4]], "<u2").T, b"\1\0\3\0\2\0\4\0"),
        (np.empty(0, "<u2"), b""),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_atomic_write_replaces_a_file(tmp_path, data, content, shared, durable):
    for name in ("new", "existing"):
        path = tmp_path / name
        if name == "existing":
            path.write_text("before")
        files.atomic_write(path, data, shared=shared, durable=durable)
        assert path.read_bytes() == content
    assert sorted(os.listdir(tmp_path)) == ["existing", "new"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_written_file_has_the_permissions_of_a_normal_file(tmp_path, shared):
    before = os.umask(0o027)
    try:
        files.atomic_write(tmp_path / "a", b"", shared=shared)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_write_leaves_nothing_behind(tmp_path, monkeypatch, failing, shared):
    path = tmp_path / "a"
    path.write_text("before")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        files.atomic_write(path, b"after", shared=shared)
    assert os.listdir(tmp_path) == ["a"] and path.read_text() == "before"


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(KeyboardInterrupt), files.atomic_open(tmp_path / "a") as file:
        file.write(b"half of it")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_only_a_durable_write_is_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(fsync(descriptor)))
    files.atomic_write(tmp_path / "a", b"", durable=False)
    with files.atomic_directory(tmp_path / "b", durable=False) as folder:
        (folder / "c").write_text("")
    assert not flushed
    files.atomic_write(tmp_path / "a", b"")
    assert len(flushed) == 2  # the file and the folder that names it
    with files.atomic_directory(tmp_path / "b") as folder:
        (folder / "c").write_text("")
        (folder / "d").mkdir()
    assert len(flushed) == 2 + 3 + 2  # two files, the new folder, its two parents


def test_shared_writers_have_temporary_files_of_their_own(tmp_path):
    path = tmp_path / "a"
    with files.atomic_open(path, shared=True) as first:
        with files.atomic_open(path, shared=True) as second:
            first.write(b"first")
            second.write(b"second")
            assert len(os.listdir(tmp_path)) == 2
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["a"]


def fill(folder, content):
    (folder / "sub").mkdir()
    (folder / "sub/a").write_text(content)


@pytest.mark.parametrize("shared", [False, True])
def test_atomic_directory_replaces_a_folder(tmp_path, shared):
    path = tmp_path / "parent/folder"
    for content in ("one", "two"):
        with files.atomic_directory(path, shared=shared) as folder:
            assert folder.parent == path.parent and folder != path and not os.listdir(folder)
            fill(folder, content)
        assert (path / "sub/a").read_text() == content
        assert os.listdir(path.parent) == ["folder"]


def test_atomic_directory_removes_what_a_killed_process_left(tmp_path):
    for name in ("folder.tmp", "folder.replaced", "folder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("")
    with files.atomic_directory(tmp_path / "folder") as folder:
        fill(folder, "new")
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(tmp_path / "folder") == ["sub"]


def test_atomic_directory_leaves_the_old_folder_after_an_error(tmp_path):
    path = tmp_path / "folder"
    with files.atomic_directory(path) as folder:
        fill(folder, "before")
    with pytest.raises(ZeroDivisionError), files.atomic_directory(path) as folder:
        fill(folder, "after")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["folder"] and (path / "sub/a").read_text() == "before"


def test_a_folder_whose_replacement_fails_gets_its_name_back(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(FileNotFoundError):
        files.replace_directory(tmp_path / "missing", path, durable=False)
    assert os.listdir(tmp_path) == ["folder"]


def test_atomic_directory_may_keep_the_folder_of_a_faster_process(tmp_path):
    path = tmp_path / "folder"
    with files.atomic_directory(path, shared=True, keep_existing=True) as folder:
        fill(folder, "slower")
        with files.atomic_directory(path, shared=True, keep_existing=True) as other:
            fill(other, "faster")
    assert os.listdir(tmp_path) == ["folder"] and (path / "sub/a").read_text() == "faster"


def test_a_lock_excludes_others_until_it_is_released(tmp_path):
    waited = []
    with files.exclusive_lock(tmp_path / ".lock", on_wait=lambda: waited.append("first")):
        (tmp_path / ".lock").write_text("12\n")
        with (
            pytest.raises(TimeoutError),
            files.exclusive_lock(tmp_path / ".lock", 0.1, lambda: waited.append("second")),
        ):
            pytest.fail("two hold the lock")
        assert (tmp_path / ".lock").read_text() == "12\n"  # the holder's note is not touched
    assert waited == ["second"]
    with files.exclusive_lock(tmp_path / ".lock", 0, lambda: waited.append("third")):
        pass
    assert waited == ["second"]


def test_a_lock_without_timeout_waits_for_its_turn(tmp_path):
    waiting, order = threading.Event(), []

    def second():
        with files.exclusive_lock(tmp_path / ".lock", on_wait=waiting.set):
            order.append("second")

    with files.exclusive_lock(tmp_path / ".lock"):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(20)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


HOLDER = """
import sys, time
from pathlib import Path
from peft_pretraining.utils.files import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_holds_no_lock(tmp_path):
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(TimeoutError), files.exclusive_lock(path, 0):
            pytest.fail("two hold the lock")
        holder.send_signal(signal.SIGKILL)
        with files.exclusive_lock(path, 10):
            pass


def test_sha256_of_a_file_longer_than_a_chunk(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def raised(error, cause=None, context=None):
    try:
        if context is not None:
            try:
                raise context
            except type(context):
                raise error  # noqa: B904 - the context is what is tested
        raise error from cause
    except type(error) as found:
        return found


@pytest.mark.parametrize(
    "error, reason",
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (OSError("the line is down"), "the line is down"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (FileNotFoundError(2, "No such file", "a/b"), "No such file: a/b"),
        (raised(ValueError("x"), cause=OSError(28, "No space")), "No space"),
        (raised(ValueError("x"), context=OSError(28, "No space")), "No space"),
        (raised(ValueError("x"), cause=KeyError("y")), "x"),
    ],
)
def test_reason_of_an_error(error, reason):
    assert files.reason_of(error) == reason


def test_a_suppressed_context_is_not_the_reason():
    try:
        try:
            raise OSError(28, "No space")
        except OSError:
            raise ValueError("x") from None
    except ValueError as error:
        assert files.reason_of(error) == "x"


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_of_a_new_folder_have_the_permissions_that_the_umask_asks_for(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with files.atomic_directory(tmp_path / "new") as folder:
            (folder / "inner").mkdir()
            private = folder / "inner/private"
            private.touch(mode=0o600)
            (folder / "program").touch(mode=0o777)
    finally:
        os.umask(before)
    new = tmp_path / "new"
    assert (new / "inner/private").stat().st_mode & 0o777 == mode
    assert (new / "program").stat().st_mode & 0o700 == 0o700
    assert sorted(path.name for path in new.iterdir()) == ["inner", "program"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_is_removed_by_the_next_one(kind, tmp_path):
    """Also where several processes write the same target, each under a name of its own."""
    target = tmp_path / "a[1].gz"
    code = (
        "import os, sys; from pathlib import Path; from peft_pretraining.utils import files\n"
        "write = files.atomic_directory if sys.argv[2] == 'folder' else files.atomic_open\n"
        "with write(Path(sys.argv[1]), shared=True): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, target, kind])
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    alive = tmp_path / f"{target.name}.{socket.gethostname()}.{os.getpid()}.0.tmp"
    elsewhere = tmp_path / f"{target.name}.another-machine.1.0.tmp"
    alive.touch(), elsewhere.touch()
    files.atomic_write(target, b"whole", shared=True)
    assert sorted(tmp_path.iterdir()) == sorted([target, alive, elsewhere])
