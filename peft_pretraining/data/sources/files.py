"""Documents from local files: JSON lines, plain text and Parquet, also compressed.

The files can also be read shard by shard, from any document on (see `shards.Shards`).
"""

from __future__ import annotations

import functools
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.folders import (
    ENDINGS,
    Folder,
    list_folder,
    without_compression,
)
from peft_pretraining.data.sources.problems import (
    check_kind,
    json_problem,
    read_error,
    text_problem,
)
from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import reason_of

# Bytes of uncompressed JSON lines in a shard, at most. A resumed run has to skip up to one shard in
# each substream; reading this much takes about a second.
SHARD_BYTES = 2**26

ByteRange = tuple[int, int]


@dataclass(frozen=True)
class FileDocuments:
    """The documents of some files, in the order of the files. Blank documents are left out.

    Each file is a shard. An uncompressed .jsonl (or .json) file that is larger than `SHARD_BYTES`
    is split into several shards.
    """

    files: tuple[Path, ...]
    remote = False

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            yield from (text for text in read_file(path) if text.strip())

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def read(self, shard: int, skip: int) -> Iterator[str]:
        """Yield the documents of one shard without the first `skip`."""
        path, byte_range = self._shards[shard]
        documents = (text for text in read_file(path, byte_range) if text.strip())
        return itertools.islice(documents, skip, None)

    @functools.cached_property
    def _shards(self) -> list[tuple[Path, ByteRange | None]]:
        return [(path, byte_range) for path in self.files for byte_range in _byte_ranges(path)]


