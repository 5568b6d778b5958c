"""Documents: where the text of a run comes from, and which of it is held out for validation.

A source is a pair of iterables of strings, one string a document. Every iterable here can be read again from its start,
gives the same order each time and on each machine, and can be pickled, so that a data-loading process can read it for itself.
The corpora can also be read shard by shard from any document on (`shards.Shards`).
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import os
import platform
import sysconfig
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from peft_pretraining.errors import UserError
from peft_pretraining.data.sources.shards import Shards, network_errors, read_patiently


C4 = "allenai/c4"
TEXT_ENDINGS = tuple(kind + packing for kind in (".jsonl", ".json", ".txt") for packing in ("", ".gz", ".xz", ".zst"))
ENDINGS = (*TEXT_ENDINGS, ".parquet")
PYDOCS_PACKAGES = ("stdlib", "numpy", "pandas", "matplotlib", "torch", "transformers")
PYDOCS_FORMAT = 1  # raise it when the gathering changes, so that an older cache is not taken for the new one
SHORTEST_DOCSTRING = 100  # characters; below it a docstring is mostly a name in other words
HELD_OUT_SHARE = 0.01
SHARD_BYTES = 2**26  # of uncompressed JSON lines: a second's reading, which is the most that a continued run skips in each


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `train` and `validation` are re-iterable (`validation` is None where the source has no split of its own). `streamed` says
    that the corpus is read while training rather than tokenised beforehand. `signature` is (name, bytes) of every file, equal
    on every machine that has the same files; `stamp` adds paths and times and identifies the files on this machine.
    """

    name: str
    train: Iterable[str]
    validation: Iterable[str] | None
    streamed: bool
    signature: tuple
    stamp: tuple


@dataclass(frozen=True)
class Split:
    """Two sets of documents that share none, and the rule that parted them (goes into fingerprints)."""

    train: Iterable[str]
    validation: Iterable[str]
    rule: tuple
    stamp: tuple = ()


def cache_folder(cache_dir: str | os.PathLike | None = None) -> Path:
    """The folder for everything that can be made again.

    That is `cache_dir`, or else `$ALPHADECAY_CACHE`, `$XDG_CACHE_HOME/alphadecay` or `~/.cache/alphadecay`.
    Raises UserError where it cannot be made or written to.
    """
    named = cache_dir or os.environ.get("ALPHADECAY_CACHE")
    folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alphadecay"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache folder {folder} cannot be made ({error.strerror}); set ALPHADECAY_CACHE to another folder.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"The cache folder {folder} cannot be written to; set ALPHADECAY_CACHE to another folder.")
    return folder


def open_source(dataset: str, seed: int | None, cache_dir: str | os.PathLike | None = None) -> Source:
    """The source that `--dataset` names: `c4`, `pydocs`, a file, a folder of files, or a folder that mirrors the C4 repository.

    `seed` orders C4's shards (None: as they are numbered) and nothing else. Raises UserError where there is nothing to read.
    """
    if dataset == "c4":
        return open_c4(None, seed)
    if dataset == "pydocs":
        return open_pydocs(cache_folder(cache_dir))
    path = Path(dataset).expanduser()
    if not path.exists():
        raise UserError(f"--dataset {dataset}: there is no such file or folder; give an existing one, or type `--dataset pydocs`.")
    if any(path.glob("en/c4-train.*.json.gz")):
        return open_c4(path, seed)
    return open_files(path)


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
        return itertools.islice((text for text in read_file(*self._shards[shard]) if text.strip()), skip, None)

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
        validation = next((path / name for name in ("validation", "val") if (path / name).is_dir()), None)
        train = path / "train" if validation else path
    documents = FileDocuments(find_files(train, option))
    held_out = FileDocuments(find_files(validation, option)) if validation else None
    for folder, part in ((train, documents), (validation, held_out)):
        if part is not None and next(iter(part), None) is None:
            raise UserError(f"{option} {path}: there is no document in {folder}; give files with text in them.")
    files = documents.files + (held_out.files if held_out else ())
    root = path if path.is_dir() else path.parent
    signature = tuple((file.relative_to(root).as_posix(), file.stat().st_size) for file in files)
    stamp = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return Source(str(path), documents, held_out, streamed=False, signature=signature, stamp=stamp)


