"""Weights & Biases, which is imported only if a run is recorded there."""

from __future__ import annotations

import functools
import netrc
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loguru import logger

if TYPE_CHECKING:
    from wandb import Run


def start_wandb(
    folder: Path, project: str, name: str, tags: list[str], config: dict[str, Any], run_id: str
) -> Run | None:
    """Start a W&B run, which never asks for a key.

    The mode is that of `wandb_mode`. If W&B cannot be reached, the run is recorded offline.

    Args:
        folder: The run folder, in which W&B keeps its files.
        project: The name of the W&B project.
        name: The name of the W&B run.
        tags: Its tags.
        config: Its config.
        run_id: Its identifier. If W&B has a run with this identifier, that run goes on.

    Returns:
        The W&B run; None if wandb is not installed.
    """
    try:
        import wandb
    except ImportError:
        logger.info("wandb is not installed: the run is recorded in its folder only")
        return None
    mode: Any = wandb_mode()
    settings = wandb.Settings(silent=True, console="off", init_timeout=30)
    start = functools.partial(
        wandb.init,
        project=project,
        name=name,
        tags=tags,
        config=config,
        id=run_id,
        resume="allow",
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


def wandb_mode() -> str:
    """Return $WANDB_MODE; by default `online` if a key is known, and `offline` otherwise."""
    return os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")


def new_run_id() -> str:
    """Return a random identifier for a run in W&B."""
    return secrets.token_hex(4)


def has_wandb_key() -> bool:
    """Return True if a key for W&B is in $WANDB_API_KEY or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def describe_wandb(project: str | None) -> str:
    """Return where W&B records a run, for the log. project: None means that it is not used."""
    return f"W&B project {project} ({wandb_mode()})" if project else "no W&B"