def _byte_ranges(path: Path) -> list[ByteRange | None]:
    """Return the ranges of bytes in which a file is read; None is the whole file.

    Their number is a power of two, as batch sizes are. All substreams of a stream then get the same
    number of ranges of the same size, so that none of them reaches its end, and repeats data,
    before the others do.
    """
    size = path.stat().st_size
    count = 1 << (max(-(-size // SHARD_BYTES), 1) - 1).bit_length()
    if path.suffix.lower() not in (".jsonl", ".ndjson", ".json") or count == 1:
        return [None]
    return [(size * i // count, size * (i + 1) // count) for i in range(count)]


def open_files(path: Path, option: str = "--dataset") -> Source:
    """Return a file or folder as a source.

    Args:
        path: A file or a folder, whose splits are told by names; see `list_folder`.
        option: The command-line flag that error messages name. A folder of --validation_file is
            read whole.

    Raises:
        UserError: There is no readable file, no document, or it is not clear which files are to be
            trained on.
    """
    found = find_files(path, option)
    documents = FileDocuments(found.train)
    held_out = FileDocuments(found.validation) if found.validation else None
    for split, part in (("training", documents), ("validation", held_out)):
        if part is not None and next(iter(part), None) is None:
            raise UserError(
                f"{option} {path}: there is no document in the {split} files, such as "
                f"{part.files[0]}; give files with text in them."
            )
    files = documents.files + (held_out.files if held_out else ())
    root = path if path.is_dir() else path.parent
    return Source(
        str(path),
        documents,
        held_out,
        streamed=False,
        signature=signature_of(files, root),
        file_identity=identity_of(files),
        files=found.description if path.is_dir() else "",
    )


def signature_of(files: tuple[Path, ...] | list[Path], root: Path) -> tuple:
    """Return (name relative to `root`, bytes) of each file: equal on all machines."""
    return tuple((file.relative_to(root).as_posix(), file.stat().st_size) for file in files)


def identity_of(files: tuple[Path, ...] | list[Path]) -> tuple:
    """Return (absolute path, bytes, modification time) of each file on this machine."""
    return tuple(
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    )


def find_files(path: Path, option: str = "--dataset") -> Folder:
    """Return the readable files in a folder and its sub-folders, by their split.

    Args:
        path: A folder, or a file, which is then the only one.
        option: The command-line flag that error messages name.

    Raises:
        UserError: There is no readable file, or it is not clear which files are to be trained on.
    """
    if not path.exists():
        raise UserError(f"{option} {path}: there is no such file or folder; give an existing one.")
    if path.is_dir():
        return list_folder(path, option, splits=option == "--dataset")
    if not path.name.lower().endswith(ENDINGS):
        raise UserError(
            f"{option} {path}: this kind of file is not known; give a file ending in "
            f"{', '.join(ENDINGS)}."
        )
    return Folder((path,), (), ())


def read_file(path: Path, byte_range: ByteRange | None = None) -> Iterator[str]:
    """Yield the documents of one file.

    These are the field `text` of each JSON line or Parquet row. In a .txt file documents are
    separated by blank lines; if it has none, each line is a document.

    Args:
        path: The file.
        byte_range: Of uncompressed JSON lines, read only those that begin in these bytes
            [start, stop). None: read all.

    Raises:
        UserError: A record is malformed (names the file and the line), or the file's compression or
            encoding is broken.
    """
    check_kind(path)
    kind = Path(without_compression(path.name)).suffix.lower()
    if kind == ".parquet":
        texts = _parquet_texts(path)
    elif kind == ".txt":
        texts = _plain_texts(path)
    else:
        texts = _json_texts(path, byte_range)
    try:
        yield from texts
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise read_error(path, error, _open_binary) from error


def _open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading; what comes out is uncompressed."""
    compression = path.suffix.lower()
    if compression == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if compression == ".xz":
        return lzma.open(path, "rb")
    if compression == ".zst":
        import pyarrow

        # Not the reader of the library zstandard: it accepts a truncated file without an error,
        # and documents would be lost unnoticed.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def _open_text(path: Path) -> IO[str]:
    # Reads plain UTF-8 as well, and drops the byte order mark that some editors put first.
    return io.TextIOWrapper(_open_binary(path), encoding="utf-8-sig")


class _ByteRangeReader(io.RawIOBase):
    """Reads the lines of a file that begin in its bytes [start, stop)."""

    def __init__(self, path: Path, start: int, stop: int):
        self.file = open(path, "rb")
        stop = self._seek_line(stop)
        self.left = stop - self._seek_line(start)

    def _seek_line(self, position: int) -> int:
        """Go to the first line that begins at `position` or after it, and return its position."""
        self.file.seek(max(position - 1, 0))
        if position:
            self.file.readline()
        return self.file.tell()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = self.file.readinto(memoryview(buffer)[: self.left])
        self.left -= count
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def _open_range(path: Path, byte_range: ByteRange) -> IO[str]:
    # The byte order mark can only be at the beginning of the file.
    encoding = "utf-8" if byte_range[0] else "utf-8-sig"
    reader = _ByteRangeReader(path, *byte_range)
    return io.TextIOWrapper(io.BufferedReader(reader, buffer_size=2**20), encoding=encoding)


def _json_texts(path: Path, byte_range: ByteRange | None) -> Iterator[str]:
    with _open_range(path, byte_range) if byte_range else _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                record = _parse_line(line)
            except (ValueError, RecursionError) as error:
                first = 0 if byte_range and byte_range[0] else number
                problem = json_problem(line, first, error)
                raise _line_error(path, byte_range, number, problem) from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise _line_error(path, byte_range, number, text_problem(record))
            yield replace_lone_surrogates(text)


def _parse_line(line: str) -> object:
    """Return the JSON value of a line; an integer of thousands of digits does not matter."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python refuses to convert so many digits, in any field
        return json.loads(line, parse_int=str)


def _line_error(path: Path, byte_range: ByteRange | None, number: int, problem: str) -> UserError:
    """Return the error for a line; `number` is its number within the byte range, from 1 on."""
    if byte_range and byte_range[0]:
        with _open_range(path, (0, byte_range[0])) as lines:
            number += sum(1 for _ in lines)
    return UserError(f"{path}, line {number}: {problem}.")


def _plain_texts(path: Path) -> Iterator[str]:
    with _open_text(path) as lines:
        # A blank line counts only between text: at the end of the file it separates nothing.
        from_first_text = itertools.dropwhile(lambda line: not line.strip(), lines)
        from_blank_line = itertools.dropwhile(str.strip, from_first_text)
        has_blocks = any(line.strip() for line in from_blank_line)
    with _open_text(path) as lines:
        if not has_blocks:
            yield from (line.rstrip("\r\n") for line in lines)
            return
        for is_text, block in itertools.groupby(lines, key=lambda line: bool(line.strip())):
            if is_text:
                yield "".join(block).rstrip("\r\n")


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise UserError(
                    f"{path}: no column `text` among {', '.join(names)}; rename the one that holds "
                    "the text to `text`."
                )
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise UserError(
                            f"{path}, row {row}: `text` holds no string; remove the row or fill it."
                        )
                    yield text
                    row += 1
    except pyarrow.ArrowInvalid as error:
        raise UserError(
            f"{path} cannot be read as Parquet ({reason_of(error)}): it is damaged, cut short or "
            "not Parquet at all; fetch it again, or remove it."
        ) from error


def replace_lone_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs by U+FFFD.

    JSON can contain an escaped half of a pair, which no UTF-8 encoder, hash or tokenizer accepts.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
