"""scripts/cluster/multinode.sh and slurm.sbatch.

Tested: the commands that they start, a run that dies on one node and continues, and what is
requeued.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from peft_pretraining.parallel import rendezvous
from scripts.cluster import relaunch
from tests.end_to_end.common import (
    FAULTY,
    ROOT,
    exact,
    read_lines,
    surroundings,
    traced,
    write_config,
    write_text,
)
from tests.support import fork_server

MULTINODE, SLURM = "scripts/cluster/multinode.sh", "scripts/cluster/slurm.sbatch"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # torchrun beside this python


def bash(*words, **environment):
    return subprocess.run(
        ["bash", *map(str, words)],
        cwd=ROOT,
        env=clean(environment),
        capture_output=True,
        text=True,
        timeout=60,
    )


def clean(changes):
    """Return the environment of a user who has set no variable that the launchers read."""
    ours = ("NODES", "RDZV_HOST", "GPUS_PER_NODE", "SHUTDOWN_SECONDS")
    kept = {k: v for k, v in surroundings().items() if k not in ours and not k.startswith("SLURM_")}
    return kept | {"PATH": PATH} | changes


def test_multinode_prints_its_command():
    done = bash(
        MULTINODE,
        "--nodes",
        4,
        "--gpus",
        8,
        "--dry_run",
        "--",
        "--name",
        "two words",
        RDZV_HOST="node1",
    )
    words = shlex.split(done.stdout)
    assert words[words.index("python") + 1 :][:2] == ["-m", "scripts.cluster.relaunch"]
    torchrun = words[words.index("scripts.cluster.relaunch") + 1 :]
    assert torchrun[:4] == [
        "--nnodes=4",
        "--nproc_per_node=8",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=node1:29400",
    ]
    assert torchrun[5:] == [
        "--max_restarts=3",
        "torchrun_main.py",
        "--name",
        "two words",
    ]
    assert any(word.startswith("PET_SIGNALS_TO_HANDLE=") and "SIGUSR1" in word for word in words)


@pytest.mark.parametrize(
    "script",
    [MULTINODE, SLURM, "scripts/quickstart.sh", "scripts/quickstart_vit.sh", "scripts/test.sh",
     "scripts/docs.sh", "scripts/run.sh", "scripts/tables/adam.sh"],
)  # fmt: skip
def test_help_explains_and_starts_nothing(script, tmp_path):
    """With a PATH that has no Python, no torchrun and no Slurm."""
    for name in ("bash", "sed", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = bash(script, "--help", PATH=str(tmp_path))
    assert done.returncode == 0 and done.stderr == ""
    assert len(done.stdout.splitlines()) > 3 and "set -euo" not in done.stdout


@pytest.mark.parametrize("words", [["--seed", "3"], ["a", "b"]])
@pytest.mark.parametrize("name", ["quickstart", "quickstart_vit"])
def test_a_quickstart_refuses_what_it_does_not_know(name, words):
    done = bash(f"scripts/{name}.sh", *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stdout == ""


def test_slurm_starts_either_script():
    done = bash(SLURM, "--dry_run", "--script", "main_vit.py", "--data_set", "digits")
    words = shlex.split(done.stdout)
    assert words[words.index("--script") + 1] == "main_vit.py"
    assert words[-3:] == ["--", "--data_set", "digits"] and "--cpus-per-task" not in done.stdout
    done = bash(SLURM, "--dry_run", "--name", "x", SLURM_CPUS_PER_TASK="64")
    assert "--cpus-per-task=64" in shlex.split(done.stdout)


@pytest.mark.parametrize(
    "words, names",
    [
        ([MULTINODE, "--rdzv_host", "a", "--", "x"], "--nodes"),
        ([MULTINODE, "--nodes", "two", "--rdzv_host", "a", "--", "x"], "--nodes"),
        ([MULTINODE, "--nodes", "2", "--", "x"], "--rdzv_host"),
        ([MULTINODE, "--nodes", "2", "--rdzv_host", "a"], "after --"),
        ([MULTINODE, "--nodes", "2", "--rdzv_host", "a", "--lr", "1", "--", "x"], "--lr"),
        ([MULTINODE, "--nodes", "--", "x"], "--nodes needs a value"),
        (
            [MULTINODE, "--nodes", "2", "--rdzv_host", "a", "--script", "missing.py", "--", "x"],
            "missing.py",
        ),
        ([SLURM], "torchrun_main.py"),
        ([SLURM, "--name", "x"], "sbatch"),
    ],
)
def test_missing_arguments_are_refused_in_a_sentence(words, names):
    done = bash(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and names in done.stderr
    )


def test_restarted_processes_ignore_what_an_earlier_start_left_behind():
    """A restarted rank does not take questions and answers of an earlier start for new ones."""
    store = dist.HashStore()

    def join(rank):
        return rendezvous.new_store_namespace(store, rank, 3, timedelta(seconds=20))

    with ThreadPoolExecutor() as threads:
        for life, order in enumerate([(0, 2, 1), (0, 2, 1), (1, 2, 0)]):
            first = threads.submit(join, order[0])
            time.sleep(0.05)  # rank 0 has answered the dead
            others = [threads.submit(join, rank) for rank in order[1:]]
            parts = [part.result() for part in (first, *others)]
            assert not any(part.check(["address"]) for part in parts)
            parts[0].set("address", str(life))
            assert [part.get("address") for part in parts] == [str(life).encode()] * 3


@pytest.mark.slow
def test_a_run_that_dies_on_one_of_two_nodes_continues(tmp_path):
    """Two torchruns with one process each: the second process is killed in update 7.

    Both continue from the checkpoint of update 5.
    """
    write_config(tmp_path)
    write_text(tmp_path, documents=150)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run_folder = tmp_path / "run"
    sizes = {
        "num_training_steps": 8,
        "warmup_steps": 1,
        "save_every": 5,
        "eval_every": 8,
        "batch_size": 2,
        "total_batch_size": 4,
    }
    faults = {
        "FAULT": "kill@7@1",
        "FAULT_ONCE": str(tmp_path / "once"),
        "ALPHADECAY_CACHE": str(tmp_path / "cache"),
    }
    words = [
        MULTINODE,
        "--nodes",
        "2",
        "--rdzv_host",
        "localhost",
        "--port",
        port,
        "--gpus",
        "1",
        "--max_restarts",
        "1",
    ]
    words += ["--script", FAULTY, "--", *exact(tmp_path, "run", **sizes)]
    environment = clean(traced(run_folder, **faults))
    nodes = [
        subprocess.Popen(
            ["bash", *map(str, words)],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        said = [node.communicate(timeout=240)[1] for node in nodes]
    finally:
        for node in nodes:
            for pid in (
                (*fork_server.descendants(node.pid), node.pid) if node.poll() is None else ()
            ):
                fork_server.kill(pid)
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (tmp_path / "once").exists() and any(
        f"continue from {run_folder}/checkpoints/model_5" in text for text in said
    )
    assert [
        r["update_step"] for r in read_lines(run_folder / "metrics.jsonl") if "loss" in r
    ] == list(range(1, 9))
    traces = [Path(f"{run_folder}.trace.rank{rank}").read_text().split() for rank in (0, 1)]
    assert [len(lines) for lines in traces] == [9, 9]  # 1 to 6, then 6 to 8


def updates_of(run_folder):
    """Return the number of the last update that a run has logged."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    return max((json.loads(line)["update_step"] for line in lines), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_is_waited_for(lost, tmp_path):
    """One of two launchers is killed with all its processes, and started again.

    Number 0 is the one whose torchrun holds the rendezvous. torchrun notices the loss of the other
    one after a minute.
    """
    write_config(tmp_path)
    write_text(tmp_path, documents=150)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run_folder = tmp_path / "run"
    settings = {"num_training_steps": 100_000, "save_every": 20, "eval_every": 100_000}
    settings |= {"batch_size": 2, "total_batch_size": 4}
    words = [MULTINODE, "--nodes", 2, "--rdzv_host", "localhost", "--port", port, "--gpus", 1, "--"]
    words += exact(tmp_path, "run", "--keep_checkpoints", 2, **settings)

    def launch():
        return subprocess.Popen(
            ["bash", *map(str, words)],
            cwd=ROOT,
            env=clean({"ALPHADECAY_CACHE": str(tmp_path / "cache")}),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def end(node):
        for pid in (*fork_server.descendants(node.pid), node.pid):
            fork_server.kill(pid)
        node.wait(timeout=10)

    def wait_for_update(update, seconds):
        deadline = time.monotonic() + seconds
        while updates_of(run_folder) < update:
            assert time.monotonic() < deadline, f"no update {update} within {seconds} s"
            time.sleep(0.2)

    nodes = [launch()]
    time.sleep(3)  # so that this one holds the rendezvous
    nodes.append(launch())
    try:
        wait_for_update(30, 90)
        end(nodes[lost])
        before = updates_of(run_folder)
        nodes[lost] = launch()
        wait_for_update(before + 30, 240)
    finally:
        for node in nodes:
            end(node)


class NodeLost(Exception):
    pass


FAILED = {0: ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file="none")}


