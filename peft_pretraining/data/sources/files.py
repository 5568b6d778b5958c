"""Documents: where the text of a run comes from, and which of it is held out for validation.

A source is a pair of iterables of strings, one string a document. Every iterable here can be read again from its start,
gives the same order each time and on each machine, and can be pickled, so that a data-loading process can read it for itself.
The corpora can also be read shard by shard from any document on (`shards.Shards`).
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

from peft_pretraining.data.sources.base import Source
from peft_pretraining.errors import UserError

C4 = "allenai/c4"
TEXT_ENDINGS = tuple(
    kind + packing for kind in (".jsonl", ".json", ".txt") for packing in ("", ".gz", ".xz", ".zst")
)
ENDINGS = (*TEXT_ENDINGS, ".parquet")
SHARD_BYTES = (
    2**26
)  # of uncompressed JSON lines: a second's reading, which is the most that a continued run skips in each


# ---------------------------------------------------------------------------------------------------------------- local files


@dataclass(frozen=True)
class FileDocuments:
    """The documents of some files, in the order of the files and of the documents in them; blank documents are left out.

    Each file is a shard, and so is each piece of at most `SHARD_BYTES` of an uncompressed .jsonl (or .json).
    """

    files: tuple[Path, ...]
    remote = False

    def __iter__(self) -> Iterator[str]:
        for path in self.files:
            yield from (text for text in read_file(path) if text.strip())

    @property
    def n_shards(self) -> int:
        return len(self._shards)

    def read(self, shard: int, skip: int) -> Iterator[str]:
        return itertools.islice(
            (text for text in read_file(*self._shards[shard]) if text.strip()), skip, None
        )

    @functools.cached_property
    def _shards(self) -> list[tuple[Path, tuple[int, int] | None]]:
        return [(path, part) for path in self.files for part in _parts(path)]


def _parts(path: Path) -> list[tuple[int, int] | None]:
    """The pieces in which a file is read: byte ranges, None for the whole.

    Their number is a power of two, as batch sizes are: the lanes of a stream then get equally many of equal size, so that none
    runs out of data, and sees it again, before the others do.
    """
    size = path.stat().st_size
    count = 1 << (max(-(-size // SHARD_BYTES), 1) - 1).bit_length()
    if path.suffix not in (".jsonl", ".json") or count == 1:
        return [None]
    return [(size * i // count, size * (i + 1) // count) for i in range(count)]


def open_files(path: Path, option: str = "--dataset") -> Source:
    """A file or folder as a source; a folder's own `train/` and `validation/` (or `val/`) subfolders are its split.

    Raises UserError where there is no readable file or no document; `option` is the flag that the message names.
    """
    train, validation = path, None
    if path.is_dir() and (path / "train").is_dir():
        validation = next(
            (path / name for name in ("validation", "val") if (path / name).is_dir()), None
        )
        train = path / "train" if validation else path
    documents = FileDocuments(find_files(train, option))
    held_out = FileDocuments(find_files(validation, option)) if validation else None
    for folder, part in ((train, documents), (validation, held_out)):
        if part is not None and next(iter(part), None) is None:
            raise UserError(
                f"{option} {path}: there is no document in {folder}; give files with text in them."
            )
    files = documents.files + (held_out.files if held_out else ())
    root = path if path.is_dir() else path.parent
    signature = tuple((file.relative_to(root).as_posix(), file.stat().st_size) for file in files)
    stamp = tuple(
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    )
    return Source(str(path), documents, held_out, streamed=False, signature=signature, stamp=stamp)


def find_files(path: Path, option: str = "--dataset") -> tuple[Path, ...]:
    """`path` itself, or the readable files anywhere below it sorted by relative name. UserError where there is none."""
    if not path.exists():
        raise UserError(f"{option} {path}: there is no such file or folder; give an existing one.")
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise UserError(
                f"{option} {path}: this kind of file is not known; give a file ending in {', '.join(ENDINGS)}."
            )
        return (path,)
    relative = (
        file.relative_to(path)
        for file in path.rglob("*")
        if file.is_file() and file.name.endswith(ENDINGS)
    )
    # Hidden files and folders are other programs' notes (.ipynb_checkpoints, ._copies), not corpus.
    found = sorted(
        (file for file in relative if not any(part.startswith(".") for part in file.parts)),
        key=lambda file: file.as_posix(),
    )
    if not found:
        raise UserError(
            f"{option} {path}: the folder holds no readable file; put files ending in {', '.join(ENDINGS)} there."
        )
    return tuple(path / file for file in found)


def read_file(path: Path, part: tuple[int, int] | None = None) -> Iterator[str]:
    """The documents of one file: `text` of each record, or the blocks between blank lines of a .txt (its lines where it has no blank line).

    `part`: of uncompressed JSON lines only those that begin in these bytes [from, to).
    Raises UserError with the file and the line (row) number for a bad record, with the file for broken compression or encoding.
    """
    if path.name.endswith(".parquet"):
        texts = _parquet_texts(path)
    elif path.name.removesuffix(path.suffix).endswith(".txt") or path.suffix == ".txt":
        texts = _plain_texts(path)
    else:
        texts = _json_texts(path, part)
    try:
        yield from texts
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} cannot be read to its end ({reason}): it is broken or cut short; fetch it again."
        ) from error


def _open_text(path: Path) -> io.TextIOBase:
    encoding = (
        "utf-8-sig"  # reads plain UTF-8 as well, and drops the mark that some editors put first
    )
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding)
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding=encoding)
    if path.suffix == ".zst":
        import pyarrow

        # Not zstandard's reader: that one takes a file cut short for one that ends there, and loses documents without a word.
        return io.TextIOWrapper(
            pyarrow.input_stream(str(path), compression="zstd"), encoding=encoding
        )
    return open(path, encoding=encoding)


class _ByteRangeReader(io.RawIOBase):
    """The lines of a file that begin in its bytes [start, stop)."""

    def __init__(self, path: Path, start: int, stop: int):
        self.file = open(path, "rb")
        stop = self._line_start(stop)
        self.left = stop - self._line_start(start)

    def _line_start(self, position: int) -> int:
        """Goes to the first line that begins at `position` or after it; returns its place."""
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


def _open_part(path: Path, part: tuple[int, int]) -> io.TextIOBase:
    encoding = "utf-8" if part[0] else "utf-8-sig"  # the mark stands at the very beginning only
    return io.TextIOWrapper(
        io.BufferedReader(_ByteRangeReader(path, *part), buffer_size=2**20), encoding=encoding
    )


def _json_texts(path: Path, part: tuple[int, int] | None) -> Iterator[str]:
    with _open_part(path, part) if part else _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise _bad_line(
                    path,
                    part,
                    number,
                    f"not valid JSON ({error}); write an object with a string `text` a line",
                ) from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise _bad_line(
                    path,
                    part,
                    number,
                    "no string in a field `text`; write one object with a string `text` a line",
                )
            yield without_lone_surrogates(text)


def _bad_line(path: Path, part: tuple[int, int] | None, number: int, complaint: str) -> UserError:
    """The error for the line that is `number` of its part, with its number in the file."""
    if part and part[0]:
        with _open_part(path, (0, part[0])) as lines:
            number += sum(1 for _ in lines)
    return UserError(f"{path}, line {number}: {complaint}.")


def _plain_texts(path: Path) -> Iterator[str]:
    with _open_text(path) as lines:
        # A blank line counts only between text: one at the end of the file separates nothing.
        blank = itertools.dropwhile(
            str.strip, itertools.dropwhile(lambda line: not line.strip(), lines)
        )
        by_block = any(line.strip() for line in blank)
    with _open_text(path) as lines:
        if not by_block:
            yield from (line.rstrip("\r\n") for line in lines)
            return
        for filled, block in itertools.groupby(lines, key=lambda line: bool(line.strip())):
            if filled:
                yield "".join(block).rstrip("\r\n")


def _parquet_texts(path: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UserError(
                    f"{path}: no column `text` among {columns}; rename the one that holds the text to `text`."
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
            f"{path} cannot be read as parquet ({error}): it is broken or cut short; fetch it again."
        ) from error


def without_lone_surrogates(text: str) -> str:
    """JSON may escape half a surrogate pair; no UTF-8 encoder, hash or tokenizer takes it."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
