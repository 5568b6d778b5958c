"""Runs that are killed, stopped or meet faults end with the result of the undisturbed run."""

import random
import signal
import time

import pytest

from tests.end_to_end.common import (
    FAULTY,
    FINAL,
    ROOT,
    command,
    comparable,
    exact,
    read_lines,
    run,
    surroundings,
    trace,
    traced,
    write_config,
)
from tests.support import fork_server

pytestmark = pytest.mark.slow


def faulty(inputs, name, fault, *flags, once=False, environment=None, **changes):
    """The undisturbed run's settings, and a fault."""
    more = (
        {"FAULT": fault}
        | ({"FAULT_ONCE": str(inputs / f"{name}.once")} if once else {})
        | (environment or {})
    )
    options, cold = changes.pop("options", ()), changes.pop("cold", False)
    arguments = exact(inputs, name, *flags, **changes)
    return run(
        arguments,
        script=FAULTY,
        check=False,
        environment=traced(inputs / name, **more),
        options=options,
        cold=cold,
    )


def resumed(inputs, name):
    run(
        exact(inputs, name, "--continue_from", "auto"),
        script=FAULTY,
        environment=traced(inputs / name),
    )
    return comparable(inputs / name)


def test_killed_and_resumed_is_bit_exact(inputs, straight_run):
    """One rank is killed after the checkpoint of update 20, and the run continues to update 40."""
    name = "killed"
    assert faulty(inputs, name, "kill@27@1", "--continue_from", "auto").returncode != 0
    assert not (inputs / name / FINAL).exists()
    with (inputs / name / "metrics.jsonl").open("a") as file:
        file.write('{"update_step": 39, "loss": 1')  # a line torn by the kill
    assert resumed(inputs, name) == comparable(straight_run)
    again = run(exact(inputs, name, "--continue_from", "auto"))
    assert "has made all 40 updates" in again.stderr  # and ends well: there is nothing to do


