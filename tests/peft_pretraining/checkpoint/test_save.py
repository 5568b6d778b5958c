"""Saving in the background: consistent state, full disks, and kills at every step."""

import copy
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from peft_pretraining.checkpoint import save as save_module
from peft_pretraining.checkpoint.find import find_checkpoint, newest_checkpoint
from peft_pretraining.checkpoint.format import checkpoints_of, find_corruption, step_of
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.checkpoint.state import (
    load_optimizer_state_by_name,
    optimizer_state_by_name,
)
from peft_pretraining.errors import UserError
from tests.peft_pretraining.checkpoint.common import (
    FILES,
    SINGLE_PROCESS,
    adam,
    checkpoint_names,
    equal_states,
    load,
    save,
    state_of,
    train_one_update,
)


def test_the_saved_state_is_that_of_the_call(tmp_path, trained, monkeypatch):
    """Training goes on while a checkpoint is written, which holds the state at the call.

    Every file equals, byte for byte, that of a deep copy which is saved by itself.
    """
    model, optimizer = trained
    twin = copy.deepcopy(model)
    twin_optimizer = adam(twin)
    load_optimizer_state_by_name(
        twin, twin_optimizer, copy.deepcopy(optimizer_state_by_name(model, optimizer))
    )
    trainer = {"decays": {"a": 0.1}}
    undisturbed = Checkpoints(tmp_path / "undisturbed", SINGLE_PROCESS)
    undisturbed.save(20, twin, twin_optimizer, trainer, None)
    undisturbed.finish()

    foreach_copy, write_checkpoint = torch._foreach_copy_, save_module.write_checkpoint
    updated = threading.Event()
    monkeypatch.setattr(
        torch, "_foreach_copy_", lambda *a, **k: time.sleep(0.2) or foreach_copy(*a, **k)
    )
    monkeypatch.setattr(
        save_module, "write_checkpoint", lambda *a: updated.wait() and write_checkpoint(*a)
    )
    checkpoints = Checkpoints(tmp_path / "run", SINGLE_PROCESS)
    for step in (10, 20):  # the second save uses the memory of the first
        updated.clear()
        checkpoints.save(step, model, optimizer, trainer, None)
        trainer["decays"]["a"] += 1 if step == 20 else 0
        checkpoints.before_update()
        if step == 20:
            for _ in range(2):
                train_one_update(model, optimizer)
        updated.set()
        checkpoints.finish()
    saved = [tmp_path / where / "checkpoints/model_20" for where in ("undisturbed", "run")]
    for name in FILES:
        assert (saved[0] / name).read_bytes() == (saved[1] / name).read_bytes(), name
    assert checkpoint_names(tmp_path / "run") == ["model_10", "model_20"]


