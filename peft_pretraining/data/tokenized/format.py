"""Files of tokenized data: names, checksums, and JSON with a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import atomic_write

pass

FORMAT = 1  # raise it when what is stored changes
BLOCK = 1024  # tokens under one CRC-32: a row of 256 reads 2 or 4 KB to be checked
SHARD_TOKENS = (
    2**26
)  # 128 MB, which is also what a preparation holds in memory and what a killed one loses at most
INDEX, JOURNAL, LOCK, TOKENIZER = "index.json", "preparation.json", ".lock", "tokenizer"
PREPARE_AGAIN = "run the prepare command again: it makes what is damaged anew"


def is_prepared(folder: Path) -> bool:
    """Whether a folder was made by `prepare`, to its end or not."""
    return (
        (folder / JOURNAL).is_file() or (folder / INDEX).is_file() and (folder / TOKENIZER).is_dir()
    )


def write_json_with_checksum(path: Path, content: dict) -> None:
    """Writes a dictionary as JSON with a checksum of its content and its name: one file in the place of another is damage too."""
    atomic_write(
        path,
        (
            json.dumps({**content, "checksum": _checksum(path.name, content)}, indent=1) + "\n"
        ).encode(),
    )


def read_json_with_checksum(path: Path, remedy: str) -> dict:
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        whole = checksum == _checksum(path.name, content)
    except (
        OSError,
        ValueError,
        RecursionError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # whatever garbage leads to
        raise damaged_error(path, "it cannot be read", remedy) from error
    if not whole:
        raise damaged_error(path, "its content is not what was written", remedy)
    return content


def _checksum(name: str, content: dict) -> str:
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def damaged_error(path: Path, what: str, remedy: str) -> UserError:
    return UserError(f"{path} is damaged ({what}): {remedy}.")