def find_files(path: Path, option: str = "--dataset") -> tuple[Path, ...]:
    """`path` itself, or the readable files anywhere below it sorted by relative name. UserError where there is none."""
    if not path.exists():
        raise UserError(f"{option} {path}: there is no such file or folder; give an existing one.")
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise UserError(f"{option} {path}: this kind of file is not known; give a file ending in {', '.join(ENDINGS)}.")
        return (path,)
    relative = (file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.name.endswith(ENDINGS))
    # Hidden files and folders are other programs' notes (.ipynb_checkpoints, ._copies), not corpus.
    found = sorted((file for file in relative if not any(part.startswith(".") for part in file.parts)), key=lambda file: file.as_posix())
    if not found:
        raise UserError(f"{option} {path}: the folder holds no readable file; put files ending in {', '.join(ENDINGS)} there.")
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
        raise UserError(f"{path} cannot be read to its end ({reason}): it is broken or cut short; fetch it again.") from error


def _open_text(path: Path) -> io.TextIOBase:
    encoding = "utf-8-sig"  # reads plain UTF-8 as well, and drops the mark that some editors put first
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding)
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding=encoding)
    if path.suffix == ".zst":
        import pyarrow

        # Not zstandard's reader: that one takes a file cut short for one that ends there, and loses documents without a word.
        return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), encoding=encoding)
    return open(path, encoding=encoding)


class _Bytes(io.RawIOBase):
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
    return io.TextIOWrapper(io.BufferedReader(_Bytes(path, *part), buffer_size=2**20), encoding=encoding)


def _json_texts(path: Path, part: tuple[int, int] | None) -> Iterator[str]:
    with _open_part(path, part) if part else _open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise _bad_line(path, part, number, f"not valid JSON ({error}); write an object with a string `text` a line") from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise _bad_line(path, part, number, "no string in a field `text`; write one object with a string `text` a line")
            yield _without_lone_surrogates(text)


def _bad_line(path: Path, part: tuple[int, int] | None, number: int, complaint: str) -> UserError:
    """The error for the line that is `number` of its part, with its number in the file."""
    if part and part[0]:
        with _open_part(path, (0, part[0])) as lines:
            number += sum(1 for _ in lines)
    return UserError(f"{path}, line {number}: {complaint}.")


def _plain_texts(path: Path) -> Iterator[str]:
    with _open_text(path) as lines:
        # A blank line counts only between text: one at the end of the file separates nothing.
        blank = itertools.dropwhile(str.strip, itertools.dropwhile(lambda line: not line.strip(), lines))
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
                raise UserError(f"{path}: no column `text` among {columns}; rename the one that holds the text to `text`.")
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    if not isinstance(text, str):
                        raise UserError(f"{path}, row {row}: `text` holds no string; remove the row or fill it.")
                    yield text
                    row += 1
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} cannot be read as parquet ({error}): it is broken or cut short; fetch it again.") from error


