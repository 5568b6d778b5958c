"""Files of tokenized data: their names, their checksums, and JSON with a checksum."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import atomic_write, sha256_file

# To be increased when what is stored changes.
FORMAT_VERSION = 1
# Tokens per CRC-32. To verify a sequence of 256 tokens, 2 or 4 KB are read.
CHECKSUM_BLOCK = 1024
# Tokens in a shard: 128 MB. A preparation holds that much in memory, and a killed preparation loses
# that much at most.
SHARD_TOKENS = 2**26
INDEX_FILE = "index.json"
SETTINGS_FILE = "preparation.json"
LOCK_FILE = ".lock"
TOKENIZER_FOLDER = "tokenizer"
PREPARE_AGAIN = "run the prepare command again: it makes what is damaged anew"


def is_prepared(folder: Path) -> bool:
    """Return whether a folder was made by `prepare`, complete or not."""
    return (folder / SETTINGS_FILE).is_file() or (
        (folder / INDEX_FILE).is_file() and (folder / TOKENIZER_FOLDER).is_dir()
    )


def write_json_with_checksum(path: Path, content: dict) -> None:
    """Write a dictionary as JSON, with a checksum of its content and of the file's name.

    The name is included, because a file that was copied over another one is damage too.
    """
    with_checksum = {**content, "checksum": _checksum(path.name, content)}
    atomic_write(path, json.dumps(with_checksum, indent=1) + "\n")


def read_json_with_checksum(path: Path, remedy: str) -> dict:
    """Return what `write_json_with_checksum` wrote.

    Args:
        path: The file.
        remedy: What to do about a damaged file; ends the error message.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        intact = checksum == _checksum(path.name, content)
    except (
        OSError,
        ValueError,
        RecursionError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:  # What arbitrary content can lead to.
        raise damaged_error(path, "it cannot be read", remedy) from error
    if not intact:
        raise damaged_error(path, "its content is not what was written", remedy)
    return content


def _checksum(name: str, content: dict) -> str:
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, by name. Raises OSError."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir())}


def damaged_error(path: Path, what: str, remedy: str) -> UserError:
    """Return the error for a damaged file: what is wrong with it, and what to do about it."""
    return UserError(f"{path} is damaged ({what}): {remedy}.")
