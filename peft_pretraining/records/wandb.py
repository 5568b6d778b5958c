"""Weights & Biases."""

import functools
import netrc
import os
from pathlib import Path

from loguru import logger


def start_wandb(folder: Path, project: str, name: str, tags: list[str], config: dict):
    """A W&B run: as WANDB_MODE says, else online where a key is known and offline where not; it never asks for one."""
    try:
        import wandb
    except ImportError:
        logger.info("wandb is not installed: the run is recorded in its folder only")
        return None
    mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    settings = wandb.Settings(silent=True, console="off", init_timeout=30)
    start = functools.partial(
        wandb.init,
        project=project,
        name=name,
        tags=tags,
        config=config,
        dir=folder,
        settings=settings,
    )
    try:
        run = start(mode=mode)
    except wandb.errors.Error as error:  # a node without internet must train all the same
        logger.warning(
            f"W&B cannot be reached ({error}): this run is recorded offline, `wandb sync` sends it later"
        )
        run = start(mode="offline")
    run.define_metric("*", step_metric="update_step")
    return run


def has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
