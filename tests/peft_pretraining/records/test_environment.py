"""What run.json records about the machine and the software."""

import subprocess
import sys

import torch

from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records import environment
from peft_pretraining.records.environment import environment_info


def test_environment_info(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "a-package-that-is-not-installed"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1e-3"])
    info = environment_info(DistributedContext(0, 0, 2, torch.device("cpu")))
    assert info["device"] == f"CPU, {torch.get_num_threads()} threads a process"
    assert info["processes"] == 2 and info["command"] == "train.py --lr 1e-3"
    assert set(info["versions"]) == {"python", "torch"}
    assert info["started"].endswith("+00:00")


def test_a_machine_without_git(monkeypatch):
    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    info = environment_info(DistributedContext(0, 0, 1, torch.device("cpu")))
    assert info["git_commit"] is None
