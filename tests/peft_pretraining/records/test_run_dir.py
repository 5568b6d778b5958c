"""The run folder: only one process trains in it, and records after a checkpoint are dropped."""

import errno
import json
import os
import signal
import subprocess
import sys

import filelock
import pytest

from peft_pretraining.errors import UserError
from peft_pretraining.records.jsonl import append_json
from peft_pretraining.records.run_dir import check_no_existing_run, copy_records_up_to, run_lock

HOLD_LOCK = """
import sys, time
from pathlib import Path
from peft_pretraining.records.run_dir import run_lock
with run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    (tmp_path / "a").mkdir()
    append_json(tmp_path / "a/metrics.jsonl", [{"update_step": i} for i in range(6)])
    append_json(tmp_path / "a/modules.jsonl", [{"step": i} for i in (0, 3, 6)])
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"update_step": 2')  # an incomplete line
    copy_records_up_to(tmp_path / "a", tmp_path / "b", 3)

    def steps(name, key):
        lines = (tmp_path / "b" / name).read_text().splitlines()
        return [json.loads(line)[key] for line in lines]

    assert steps("metrics.jsonl", "update_step") == [0, 1, 2, 3]
    assert steps("modules.jsonl", "step") == [0, 3]
    copy_records_up_to(tmp_path / "b", tmp_path / "b", -1)
    assert (tmp_path / "b/metrics.jsonl").read_text() == ""


def test_a_run_that_starts_refuses_the_records_of_another(tmp_path):
    check_no_existing_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    check_no_existing_run(tmp_path)
    append_json(tmp_path / "metrics.jsonl", [{"update_step": 1}])
    with pytest.raises(UserError, match="already holds a run"):
        check_no_existing_run(tmp_path)


def test_only_one_process_trains_in_a_folder(tmp_path):
    """The other one is refused, with the number of the first; a killed process leaves no lock."""
    folder = tmp_path / "runs/a"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, folder], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        message = rf"another process trains in .*runs/a: end it \(its number is {holder.pid}\), or"
        for _ in range(2):  # the first one that is refused leaves the number in place
            with pytest.raises(UserError, match=message), run_lock(folder, timeout=0.1):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with run_lock(folder, timeout=0.1):
        assert int((folder / ".lock").read_text()) == os.getpid()
        with pytest.raises(UserError, match="another process"), run_lock(folder, timeout=0.1):
            pass
    with run_lock(folder, timeout=0.1):  # released at the end of the block
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file/run"):
        with pytest.raises(UserError, match="cannot be written .*give another --save_dir"):
            with run_lock(folder):
                pass
    (tmp_path / "run/.lock").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"), run_lock(tmp_path / "run", 0.1):
        pass


@pytest.mark.parametrize(
    "error", [OSError(errno.EOPNOTSUPP, "no locks here"), NotImplementedError("no locks here")]
)
def test_a_file_system_without_locks(tmp_path, monkeypatch, error):
    """The run goes on without a lock."""

    def acquire(*arguments, **options):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    entered = False
    with run_lock(tmp_path / "run"):
        entered = True
    assert entered
