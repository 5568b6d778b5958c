"""Which checkpoints are deleted after a save, and which stay."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from peft_pretraining.checkpoint.find import newest_checkpoint
from peft_pretraining.checkpoint.save import Checkpoints
from tests.peft_pretraining.checkpoint.common import SINGLE_PROCESS, checkpoint_names, save


def test_the_newest_and_the_milestones_are_kept(tmp_path, trained):
    checkpoints = Checkpoints(tmp_path, SINGLE_PROCESS, keep=2, milestone_every=3)
    for step in range(1, 9):
        checkpoints.save(step, *trained, {}, None)
    checkpoints.finish()
    assert checkpoint_names(tmp_path) == ["model_3", "model_6", "model_7", "model_8"]


def test_a_damaged_checkpoint_is_kept_but_not_counted(run, trained):
    folder, _ = run
    (folder / "checkpoints/model_20/config.json").write_text("")
    save(folder, 30, *trained, keep=2)
    assert checkpoint_names(folder) == ["model_10", "model_20", "model_30"]


@pytest.mark.parametrize("failing_call", ["rename", "rmtree"])
def test_a_failed_deletion_is_a_warning(run, trained, logged_warnings, monkeypatch, failing_call):
    folder, _ = run
    checkpoints = Checkpoints(folder, SINGLE_PROCESS, keep=1)
    owner = {"rename": Path, "rmtree": shutil}[failing_call]
    original = getattr(owner, failing_call)

    def refuse(path, *arguments, **options):
        if any(str(name).endswith(".deleted") for name in (path, *arguments)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, failing_call, refuse)
        checkpoints.save(30, *trained, {}, None)
        checkpoints.finish()
    assert logged_warnings and all(
        "could not be deleted (Permission denied" in warning for warning in logged_warnings
    )
    assert newest_checkpoint(folder).name == "model_30"
    checkpoints.save(40, *trained, {}, None)
    checkpoints.finish()
    assert checkpoint_names(folder) == ["model_40"]
