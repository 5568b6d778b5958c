"""Versions, device and git commit of a run."""

import importlib.metadata
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from peft_pretraining.parallel.process_group import DistributedContext

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "timm", "wandb")


def environment_info(ranks: DistributedContext) -> dict:
    cuda = ranks.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(ranks.device)
        if cuda
        else f"CPU, {torch.get_num_threads()} threads a process",
        "processes": ranks.world_size,
        "versions": {"python": sys.version.split()[0]}
        | {p: v for p in PACKAGES if (v := _version(p))},
        "git_commit": _git_commit(),
        "command": " ".join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
        )
    except OSError:  # no git here
        return None
    return answer.stdout.strip() or None