def _without_lone_surrogates(text: str) -> str:
    """JSON may escape half a surrogate pair; no UTF-8 encoder, hash or tokenizer takes it."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ------------------------------------------------------------------------------------------------------------------------- C4


@dataclass(frozen=True)
class C4Documents:
    """C4 `en`, read as it is needed: from the Hub (`folder` None) or from a local mirror of its repository.

    The shards come in an order drawn from `seed` (None: as numbered), the documents of a shard in file order: C4 is shuffled
    already, and a shuffle buffer could not be restarted at an exact document.
    """

    folder: Path | None
    split: str
    seed: int | None

    @property
    def remote(self) -> bool:
        return self.folder is None

    @functools.cached_property  # once, also for the processes that this is pickled for: each would ask the Hub for a thousand files
    def stream(self):
        """The split as a `datasets.IterableDataset`. UserError where the Hub (or the mirror) cannot be read."""
        import datasets

        try:
            if self.folder is None:
                return datasets.load_dataset(C4, "en", split=self.split, streaming=True)
            files = [str(file) for file in mirror_files(self.folder, self.split)]
            return datasets.load_dataset("json", data_files={self.split: files}, split=self.split, streaming=True)
        except _stream_errors() as error:
            raise self._failure(error, "be opened") from error

    @property
    def n_shards(self) -> int:
        return self.stream.num_shards

    def __iter__(self) -> Iterator[str]:
        for shard in range(self.n_shards):
            yield from read_patiently(self, shard)

    def read(self, shard: int, skip: int) -> Iterator[str]:
        """The documents of the shard that comes at this place of the order, without the first `skip`.

        Raises UserError for a broken file or record; what the network is to blame for is raised as it is.
        """
        number = self._order[shard]
        try:
            part = self.stream.shard(num_shards=self.n_shards, index=number).select_columns(["text"]).with_format("arrow")
            # `iter`, not `__iter__`: the latter divides the shards once more among the workers of a torch DataLoader.
            for batch in part.iter(batch_size=1000):
                texts = batch["text"].to_pylist()
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError("a record without a string `text`")
                filled = [text for text in texts if text.strip()]
                yield from filled[skip:]
                skip = max(skip - len(filled), 0)
        except _stream_errors() as error:
            if self.remote and isinstance(error, network_errors()):
                raise
            raise self._failure(error, f"be read to the end of shard {number}") from error

    @functools.cached_property
    def _order(self) -> list[int]:
        import numpy as np

        shards = np.arange(self.n_shards)
        if self.seed is not None:
            shards = np.random.Generator(np.random.PCG64(self.seed)).permutation(shards)
        return shards.tolist()

    def _failure(self, error: Exception, what: str) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        if self.folder is None:
            return UserError(
                f"The Hugging Face Hub could not be reached for {C4} ({reason}); connect to the network, "
                "or type `--dataset pydocs` or `--dataset FILE` instead."
            )
        return UserError(f"The {self.split} split of the C4 mirror {self.folder} could not {what} ({reason}); fetch that file again.")


def _stream_errors() -> tuple[type[Exception], ...]:
    """What `datasets` lets through when the network, a compressed file or a record is broken."""
    import datasets

    return (*network_errors(), ValueError, KeyError, datasets.exceptions.DatasetsError)


def mirror_files(folder: Path, split: str) -> list[Path]:
    """The shards of one split of a local mirror of the C4 repository, as numbered. UserError where it has none."""
    files = sorted((folder / "en").glob(f"c4-{split}.*.json.gz"))
    if not files:
        raise UserError(f"The C4 mirror {folder} has no en/c4-{split}.*.json.gz; fetch them too, or give `--validation_file FILE`.")
    return files


def open_c4(folder: Path | None, seed: int) -> Source:
    """C4 from the Hub (`folder` None) or a mirror. UserError where the training split cannot be opened."""
    train, validation = C4Documents(folder, "train", seed), C4Documents(folder, "validation", None)
    train.stream  # noqa: B018 - opens it
    if folder is None:
        signature = stamp = ((f"{C4}/en", 0),)
        return Source("c4", train, validation, streamed=True, signature=signature, stamp=stamp)
    files = mirror_files(folder, "train") + sorted((folder / "en").glob("c4-validation.*.json.gz"))
    signature = tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in files)
    stamp = tuple((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return Source(str(folder), train, validation, streamed=True, signature=signature, stamp=stamp)


# --------------------------------------------------------------------------------------------------------------------- pydocs


def open_pydocs(cache: Path, packages: tuple[str, ...] | None = None) -> Source:
    """The docstrings of the installed `packages` (default `PYDOCS_PACKAGES`), gathered at the first call and cached in `cache`.

    Packages that are not installed are left out. Raises UserError where none of them has a docstring.
    """
    versions = package_versions(PYDOCS_PACKAGES if packages is None else packages)
    key = hashlib.blake2b(json.dumps([PYDOCS_FORMAT, versions]).encode(), digest_size=6).hexdigest()
    path = cache / f"pydocs-{key}.jsonl.gz"
    if not path.exists():
        _gather(versions, path)
    documents = FileDocuments((path,))
    if next(iter(documents), None) is None:
        raise UserError(f"None of {', '.join(versions) or 'the packages of pydocs'} has docstrings to read; give `--dataset FILE` instead.")
    # The packed size depends on the zlib in use, the versions in the name do not.
    return Source("pydocs", documents, None, streamed=False, signature=((path.name, 0),), stamp=((str(path), path.stat().st_size),))


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed ones among `packages` with their versions; `stdlib`, and single modules of it, have Python's."""
    versions = {}
    for package in packages:
        if package != "stdlib" and importlib.util.find_spec(package) is None:
            continue
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = platform.python_version()
    return versions


