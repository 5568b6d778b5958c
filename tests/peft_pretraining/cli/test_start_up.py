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
