"""The modules of the command line import no slow library."""

import subprocess
import sys

import pytest

from tests.end_to_end.common import ROOT


@pytest.mark.parametrize("name", ["llama", "vit", "common", "main"])
def test_a_module_of_the_command_line_imports_no_slow_library(name):
    code = (
        f"import sys, peft_pretraining.cli.{name}; "
        "print({'torch', 'numpy', 'transformers', 'wandb', 'loguru'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "command",
    [
        "torchrun_main.py",
        "main_vit.py",
        "-m peft_pretraining.prepare_data",
        "-m peft_pretraining.report",
        "-m peft_pretraining.evaluate_checkpoint",
    ],
)
def test_help_is_printed_without_a_slow_library(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command.split(), "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "numpy", "transformers", "datasets", "wandb", "loguru"} & imported
    assert command.removeprefix("-m ") in done.stdout.splitlines()[0]