@pytest.mark.slow
def test_ranks_agree_and_an_exit_waits_for_the_save(tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, "tests/support/ranks/checkpoint.py", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    for rank in ranks:
        assert rank["newest"] == str(tmp_path / "checkpoints/model_10")
        assert "random_1.pt is damaged" in rank["named"] and "no checkpoint in" in rank["none"]
        assert rank["restored"] == rank["random"][0]
    assert ranks[0]["none"] == ranks[1]["none"] and ranks[0]["named"] == ranks[1]["named"]
    assert ranks[0]["random"] != ranks[1]["random"]
    assert ranks[0]["hashed"] > 0 and ranks[1]["hashed"] == 0
    assert find_corruption(tmp_path / "checkpoints/model_30") is None


# -------------------------------------------------------------------------------------- full disks


def full_disk(monkeypatch, limit):
    """Allow files of at most `limit` bytes; with 0, every fsync reports a full disk."""
    if limit:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )
    else:

        def fsync(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture(params=[0, 300, 12_000, 20_000], ids=["sync", "config", "weights", "optimizer"])
def disk_space(request):
    """The size of file at which the disk is full, and a function that makes room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fsync = os.fsync

    def make_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        os.fsync = fsync

    yield request.param, make_room
    make_room()


def test_a_full_disk(run, trained, logged_warnings, monkeypatch, disk_space):
    """Older checkpoints stay, nothing of the new one does, and the next save tries again."""
    limit, make_room = disk_space
    folder, _ = run
    checkpoints = Checkpoints(folder, SINGLE_PROCESS, keep=1)
    full_disk(monkeypatch, limit)
    checkpoints.save(30, *trained, {}, None)
    reason = "(No space left on device|File too large)"
    with pytest.raises(UserError, match=rf"model_30 could not be saved .*{reason}.*: make room"):
        checkpoints.finish()
    make_room()
    assert checkpoint_names(folder) == ["model_10", "model_20"]
    assert newest_checkpoint(folder).name == "model_20"
    assert checkpoints.failure() is None
    assert len(logged_warnings) == 1
    assert "training goes on and the next save tries again" in logged_warnings[0]
    checkpoints.save(40, *trained, {}, None)
    checkpoints.finish()
    assert checkpoint_names(folder) == ["model_40"]


def test_stop_on_a_full_disk(run, trained, logged_warnings, monkeypatch):
    folder, _ = run
    checkpoints = Checkpoints(folder, SINGLE_PROCESS, on_error="stop")
    assert checkpoints.failure() is None
    with monkeypatch.context() as patch:
        full_disk(patch, 0)
        checkpoints.save(30, *trained, {}, None)
        with pytest.raises(UserError, match="No space left on device"):
            checkpoints.finish()
    assert "model_30 could not be saved (No space left on device)" in checkpoints.failure()
    assert checkpoints.failure() is None and not logged_warnings


def test_the_reason_is_that_of_the_operating_system(tmp_path, trained):
    """Not the text of the library that met the full disk."""

    class Tokenizer:
        def save_pretrained(self, folder):
            raise RuntimeError("unexpected pos 704 vs 662") from OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC)
            )

    checkpoints = Checkpoints(tmp_path, SINGLE_PROCESS)
    checkpoints.save(10, *trained, {}, Tokenizer())
    with pytest.raises(UserError, match="could not be saved .No space left on device"):
        checkpoints.finish()


def test_a_checkpoints_path_that_is_a_file(tmp_path, trained):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="Not a directory|File exists"):
        save(tmp_path, 10, *trained)


# ------------------------------------------------------------------------------------------- kills


def test_a_checkpoint_that_could_not_be_replaced_comes_back(run, trained, monkeypatch):
    folder, _ = run
    rename = Path.rename

    def refuse(path, target):
        if path.suffix == ".tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(UserError, match="Input/output error"):
            save(folder, 20, *trained)
    Checkpoints(folder, SINGLE_PROCESS)
    assert checkpoint_names(folder) == ["model_10", "model_20"]


class Killed(BaseException):
    """Stands for the death of the process; no handler of `Exception` catches it."""


class Killer:
    """An audit hook that raises Killed at the n-th and all later changes of the file system."""

    def __init__(self):
        self.left, self.folder = None, None
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        changes = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if self.left is None or event not in changes:
            return
        if self.folder in str(arguments[0]) or event in ("os.remove", "os.rmdir"):
            self.left -= 1
            if self.left < 0:
                raise Killed


@pytest.fixture(scope="module")
def killer():
    return Killer()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("step", [20, 30], ids=["again", "new"])
def test_killed_at_every_step(tmp_path, trained, killer, logged_warnings, step):
    """Kill the process at each file operation of a save that also deletes an old checkpoint.

    There is always a complete checkpoint, the newest complete one holds one of the two states,
    none is reported as damaged, and the next start removes what the killed one left.
    """
    base = tmp_path / "base"
    save(base, 10, *trained)
    save(base, 20, *trained)
    states = {20: [state_of(*trained)]}
    train_one_update(*trained)
    states.setdefault(step, []).append(state_of(*trained))
    kills = 0
    while True:
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(base, run)
        checkpoints = Checkpoints(run, SINGLE_PROCESS, keep=1)
        killer.folder, killer.left = str(run), kills
        checkpoints.save(step, *trained, {"progress": {"update_step": step}}, None)
        checkpoints.before_update()
        checkpoints._wait()
        completed, killer.left = killer.left >= 0, None
        found = find_checkpoint("auto", run, SINGLE_PROCESS)
        state, found_step = load(found)
        assert any(equal_states(state, expected) for expected in states[found_step])
        assert found_step == step_of(found)
        assert all(find_corruption(folder) is None for folder in checkpoints_of(run))
        Checkpoints(run, SINGLE_PROCESS)
        assert set(checkpoint_names(run)) <= {"model_10", "model_20", "model_30"}
        if completed:
            break
        kills += 1
    assert checkpoint_names(run) == [f"model_{step}"]
    assert equal_states(load(found)[0], states[step][-1])
    assert kills > 40 and not logged_warnings
