"""Find the folder for cached files."""

from __future__ import annotations

import os
from pathlib import Path

from peft_pretraining.errors import UserError


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` replaced by the user's home folder.

    Raises:
        UserError: The path needs a home folder, and the user has none, as in some containers.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path} cannot be found, because this user has no home folder: set HOME, or "
            "ALPHADECAY_CACHE for cached files"
        ) from error


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder for cached files, made if it does not exist.

    Everything in it can be made again.

    Args:
        cache_dir: The folder. None: `$ALPHADECAY_CACHE`, else `$XDG_CACHE_HOME/alphadecay`, else
            `~/.cache/alphadecay`.

    Raises:
        UserError: The folder cannot be made or cannot be written to, or there is no home folder.
    """
    given = cache_dir or os.environ.get("ALPHADECAY_CACHE")
    if given:
        folder = Path(given)
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or expanded("~/.cache")) / "alphadecay"
    remedy = "set ALPHADECAY_CACHE to another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be made ({error.strerror}); {remedy}."
        ) from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"The cache folder {folder} cannot be written to; {remedy}.")
    return folder