@pytest.mark.parametrize(
    "error, made, starts_again",
    [
        (NodeLost("wait timeout"), 0, True),
        (NodeLost("wait timeout"), 2, True),
        (NodeLost("wait timeout"), 3, False),
        (ChildFailedError("torchrun_main.py", FAILED), 0, False),
        (SignalException("stop", signal.SIGTERM), 0, False),
        (None, 0, False),
    ],
)
def test_torchrun_is_started_again_only_after_the_loss_of_a_node(
    error, made, starts_again, monkeypatch, capsys
):
    monkeypatch.setenv(relaunch.RESTARTS, str(made))
    again = []

    def start(arguments):
        if error:
            raise error

    words = ["--nnodes=2", "--rdzv_endpoint=node1:29400", "--max_restarts=3", "torchrun_main.py"]
    with pytest.raises(type(error)) if error and not starts_again else contextlib.nullcontext():
        relaunch.run(words, start, lambda: again.append(os.environ[relaunch.RESTARTS]))
    assert again == ([str(made + 1)] if starts_again else [])
    assert capsys.readouterr().err.count(
        f"a node was lost (NodeLost): starting torchrun again ({made + 1} of 3), which waits at "
        "node1:29400 until all 2 nodes are there"
    ) == (1 if starts_again else 0)


