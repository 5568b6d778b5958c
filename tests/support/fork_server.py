"""Run Python programs as forks of a process that has imported torch and transformers already.

torchrun and two ranks spend ten seconds of a core on imports before the first update, and the tests
start them some eighty times. Here a server imports once and each program is a fork of it;
torchrun's workers are forks of torchrun, which is otherwise the real one: agent, store, signals,
restarts. What a new interpreter has and a fork has not is made good in `_become`. `cold=True`
starts a real interpreter: for tests of how processes begin and end, and for the undisturbed runs
that others are compared with, so that both kinds agree bit for bit.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What the scripts import first, and what they import later on.
IMPORTED = (
    "torch.distributed.run",
    "torch._dynamo",
    "torchrun_main",
    "main_vit",
    "peft_pretraining.report.html",
    "tokenizers.processors",
    "transformers.tokenization_utils_tokenizers",  # of version 5
    "transformers.tokenization_utils_fast",  # of version 4
    "transformers.models.llama.modeling_llama",
    "torchvision.datasets",
    "timm.data",
    "wandb",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
)
LARGEST = 1 << 17  # bytes of a request; the kernel takes a little more at once


# ------------------------------------------------------------------------------------- in the tests


def on_ranks(script, *arguments, processes=2, options=(), **settings):
    """Run a script under torchrun, one thread a rank; an exit code other than 0 is an error."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *options,
    ]
    return run(
        [*torchrun, script, *arguments],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **settings,
    )


def start(words, cold=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **settings):
    """Start a program in a session of its own, like `subprocess.Popen`; outputs go to files."""
    words = list(map(str, words))
    if cold or words[0] != sys.executable or _gpu():
        return subprocess.Popen(
            words, stdout=stdout, stderr=stderr, start_new_session=True, **settings
        )
    return Program(words, stdout, stderr, **settings)


def run(words, cold=False, check=False, timeout=240, **settings):
    """Run a program like `subprocess.run`; after the time-out it is killed with its children."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        running = start(words, cold, stdout, stderr, **settings)
        try:
            code = running.wait(timeout)
        except BaseException:
            for pid in (*descendants(running.pid), running.pid):
                kill(pid)
            raise
        stdout.seek(0)
        stderr.seek(0)
        done = subprocess.CompletedProcess(words, code, stdout.read(), stderr.read())
    if check and code:
        raise AssertionError(f"exit code {code}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def descendants(pid):
    """The processes below one: torchrun's workers are not in its process group."""
    try:
        children = [
            int(child)
            for path in Path(f"/proc/{pid}/task").glob("*/children")
            for child in path.read_text().split()
        ]
    except OSError:  # it has just ended
        return []
    return children + [below for child in children for below in descendants(child)]


def is_running(pid):
    """Whether a process has not ended; one that process 1 has not collected yet has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def kill(pid):
    """SIGKILL, to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Program:
    """A program that the server runs, with as much of Popen's interface as the tests use."""

    def __init__(self, words, stdout, stderr, cwd=None, env=None):
        request = {
            "words": words[1:],
            "folder": str(cwd or os.getcwd()),
            "environment": dict(env or os.environ),
        }
        message = json.dumps(request).encode()
        assert len(message) < LARGEST
        self._status, theirs = os.pipe()
        with open(os.devnull, "w") as nowhere:
            files = [
                (nowhere if file == subprocess.DEVNULL else file).fileno()
                for file in (stdout, stderr)
            ]
            socket.send_fds(_server(), [message], [*files, theirs])
        os.close(theirs)
        line = b""
        while not line.endswith(b"\n"):  # byte by byte: the next line is the exit code
            byte = os.read(self._status, 1)
            assert byte, "the server of warm programs has died"
            line += byte
        self.pid, self.returncode = int(line), None

    def poll(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self.returncode = int(os.read(self._status, 100))
            os.close(self._status)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)


@functools.cache
def _gpu():
    import torch

    return torch.cuda.is_available()  # CUDA does not survive a fork


@functools.cache
def _server():
    """The socket to the server, which ends when these tests have ended."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            start_new_session=True,
            # A fork has one thread; pyarrow's allocator would start another one at its import.
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "JE_ARROW_MALLOC_CONF": "background_thread:false",
            },
        )
    return ours


# ------------------------------------------------------------------------------------ in the server


def serve(requests):
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # of another version of the library
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, (
        "a fork has one thread: what was imported must not have started others"
    )
    gc.collect()
    gc.freeze()
    mine = [finalizer for finalizer in weakref.finalize._registry if finalizer.atexit]
    for finalizer in mine:
        finalizer.atexit = (
            False  # temporary folders of the server, which no program takes away at its end
        )
    while True:
        message, files, _, _ = socket.recv_fds(requests, LARGEST, 3)
        if not message:  # the tests have ended
            break
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _keep(json.loads(message), *files)
        for file in files:
            os.close(file)
    for finalizer in mine:
        finalizer.atexit = True


def _keep(request, stdout, stderr, status):
    """Start a program, tell its number, wait for it, tell its exit code."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _become(**request, stdout=stdout, stderr=stderr)
    os.write(status, b"%d\n" % pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, b"%d\n" % code)
    os._exit(0)


def _become(words, environment, folder, stdout=1, stderr=2):
    """Be the program `python words ...`, from its first line to its exit; never returns."""
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(file, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # those of the process that forked
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.modules[
        "numpy"
        # Each program its own, as a new interpreter has; Python's `random` sees to itself
    ].random.seed()
    if words[0] == "-u":
        words = words[1:]
    code = 0
    try:
        if words[0] == "-m":
            sys.argv, sys.path[0] = words[1:], os.getcwd()
            if words[1] == "torch.distributed.run":
                _fork_workers()
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if not (code is None or isinstance(code, int)):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # as the interpreter ends: a save under way is finished
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(int(code or 0))


def _fork_workers():
    """Let the torchrun that this process is about to be start Python scripts by forking."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    popen = SubprocessHandler._popen

    def fork(self, args, env):
        return (
            Worker(args[1:], env, self._stdout, self._stderr)
            if args[0] == sys.executable
            else popen(self, args, env)
        )

    SubprocessHandler._popen = fork


class Worker:
    """A forked process, with as much of Popen's interface as torchrun uses."""

    def __init__(self, words, environment, stdout, stderr):
        self.returncode = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            _become(
                list(words),
                environment,
                os.getcwd(),
                *(file.fileno() if file else n for n, file in ((1, stdout), (2, stderr))),
            )

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout=None):
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        serve(requests)
