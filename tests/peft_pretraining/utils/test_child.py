"""Child processes end with their parent, whenever it ends."""

import os
import pickle
import subprocess
import sys
import time

import pytest

from peft_pretraining.utils.child import EndWithParent
from tests.support import fork_server

PARENT = """
import multiprocessing, os, signal, sys, threading, time
from peft_pretraining.utils.child import EndWithParent

def work(tie, pids):
    tie()
    with open(pids, "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)

def start():
    context = multiprocessing.get_context(sys.argv[1])
    context.Process(target=work, args=(EndWithParent(), sys.argv[2])).start()

if __name__ == "__main__":
    if sys.argv[3] == "thread":
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    else:
        start()
    time.sleep(600)
"""


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("thread", ["main", "thread"])
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_ends_with_its_parent(method, thread, tmp_path):
    """A child that a thread has started outlives the thread, but not the parent."""
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py"), method, str(tmp_path / "pids"), thread]
    )
    try:
        assert wait_until(lambda: (tmp_path / "pids").exists())
        time.sleep(0.3)
        child = int((tmp_path / "pids").read_text())
        assert fork_server.is_running(child)
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not fork_server.is_running(child))


def test_a_child_whose_parent_has_ended_already_ends_at_once():
    """It is spawned, and its parent is killed while it imports."""
    tie = EndWithParent()
    tie.parent = 10**9  # a process that has ended
    code = "import pickle, sys, time; pickle.loads(sys.stdin.buffer.read()); time.sleep(600)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(tie), timeout=30, capture_output=True
    )
    assert done.returncode == 1


def test_nothing_happens_in_the_parent():
    children = fork_server.descendants(os.getpid())
    EndWithParent()()
    pickle.loads(pickle.dumps(EndWithParent()))
    assert fork_server.descendants(os.getpid()) == children


RANK = """
import os, sys
from peft_pretraining.parallel.process_group import process_group

open(sys.argv[1], "w").write(str(os.getpid()))
with process_group(device_type="cpu"):
    pass
"""


def test_a_rank_that_waits_for_others_ends_with_torchrun(tmp_path):
    """Nobody would start the others any more; it used to wait until --timeout_minutes."""
    (tmp_path / "rank.py").write_text(RANK)
    pid = tmp_path / "pid"
    start = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
    launch = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    launcher = subprocess.Popen(
        [sys.executable, "-c", start, str(tmp_path / "rank.py"), str(pid)],
        env=os.environ | launch | address,
    )
    assert wait_until(lambda: pid.exists() and pid.read_text())
    time.sleep(0.5)  # it begins to connect
    fork_server.kill(launcher.pid)
    launcher.wait()
    assert wait_until(lambda: not fork_server.is_running(int(pid.read_text())))