# -------------------------------------------------------------------------------------------- Slurm


@pytest.fixture
def slurm(tmp_path):
    """Replace Slurm's commands by scripts that write down their arguments.

    srun runs the shell command in $STEP. Returns a function that starts a job.
    """
    for name, does in {
        "srun": 'eval "$STEP"',
        "scancel": 'kill -TERM "$(cat "$NOTES/step")"',
        "scontrol": '[ "$1" != show ] || printf "node7\\nnode8\\n"',
    }.items():
        stub = tmp_path / name
        stub.write_text(f'#!/usr/bin/env bash\necho {name} "$@" >> "$NOTES/calls"\n{does}\n')
        stub.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4321",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_GPUS_ON_NODE": "8",
    }

    def start(step):
        environment = clean(
            job
            | {
                "PATH": f"{tmp_path}:{PATH}",
                "NOTES": str(tmp_path),
                "STEP": step,
                "SLURM_SUBMIT_DIR": str(ROOT),
            }
        )
        spooled = tmp_path / "slurm_script"  # as slurmd does
        spooled.write_text((ROOT / SLURM).read_text())
        return subprocess.Popen(
            ["bash", str(spooled), "--name", "x"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


# A run that saves when it is told to stop; torchrun then ends with an error.
SAVES = (
    'trap "echo saved >> $NOTES/calls; exit 1" TERM; echo $$ > $NOTES/step; while :; do sleep '
    "0.02; done"
)


def calls(folder):
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 2])
def test_a_run_that_ends_by_itself_is_not_requeued(slurm, tmp_path, code):
    job = slurm(f"exit {code}")
    assert job.wait(timeout=60) == code
    assert [call.split()[:2] for call in calls(tmp_path)] == [
        ["scontrol", "show"],
        ["srun", "--ntasks=2"],
    ]
    launched = calls(tmp_path)[1]
    assert (
        "scripts/cluster/multinode.sh --nodes 2 --rdzv_host node7 --script torchrun_main.py "
        "--port 24321 --gpus 8 --id 4321.0 -- --name x" in launched
    )


def test_a_preempted_run_saves_and_is_requeued(slurm, tmp_path):
    job = slurm(SAVES)
    wait_for(tmp_path / "step")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    assert calls(tmp_path)[2:] == ["scancel --signal=TERM 4321", "saved", "scontrol requeue 4321"]


def test_a_cancelled_run_saves_and_is_not_requeued(slurm, tmp_path):
    """scancel sends SIGTERM to the steps, and on some clusters to the job's shell."""
    job = slurm(SAVES)
    wait_for(tmp_path / "step")
    job.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    assert job.poll() is None  # it waits for the checkpoint
    os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)
    assert job.wait(timeout=60) == 1
    assert calls(tmp_path)[2:] == ["saved"]


def test_old_paths_still_work():
    for old, new in (
        ("multinode.sh", "cluster/multinode.sh"),
        ("slurm.sbatch", "cluster/slurm.sbatch"),
    ):
        words = ["--dry_run", "--name", "x"]
        if old == "multinode.sh":
            words = ["--nodes", "2", "--rdzv_host", "a", "--dry_run", "--", "--name", "x"]
        outputs = {
            subprocess.run(
                ["bash", f"scripts/{path}", *words], cwd=ROOT, capture_output=True, check=True
            ).stdout
            for path in (old, new)
        }
        assert len(outputs) == 1 and outputs != {b""}


def test_slurm_asks_for_the_signal_that_it_waits_for():
    """Slurm reads the options of the comments at the top, up to the first command."""
    text = (ROOT / SLURM).read_text()
    options = [
        line.split()[1]
        for line in text.split("\nset -")[0].splitlines()
        if line.startswith("#SBATCH")
    ]
    assert {"--requeue", "--ntasks-per-node=1", "--signal=B:USR1@300"} <= set(
        options
    ) and "' USR1\n" in text


def wait_for(path):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