def package_files(package: str) -> list[Path]:
    """The Python files of a package (or of `stdlib`), found without importing it, sorted by name; test folders are left out."""
    if package == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
    else:
        spec = importlib.util.find_spec(package)
        if not spec.submodule_search_locations:
            return [Path(spec.origin)] if spec.has_location else []
        root = Path(next(iter(spec.submodule_search_locations)))
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    return [root / file for file in sorted(files, key=lambda file: file.as_posix()) if left_out.isdisjoint(file.parts)]


def docstrings(path: Path) -> list[str]:
    """The docstrings of one Python file, in the order of `ast.walk`; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented))
    cleaned = (_without_lone_surrogates(inspect.cleandoc(text).strip()) for text in found if text)
    return [text for text in cleaned if len(text) >= SHORTEST_DOCSTRING]


def _gather(packages: Iterable[str], path: Path) -> None:
    from loguru import logger

    files = [file for package in packages for file in package_files(package)]
    logger.info(f"Gathering the docstrings of {len(files):,} files of {', '.join(packages)} (once, about half a minute)")
    seen: set[str] = set()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        # A fixed time in the header makes equal contents equal files.
        with os.fdopen(handle, "wb") as raw, gzip.GzipFile(fileobj=raw, filename="", mode="wb", mtime=0) as packed:
            # Spawned, because this process may hold threads that do not survive a fork.
            with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")) as pool:
                for text in itertools.chain.from_iterable(pool.map(docstrings, files, chunksize=64)):
                    if text not in seen:
                        seen.add(text)
                        packed.write((json.dumps({"text": text}) + "\n").encode())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


# ---------------------------------------------------------------------------------------------------------- training/validation


@dataclass(frozen=True)
class Filtered:
    """The documents for which `keep` is true, in their order and in the same shards."""

    documents: Shards
    keep: Callable[[str], bool]

    def __iter__(self) -> Iterator[str]:
        return filter(self.keep, iter(self.documents))

    @property
    def n_shards(self) -> int:
        return self.documents.n_shards

    @property
    def remote(self) -> bool:
        return self.documents.remote

    def read(self, shard: int, skip: int) -> Iterator[str]:
        return itertools.islice(filter(self.keep, self.documents.read(shard, 0)), skip, None)


def digest(text: str) -> bytes:
    """Sixteen bytes that stand for a document's text, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def in_share(text: str, share: float, inside: bool = True) -> bool:
    """Whether the hash of a document puts it into (or, with `inside` False, outside) a given share of all documents."""
    return (int.from_bytes(digest(text)[:8], "big") < share * 2**64) == inside


def _not_among(text: str, digests: frozenset[bytes]) -> bool:
    return digest(text) not in digests


def split_documents(source: Source, validation_file: str | None = None, share: float = HELD_OUT_SHARE) -> Split:
    """Parts a source into training and validation documents that have no text in common.

    A validation file goes before the source's own split, and that before a share of the documents chosen by their hash.
    Raises UserError where the validation file cannot be read.
    """
    if validation_file is not None:
        own = open_files(Path(validation_file).expanduser(), "--validation_file")
        digests = frozenset(map(digest, own.train))
        train = Filtered(source.train, functools.partial(_not_among, digests=digests))
        return Split(train, own.train, ("file", own.signature), own.stamp)
    if source.validation is None:
        kept, held_out = (functools.partial(in_share, share=share, inside=inside) for inside in (False, True))
        return Split(Filtered(source.train, kept), Filtered(source.train, held_out), ("hash", share))
    if source.streamed:
        return Split(source.train, source.validation, ("own",))  # C4's published split, as it is
    digests = frozenset(map(digest, source.validation))
    return Split(Filtered(source.train, functools.partial(_not_among, digests=digests)), source.validation, ("own",))


def empty_split_error(empty: str, name: str, rule: Sequence) -> UserError:
    """What to say where the `training` or `validation` set of the source of that name, parted by that rule, holds nothing."""
    if rule[0] == "hash":
        share = f"{rule[1]:.0%} of its documents"
        return UserError(f"{name} is too small to hold out {share}: the {empty} set is empty; give `--validation_file FILE`.")
    if empty == "training":
        return UserError(f"Every training document of {name} is in the validation set too; give another `--validation_file`.")
    return UserError(f"The tokenizer makes nothing of the validation set of {name}; give another `--validation_file`.")
