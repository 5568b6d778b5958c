"""The folder for cached files."""

from __future__ import annotations

import os
from pathlib import Path

from peft_pretraining.errors import UserError


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder for everything that can be made again.

    That is `cache_dir`, or else `$ALPHADECAY_CACHE`, `$XDG_CACHE_HOME/alphadecay` or `~/.cache/alphadecay`.
    Raises UserError where it cannot be made or written to.
    """
    named = cache_dir or os.environ.get("ALPHADECAY_CACHE")
    folder = (
        Path(named)
        if named
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphadecay"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be made ({error.strerror}); set ALPHADECAY_CACHE to another folder."
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(
            f"The cache folder {folder} cannot be written to; set ALPHADECAY_CACHE to another folder."
        )
    return folder
