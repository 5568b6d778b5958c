"""Every end of a run but a kill leaves a checkpoint of the last whole update, and no process."""

import os
import signal
import time

import pytest

from tests.end_to_end.common import (
    FAULTY,
    ROOT,
    command,
    comparable,
    exact,
    read_lines,
    run,
    surroundings,
    trace,
    traced,
)
from tests.support import fork_server

pytestmark = pytest.mark.slow


def ended(inputs, name, fault, *more, processes=2, environment=None, cold=False, **changes):
    """Start the undisturbed run with a fault, and return the finished process."""
    settings = {"save_every": 100, "unbalancedWD_every": 7} | changes
    return run(
        exact(inputs, name, *more, **settings),
        FAULTY,
        processes,
        check=False,
        environment=traced(inputs / name, FAULT=fault, **(environment or {})),
        cold=cold,
    )


def saved(inputs, name):
    """Return the names of the checkpoints of a run."""
    return sorted(path.name for path in (inputs / name / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "name, code",
    [("SIGINT", 130), ("SIGHUP", 0), ("SIGTERM", 0), ("SIGUSR1", 0), ("SIGUSR2", 0),
     ("SIGXCPU", 0)],
)  # fmt: skip
def test_a_signal_to_the_process_saves_the_last_whole_update(inputs, name, code):
    done = ended(inputs, f"alone-{name}", f"{name}@5@0", processes=1)
    assert done.returncode == code
    assert f"{name}: stopped after update 5; the same command goes on" in done.stderr
    assert "Traceback" not in done.stderr
    assert saved(inputs, f"alone-{name}") == ["model_5"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGUSR2", "SIGXCPU", "SIGKILL"])
def test_a_signal_to_torchrun_saves_the_last_whole_update(inputs, name):
    """torchrun hands on the first two. The others end it, which its ranks notice."""
    run_name = f"agent-{name}"
    ended(inputs, run_name, f"{name}>agent@5@0", cold=True)
    deadline = time.monotonic() + 30
    while living(f"{inputs / run_name}.trace") and time.monotonic() < deadline:
        time.sleep(0.1)  # the ranks go on without torchrun
    (checkpoint,) = saved(inputs, run_name)
    update = int(checkpoint.removeprefix("model_"))
    assert 5 <= update <= 6  # the ranks may notice it one update later
    assert sorted(trace(inputs / run_name)) == list(range(1, update + 1))
    # Nobody holds the folder any more.
    done = run(exact(inputs, run_name, save_every=100), FAULTY, environment=traced(inputs / "x"))
    assert f"continue from {inputs / run_name}/checkpoints/{checkpoint}" in done.stderr


def test_nohup_is_respected(inputs):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = ended(inputs, "nohup", "SIGHUP@5@0", processes=1, cold=True, num_training_steps=9)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.returncode == 0 and "stopped" not in done.stderr
    assert saved(inputs, "nohup") == ["model_9"]


@pytest.mark.parametrize("processes, who", [(1, "0"), (2, "all")])
def test_an_unexpected_exception_leaves_a_checkpoint(inputs, processes, who):
    name = f"raise-{who}"
    done = ended(inputs, name, f"raise@6@{who}", processes=processes)
    assert done.returncode == 1 and "LookupError: an exception that nobody" in done.stderr
    assert saved(inputs, name) == ["model_5"]


@pytest.mark.parametrize("update", [20, 40])
def test_an_evaluation_that_failed_is_repeated(inputs, straight_run, update):
    """Also after the last update. Before, the continued run had no record of it."""
    name = f"evaluate-{update}"
    done = ended(inputs, name, f"evaluate@{update}@all", save_every=20)
    assert done.returncode == 1 and saved(inputs, name)[-1] == f"model_{update}"
    arguments = exact(inputs, name)
    run(arguments, FAULTY, environment=traced(inputs / name))
    assert comparable(inputs / name) == comparable(straight_run)
    assert "nothing to do" in run(arguments, FAULTY, environment=traced(inputs / name)).stderr


def test_the_death_of_wandb_does_not_end_the_run(inputs):
    done = ended(
        inputs,
        "wandb-dies",
        "SIGKILL>wandb@4@0",
        processes=1,
        environment={"WANDB_MODE": "offline"},
        num_training_steps=12,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("W&B failed") == 1
    lines = read_lines(inputs / "wandb-dies/metrics.jsonl")
    assert [line["update_step"] for line in lines if "loss" in line] == list(range(1, 13))


@pytest.mark.parametrize("processes", [1, 2])
def test_the_death_of_a_reader_is_one_sentence_and_a_checkpoint(inputs, processes):
    name = f"reader-dies-{processes}"
    done = ended(
        inputs, name, "SIGKILL>reader@6@0", "--stream", "--workers", 2, processes=processes,
        num_training_steps=200,
    )  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert done.stderr.count("A process that reads the training stream was killed") >= 1
    (checkpoint,) = saved(inputs, name)
    assert int(checkpoint.removeprefix("model_")) >= 6
    last = [max(trace(inputs / name, rank)) for rank in range(processes)]
    assert set(last) == {int(checkpoint.removeprefix("model_"))}


def test_a_rank_that_hangs_ends_the_run_with_stacks(inputs):
    """It is stopped, as by a file system that does not answer."""
    impatient = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}  # until torchrun kills the stopped rank
    words = ("--timeout_minutes", 0.05)
    done = ended(
        inputs, "hangs", "SIGSTOP@6@1", *words, save_every=4, environment=impatient, cold=True
    )
    assert done.returncode != 0
    assert "another process did not answer within --timeout_minutes" in done.stderr
    assert "most recent call first" in done.stderr and "in forward_backward" in done.stderr
    assert saved(inputs, "hangs") == ["model_4"]
    again = ended(inputs, "hangs", "none@0@0", save_every=4, num_training_steps=40)
    assert again.returncode == 0 and "continue from" in again.stderr


def test_checkpoints_by_time_are_replaced(inputs, straight_run):
    """They do not change the run, and only the newest one stays, beside those of --save_every."""
    run(
        exact(inputs, "minutes", "--save_every_minutes", 1e-6),
        FAULTY,
        environment=traced(inputs / "minutes"),
    )
    assert saved(inputs, "minutes") == ["model_20", "model_40"]
    assert trace(inputs / "minutes") == trace(straight_run)
    done = ended(inputs, "minutes-killed", "kill@7@0", "--save_every_minutes", 1e-6)
    assert done.returncode != 0
    assert len(saved(inputs, "minutes-killed")) <= 2  # the kill may come before the deletion
    again = run(
        exact(inputs, "minutes-killed"), FAULTY, environment=traced(inputs / "minutes-killed")
    )
    assert "continue from" in again.stderr
    assert trace(inputs / "minutes-killed") == trace(straight_run)
    assert saved(inputs, "minutes-killed") == ["model_20", "model_40"]


def test_a_renamed_checkpoint_is_refused(inputs):
    settings = {"processes": 1, "num_training_steps": 12, "save_every": 4}
    ended(inputs, "renamed", "SIGTERM@4@0", **settings)
    folder = inputs / "renamed/checkpoints"
    (folder / "model_4").rename(folder / "model_9")
    done = ended(inputs, "renamed", "none@0@0", **settings)
    assert done.returncode == 2
    assert "model_9 was saved after update 4, but its name says 9: rename it" in done.stderr


def test_what_a_kill_left_is_tidied_at_every_start(inputs):
    words = ("--keep_checkpoints", 1)
    ended(inputs, "tidy", "none@0@0", *words, processes=1, num_training_steps=4)
    folder = inputs / "tidy/checkpoints"
    for name in ("model_2.deleted", "model_3.tmp"):
        (folder / name).mkdir()
    done = ended(inputs, "tidy", "none@0@0", *words, processes=1, num_training_steps=4)
    assert "nothing to do" in done.stderr and saved(inputs, "tidy") == ["model_4"]


def living(words):
    """Return the processes whose command line or environment contains a text."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/environ", "rb") as file:
                    if words.encode() in file.read():
                        found.append(int(entry))
            except OSError:
                continue
    return found


def test_no_process_outlives_a_killed_trainer(inputs):
    """Killed while its workers start: they need seconds to import torch."""
    arguments = exact(inputs, "orphans", "--stream", "--workers", 2, num_training_steps=10_000)
    for i in range(4):
        mark = f"{inputs}/orphans-{i}"
        environment = surroundings({"MARK": mark})
        running = fork_server.start(
            command(arguments, processes=1), cold=True, cwd=ROOT, env=environment
        )
        deadline = time.monotonic() + 90
        while len(living(mark)) < 2 and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3 * i)
        assert running.poll() is None
        fork_server.kill(running.pid)
        running.wait(timeout=10)
        deadline = time.monotonic() + 20
        while living(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert living(mark) == []
