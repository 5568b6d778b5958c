"""Run a training script and announce its phases: benchmarks/bench_faults.py starts this.

PHASES=FILE: each rank appends `phase rank pid` to FILE when a phase begins. Other environment
variables are those of tests/end_to_end/faulty_main.py, whose traces it writes.
"""

import contextlib
import faulthandler
import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peft_pretraining.parallel.launch import read_launch  # noqa: E402

# Before the slow imports, as in the scripts: a process that torchrun leaves behind meanwhile must
# know which torchrun that was.
LAUNCH = read_launch()

from peft_pretraining.cli.main import end, run_script  # noqa: E402
from peft_pretraining.train import loop  # noqa: E402
from tests.end_to_end import faulty_main  # noqa: E402

script = faulty_main.script


def announce(phase: str) -> None:
    """Append a line to the file of phases."""
    with contextlib.suppress(OSError), open(os.environ["PHASES"], "a") as file:
        file.write(f"{phase} {faulty_main.RANK} {os.getpid()}\n")


def announced(phase: str, function: Callable) -> Callable:
    """Return the function, which announces its phase when it is called."""

    @functools.wraps(function)
    def call(*arguments: object, **named: object) -> object:
        announce(phase)
        try:
            return function(*arguments, **named)
        finally:
            if phase in ("evaluation", "saving", "exporting"):
                announce("training")

    return call


def announced_once(phase: str, function: Callable) -> Callable:
    """Return the function, which announces its phase when it is called for the first time."""
    calls = itertools.count()

    @functools.wraps(function)
    def call(*arguments: object, **named: object) -> object:
        if next(calls) == 0:
            announce(phase)
        return function(*arguments, **named)

    return call


def main() -> int:
    """Run the script with its phases announced."""
    faulthandler.register(signal.SIGQUIT, all_threads=True)  # for a look at a process that hangs
    announce("start-up")
    faulty_main.put_faults_into_data()
    script.build_optimizer = faulty_main.build_optimizer_with_trace
    script.forward_backward = announced_once("training", script.forward_backward)
    data = "load_data" if hasattr(script, "load_data") else "load_images"
    for name, phase in (
        (data, "data"),
        ("evaluate_and_log", "evaluation"),
        ("save", "saving"),
        ("export", "exporting"),
    ):
        if hasattr(script, name):
            setattr(script, name, announced(phase, getattr(script, name)))
    loop.write_run_report = announced("report", loop.write_run_report)
    code = run_script(lambda: script.main(script.parse_arguments(), LAUNCH))
    announce("exit")
    return code


if __name__ == "__main__":
    end(main())
