"""Versions, device and git commit of a run."""

import importlib.metadata
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from peft_pretraining.parallel.process_group import DistributedContext

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "timm", "wandb")


def environment_info(ranks: DistributedContext) -> dict[str, Any]:
    """Return what run.json records about the machine, the software and the command line."""
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    else:
        device = f"CPU, {torch.get_num_threads()} threads a process"
    versions = {"python": sys.version.split()[0]}
    versions |= {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "device": device,
        "processes": ranks.world_size,
        "versions": versions,
        "git_commit": _git_commit(),
        "command": " ".join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    """Return the version of an installed package without importing it; None if not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of this source code, with `-dirty` after changes; None without git."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except OSError:  # git is not installed
        return None
    return result.stdout.strip() or None
