"""A user error ends a script with one line and exit code 2."""

import os
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from peft_pretraining.cli import main as module
from peft_pretraining.cli.main import parse_or_exit, run_script
from peft_pretraining.errors import UserError


def fail():
    raise UserError("no such file")


def test_a_user_error_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert run_script(fail) == 2
    assert capsys.readouterr().err == "error: no such file\n"
    with pytest.raises(SystemExit) as end:
        parse_or_exit(fail)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: no such file\n"


def test_other_ranks_wait_and_tell_their_rank(capsys, monkeypatch):
    """torchrun ends them as soon as rank 0 has failed, so the line is not printed twice."""
    waited = []
    monkeypatch.setattr(module.time, "sleep", waited.append)
    for rank, line in (("0", "error: no such file\n"), ("3", "error on rank 3: no such file\n")):
        monkeypatch.setenv("RANK", rank)
        assert run_script(fail) == 2
        assert capsys.readouterr().err == line
    assert waited == [module.SECONDS_FOR_RANK_0]


def test_success(capsys):
    received = []
    assert run_script(lambda *arguments: received.append(arguments), 1, "a") == 0
    assert received == [(1, "a")]
    assert parse_or_exit(lambda: "parsed") == "parsed"
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback(capsys):
    assert run_script(lambda: 1 / 0) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("error", "code"), [("UserError('no space')", 2), ("KeyboardInterrupt", 130), ("ValueError", 1)]
)
def test_a_log_on_a_full_disk_does_not_change_the_end(error, code):
    """An error of printing would leave the script before `end`, and its ranks might then hang."""
    program = (
        "import atexit, sys\n"
        "from peft_pretraining.cli.main import end, run_script\n"
        "from peft_pretraining.errors import UserError\n"
        "def main():\n    raise " + error + "\n"
        "atexit.register(print, 'ended')\n"
        "end(run_script(main))"
    )
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"TORCHELASTIC_RUN_ID": "none"},
            stdout=subprocess.PIPE,
            stderr=full,
            timeout=60,
        )
    assert (done.returncode, done.stdout) == (code, b"ended\n")


def test_the_end_waits_for_threads_and_runs_what_was_registered(tmp_path):
    code = (
        "import atexit, sys, threading, time\n"
        "from peft_pretraining.cli.main import end\n"
        "def work():\n    time.sleep(0.5)\n    print('saved')\n"
        "threading.Thread(target=work).start()\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "atexit.register(print, 'registered')\n"
        "print('first', end=' ')\n"
        "end(7)"
    )
    for environment in ({}, {"TORCHELASTIC_RUN_ID": "none"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout.split()) == (7, ["first", "saved", "registered"])


def test_torchrun_gets_the_sentence(tmp_path, monkeypatch, capsys):
    """It reads the file in the format of torch's own error handler."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    monkeypatch.delenv("RANK", raising=False)
    assert run_script(fail) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    assert failure.message["message"].endswith("\n\nerror: no such file\n")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing/error.json"))
    assert run_script(fail) == 2  # a file that cannot be written is no second error
    assert capsys.readouterr().err == 2 * "error: no such file\n"
