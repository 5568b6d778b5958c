"""Say why a file of documents cannot be read, and what to do about it."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import IO

from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import reason_of

# (first bytes, kind, ending); an archive has no ending, because it cannot be read.
_SIGNATURES = (
    (b"\x1f\x8b", "gzip data", ".gz"),
    (b"\xfd7zXZ\x00", "xz data", ".xz"),
    (b"\x28\xb5\x2f\xfd", "zstd data", ".zst"),
    (b"PAR1", "Parquet data", ".parquet"),
    (b"PARE", "encrypted Parquet data", None),
    (b"PK\x03\x04", "a zip archive", None),
    (b"BZh", "bzip2 data", None),
    (b"7z\xbc\xaf", "a 7z archive", None),
    (b"%PDF", "a PDF document", None),
)
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# The values of JSON that are no strings.
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}
# What each ending promises that the file begins with.
_PROMISED = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}


def check_kind(path: Path) -> None:
    """Check that a file holds what its name says.

    Raises:
        UserError: It holds compressed data, an archive or UTF-16 text under the name of something
            else, or it cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(
            f"{path} cannot be opened ({reason_of(error)}): make it readable, or move it out of "
            "the folder."
        ) from error
    ending = path.suffix.lower()
    promised = _PROMISED.get(ending)
    if promised is not None and start and not start.startswith(promised):
        raise UserError(
            f"{path} is not {ending[1:]} data, although its name ends in {ending}: rename it to "
            f"{path.with_suffix('').name}, or fetch it again."
        )
    if start.startswith(_UTF16_MARKS):
        raise UserError(
            f"{path} is UTF-16 text, and only UTF-8 is read: convert it with "
            f"`iconv -f UTF-16 -t UTF-8 {path.name}`."
        )
    for signature, kind, name in _SIGNATURES:
        if start.startswith(signature) and name != ending:
            cure = (
                f"rename it to {path.name}{name}"
                if name in _PROMISED
                else f"rename it to {path.stem}{name}"
                if name
                else "unpack it, and give the files in it"
            )
            raise UserError(f"{path} holds {kind}, not what its name says: {cure}.")
    if start[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive: unpack it, and give the files in it.")


def read_error(path: Path, error: Exception, open_binary: Callable[[Path], IO[bytes]]) -> UserError:
    """Return the error for a file whose reading failed.

    Args:
        path: The file.
        error: What was raised.
        open_binary: Opens a file uncompressed, to find the line.
    """
    if isinstance(error, UnicodeDecodeError):
        where, byte = _undecodable(path, open_binary)
        return UserError(
            f"{path}{where}: byte 0x{byte:02x} is not UTF-8 text; if the file is in another "
            f"encoding, convert it, for instance with `iconv -f LATIN1 -t UTF-8 {path.name}`."
        )
    if isinstance(error, EOFError):
        problem = "it ends too early, so it was cut short"
    elif isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno:
        return UserError(f"{path} cannot be read ({reason_of(error)}): check the disk, or copy it.")
    else:
        problem = f"its data is damaged ({reason_of(error)})"
    return UserError(f"{path} cannot be read to its end: {problem}; fetch it again.")


def _undecodable(path: Path, open_binary: Callable[[Path], IO[bytes]]) -> tuple[str, int]:
    """Return where a file is not UTF-8 (`, line 3`), and the first byte that is not."""
    with open_binary(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number}", line[error.start]
    return "", 0  # a character is cut off at the end of a byte range


def json_problem(line: str, number: int, error: Exception) -> str:
    """Return what is wrong with a line that is not valid JSON, and what to do.

    Args:
        line: The line.
        number: Its number in the file, from 1 on.
        error: What the parser raised.
    """
    start = line.lstrip("\ufeff \t")
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply to be read; remove the nested field"
    if number == 1 and (start.startswith("[") or start.strip() == "{"):
        return (
            "the file is one JSON value over several lines; write one object a line, for instance "
            "with `jq -c '.[]?' FILE` (`jq -c .` for a single object)"
        )
    return f"not valid JSON ({error}); write an object with a string `text` a line"


def text_problem(record: object) -> str:
    """Return what is wrong with a JSON value that has no string `text`, and what to do."""
    advice = "write one object with a string `text` a line"
    if isinstance(record, list):
        return f"the line is a JSON list, not an object; {advice}"
    if not isinstance(record, dict):
        return f"the line is not a JSON object; {advice}"
    if "text" not in record:
        names = ", ".join(itertools.islice(map(repr, record), 5)) or "none"
        return f"no field `text` (its fields: {names}); {advice}"
    kind = _KINDS[type(record["text"])]
    return f"the field `text` holds {kind}, not a string; {advice}"
