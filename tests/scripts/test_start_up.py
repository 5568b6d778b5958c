"""The commands of scripts/ print their help without loading a slow library."""

import subprocess
import sys

import pytest

from tests.end_to_end.common import ROOT

SLOW = {"torch", "numpy", "pandas", "scipy", "matplotlib", "transformers", "datasets", "wandb"}
COMMANDS = [
    "scripts/paper/table.py",
    "scripts/paper/figures.py",
    "scripts/cluster/plan.py",
    "scripts/import_graph.py",
    "scripts/readme_figure.py",
    "scripts/quickstart.py",
    "scripts/pool.py",
    "scripts/table.py",
    "scripts/figures.py",
    "scripts/plan.py",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_without_a_slow_library(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", command, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not SLOW & imported
    assert done.stdout.startswith("usage: ")
