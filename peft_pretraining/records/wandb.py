"""Weights & Biases, which is imported only if a run is recorded there."""

from __future__ import annotations

import functools
import netrc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

if TYPE_CHECKING:
    from wandb import Run


def start_wandb(
    folder: Path, project: str, name: str, tags: list[str], config: dict[str, Any]
) -> Run | None:
    """Start a W&B run, which never asks for a key.

    The mode is $WANDB_MODE; by default online if a key is known, and offline otherwise. If W&B
    cannot be reached, the run is recorded offline.

    Args:
        folder: The run folder, in which W&B keeps its files.
        project: The name of the W&B project.
        name: The name of the W&B run.
        tags: Its tags.
        config: Its config.

    Returns:
        The W&B run; None if wandb is not installed.
    """
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
    except wandb.errors.Error as error:
        # A machine without internet access must train all the same.
        logger.warning(
            f"W&B cannot be reached ({error}): this run is recorded offline, "
            "`wandb sync` sends it later"
        )
        run = start(mode="offline")
    run.define_metric("*", step_metric="update_step")
    return run


def has_wandb_key() -> bool:
    """Return True if a key for W&B is in $WANDB_API_KEY or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
