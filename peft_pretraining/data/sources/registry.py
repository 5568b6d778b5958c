"""Open a source by the name that the user gives."""

from __future__ import annotations

import os

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.c4 import open_c4
from peft_pretraining.data.sources.files import open_files
from peft_pretraining.data.sources.pydocs import open_pydocs
from peft_pretraining.errors import UserError
from peft_pretraining.utils.cache import cache_folder, expanded


def open_source(
    dataset: str, seed: int | None, cache_dir: str | os.PathLike[str] | None = None
) -> Source:
    """Return the source that `--dataset` names.

    Args:
        dataset: `c4`, `pydocs`, a file, a folder of files, or a folder that mirrors the C4
            repository.
        seed: Seed of the order of C4's shards (None: as they are numbered); used for nothing else.
        cache_dir: See `cache_folder`; `pydocs` is stored there.

    Raises:
        UserError: There is nothing to read.
    """
    if dataset == "c4":
        return open_c4(None, seed)
    if dataset == "pydocs":
        return open_pydocs(cache_folder(cache_dir))
    path = expanded(dataset)
    if not path.exists():
        raise UserError(
            f"--dataset {dataset}: there is no such file or folder; give an existing one, or type "
            "`--dataset pydocs`."
        )
    if any(path.glob("en/c4-train.*.json.gz")):
        return open_c4(path, seed)
    return open_files(path)