@pytest.mark.parametrize("processes, parallel", [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_dropout_is_resumed_exactly_and_differs_between_ranks(
    inputs, tmp_path, processes, parallel
):
    write_config(tmp_path, attention_dropout=0.3, num_attention_heads=4)
    words = ["--use_hf_model", "--parallel", parallel, "--continue_from", "auto"]
    changes = {"num_training_steps": 8, "save_every": 4, "eval_every": 100}

    def traced_run(name, **environment):
        done = run(
            [*exact(tmp_path, name, *words, **changes), "--dataset", inputs / "corpus.jsonl"],
            FAULTY,
            processes,
            check=False,
            environment=traced(tmp_path / name, TRACE_RANDOM="1", **environment),
        )
        return done, [trace(tmp_path / name, rank) for rank in range(processes)]

    done, straight = traced_run("straight")
    assert done.returncode == 0, done.stderr[-3000:]
    assert traced_run("killed", FAULT="kill@6@0")[0].returncode != 0
    done, resumed_trace = traced_run("killed")
    assert done.returncode == 0 and resumed_trace == straight
    states = [line["random"] for rank in straight for line in rank.values()]
    assert len(set(states)) == len(states)  # by rank and update


def test_killed_at_random_instants(inputs, straight_run):
    """The run is killed five times; benchmarks/bench_faults.py does this a thousand times."""
    rng = random.Random(0)
    arguments = exact(inputs, "random", "--continue_from", "auto", save_every=4)
    kills = 0
    for _ in range(40):
        running = fork_server.start(
            command(arguments, FAULTY), cwd=ROOT, env=surroundings(traced(inputs / "random"))
        )
        if kills < 5:
            wait_for_update(inputs / "random", running, kills * 7 + 2)
            time.sleep(rng.random() * 0.3)
            kills += running.poll() is None
            for pid in (*fork_server.descendants(running.pid), running.pid):
                fork_server.kill(pid)
        if running.wait(timeout=120) == 0:
            break
    wanted, found = comparable(straight_run), comparable(inputs / "random")
    assert kills == 5 and found == wanted


def wait_for_update(folder, running, update):
    """Until the run has logged that update, or ended."""
    deadline = time.monotonic() + 120
    while running.poll() is None and time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and f'"update_step": {update},' in (
            folder / "metrics.jsonl"
        ).read_text():
            return
        time.sleep(0.02)


def test_torchrun_restarts_resume_by_themselves(inputs, straight_run):
    done = faulty(
        inputs, "restarted", "kill@27@1", once=True, options=["--max-restarts=1"], cold=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continue from" in done.stderr
    assert comparable(inputs / "restarted") == comparable(straight_run)


@pytest.mark.parametrize("fault, code", [("SIGUSR1@26@1", 0), ("SIGTERM>agent@9@0", None)])
def test_a_signal_saves_after_the_current_update(inputs, straight_run, fault, code):
    name = fault.replace("@", "-").replace(">", "-")
    update = int(fault.split("@")[1])
    done = faulty(inputs, name, fault, cold=True)
    assert done.returncode == code or code is None
    assert f"stopped after update {update}; the same command goes on" in done.stderr
    assert (inputs / name / f"checkpoints/model_{update}/manifest.json").is_file()
    assert (
        sorted(trace(inputs / name, 0))
        == sorted(trace(inputs / name, 1))
        == list(range(1, update + 1))
    )
    assert resumed(inputs, name)["trace"] == comparable(straight_run)["trace"]


def test_a_second_signal_ends_at_once(inputs):
    arguments = exact(
        inputs, "impatient", num_training_steps=100_000, save_every=100_000, eval_every=100_000
    )
    begun = inputs / "impatient.once"
    environment = surroundings(
        traced(inputs / "impatient", FAULT="slow@3@0", FAULT_ONCE=str(begun))
    )
    running = fork_server.start(command(arguments, FAULTY, processes=1), cwd=ROOT, env=environment)
    while running.poll() is None and not begun.exists():
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert running.poll() is None  # in an update that takes a minute
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=10) == 128 + signal.SIGTERM


def test_what_is_not_finite_on_one_rank_is_applied_on_none(inputs):
    done = faulty(inputs, "nan", "nan@5@1")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        after = trace(inputs / "nan", rank)
        assert (
            after[5]["weights"] == after[4]["weights"]
            and after[5]["optimizer"] == after[4]["optimizer"]
        )
        assert after[6]["weights"] != after[5]["weights"]
    assert trace(inputs / "nan", 0) == trace(inputs / "nan", 1)
    assert (
        "update 5: the loss or a gradient is not finite on rank 1; no rank applies the update"
        in done.stderr
    )
    assert [
        r["update_step"]
        for r in read_lines(inputs / "nan/metrics.jsonl")
        if r.get("skipped_updates")
    ] == [5]


def test_too_many_updates_that_are_not_finite(inputs):
    done = faulty(inputs, "nans", "nan+@5@0", "--max_skipped_updates", 3)
    assert done.returncode != 0
    assert (
        "error: the loss or a gradient was not finite in 3 updates in a row, up to update 7: "
        "lower --lr" in done.stderr
    )
    after = trace(inputs / "nans")
    assert max(after) == 7 and after[7]["weights"] == after[4]["weights"]
    assert sorted(p.name for p in (inputs / "nans/checkpoints").iterdir()) == ["model_7"]
    run(
        exact(inputs, "nans", "--continue_from", "auto"),
        script=FAULTY,
        environment=traced(inputs / "nans"),
    )
    assert len(trace(inputs / "nans")) == 40


def test_data_that_fail_on_one_rank_stop_all_with_a_checkpoint(inputs, straight_run):
    done = faulty(inputs, "unreadable", "data@24@1")
    assert done.returncode != 0
    assert "error: corpus.jsonl cannot be read (rank 1)" in done.stderr
    assert (
        sorted(trace(inputs / "unreadable", 0))
        == sorted(trace(inputs / "unreadable", 1))
        == list(range(1, 24))
    )
    assert resumed(inputs, "unreadable")["trace"] == comparable(straight_run)["trace"]


def test_data_that_end_stop_all_ranks_at_the_same_update(inputs):
    done = run(
        exact(inputs, "short", "--max_passes", 1, num_training_steps=400),
        script=FAULTY,
        check=False,
        environment=traced(inputs / "short"),
    )
    assert done.returncode != 0 and "--max_passes" in done.stderr
    updates = [max(trace(inputs / "short", rank)) for rank in (0, 1)]
    assert updates[0] == updates[1] and 30 < updates[0] < 40
    assert (inputs / f"short/checkpoints/model_{updates[0]}").is_dir()
