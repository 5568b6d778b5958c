"""--help and mistyped flags are answered without importing torch, which takes seconds."""

import subprocess
import sys

import pytest

from tests.end_to_end.common import ROOT

COMMANDS = {
    "torchrun_main.py": ["torchrun_main.py"],
    "main_vit.py": ["main_vit.py"],
    "evaluate_checkpoint": ["-m", "peft_pretraining.evaluate_checkpoint"],
}
SLOW = {"torch", "transformers", "wandb", "numpy", "timm", "matplotlib"}


def imported_modules(words):
    """Run `python words` in a new interpreter; return the modules it imports, output, exit code."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], capture_output=True, text=True, cwd=ROOT
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rsplit("|", 1)[1].strip() for line in lines}
    other = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return modules, done.stdout, "\n".join(other), done.returncode


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_slow_library(command):
    modules, stdout, _, code = imported_modules([*COMMANDS[command], "--help"])
    assert code == 0 and "usage:" in stdout
    assert not modules & SLOW
    assert "argparse" in modules  # the list is not empty


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistyped_flag_is_answered_without_a_slow_library(command):
    modules, _, stderr, code = imported_modules([*COMMANDS[command], "--no_such_flag"])
    assert code == 2 and stderr.startswith("error: ")
    assert not modules & SLOW
