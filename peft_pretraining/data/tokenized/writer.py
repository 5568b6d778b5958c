"""Prepared data: documents tokenised once and kept in a folder, from which any run reads its rows by index.

    index.json          what was prepared from what: tokenizer, source, split, shards; written last, so that without it nothing is whole
    preparation.json    the same but for the shards, written first: what an interrupted preparation must have in common with its next
    tokenizer/          as transformers saves it
    train-00000.tokens  whole documents one after another, each ending in the end-of-sequence id: uint16, or int32 for large vocabularies
    train-00000.offsets where each document begins, and where the last one ends: int64
    train-00000.crc     a CRC-32 of every 1,024 tokens: uint32
    train-00000.json    the sizes of the three, and SHA-256 of the two small ones; a shard without it is not whole

All numbers are little-endian. What is read is checked first: JSON files carry a checksum of their own content, small files are checked
when the folder is opened, tokens each time they are read.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from peft_pretraining.data.tokenizer_pool import Encoded, encoding
from peft_pretraining.errors import UserError
from peft_pretraining.data.sequences import Packing, Rows, Shard, offsets_of, token_dtype
from peft_pretraining.data.sources.files import Source, Split, empty_split_error
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer


FORMAT = 1  # raise it when what is stored changes
BLOCK = 1024  # tokens under one CRC-32: a row of 256 reads 2 or 4 KB to be checked
SHARD_TOKENS = 2**26  # 128 MB, which is also what a preparation holds in memory and what a killed one loses at most
PUBLISHED_LENGTH = 256  # the row length by which `target_eval_tokens` counts: that of the run is not known yet
INDEX, JOURNAL, LOCK, TOKENIZER = "index.json", "preparation.json", ".lock", "tokenizer"
PREPARE_AGAIN = "run the prepare command again: it makes what is damaged anew"


def is_prepared(folder: Path) -> bool:
    """Whether a folder was made by `prepare`, to its end or not."""
    return (folder / JOURNAL).is_file() or (folder / INDEX).is_file() and (folder / TOKENIZER).is_dir()


# --------------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class CheckedShard(Shard):
    """A shard on disk, memory-mapped; `checksums` (uint32) has one for every `BLOCK` tokens, `remedy` says what to do about damage."""

    checksums: np.ndarray
    path: Path
    remedy: str

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop). Raises UserError where a block that they touch is not as it was written."""
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if zlib.crc32(self._bytes[block * self._block_bytes : (block + 1) * self._block_bytes]) != self._expected[block]:
                raise _damaged(self.path, f"tokens from {block * BLOCK:,} on are not as they were written", self.remedy)
        return self.tokens[start:stop]

    # Views that Python reads an item of in 50 nanoseconds, which NumPy takes several times as long for.

    @functools.cached_property
    def _bytes(self) -> memoryview:
        return self.tokens.view(np.uint8).data

    @functools.cached_property
    def _expected(self) -> memoryview:
        return self.checksums.astype(np.uint32).data

    @functools.cached_property
    def _block_bytes(self) -> int:
        return BLOCK * self.tokens.itemsize


@dataclass(frozen=True)
class Prepared:
    """A finished folder. `index` is the content of its index.json; `remedy` ends the sentence about anything damaged in it."""

    folder: Path
    index: dict
    remedy: str

    def rows(self, split: str, max_length: int, packing: Packing = False) -> Rows:
        """The rows of `train` or `validation`. Raises UserError where a file is missing or damaged."""
        dtype = token_dtype(self.index["tokenizer"]["vocab_size"])
        shards = tuple(_open_shard(self.folder, record, dtype, self.remedy) for record in self.index["splits"][split])
        return Rows(shards, max_length, self.index["tokenizer"]["pad_id"], self.index["tokenizer"]["eos_id"], packing)

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """The tokenizer of the data, for a model with `vocab_size` embeddings.

        Raises UserError for fewer than it was prepared for, and where it is damaged or encodes otherwise than it did.
        """
        stored, folder = self.index["tokenizer"], self.folder / TOKENIZER
        if vocab_size < stored["vocab_size"]:
            raise UserError(
                f"{self.folder} was prepared for a vocab_size of {stored['vocab_size']}, the model's is {vocab_size}; "
                f"give a model config with {stored['vocab_size']} or more, or prepare the data anew with --vocab_size {vocab_size}."
            )
        try:
            found = _file_hashes(folder)
        except OSError as error:
            raise _damaged(folder, error.strerror, self.remedy) from error
        for name in sorted(found.keys() | self.index["tokenizer_files"].keys()):
            if found.get(name) != self.index["tokenizer_files"].get(name):
                raise _damaged(folder / name, "it is not the file that was written", self.remedy)
        tokenizer = load_tokenizer(str(folder), stored["vocab_size"], (), folder, "")
        if tokenizer.content_hash != stored["content_hash"]:
            raise UserError(
                f"The tokenizer in {folder} encodes otherwise than when the data was prepared: "
                "install the versions of transformers and tokenizers of that time, or prepare the data anew."
            )
        return replace(tokenizer, name=stored["name"], vocab_size=vocab_size)


def open_prepared(folder: Path, remedy: str = PREPARE_AGAIN) -> Prepared:
    """Opens a folder that `prepare` has finished. Raises UserError where it has not, or where its index is damaged."""
    path = folder / INDEX
    if not path.exists():
        raise UserError(f"{folder} is not prepared to its end ({INDEX} is missing): run the prepare command again, it goes on from there.")
    index = _read_sealed(path, remedy)
    if index["format"] != FORMAT:
        raise UserError(f"{folder} has format {index['format']}, this version reads format {FORMAT}; prepare the data anew.")
    return Prepared(folder, index, remedy)


def _open_shard(folder: Path, record: dict, dtype: np.dtype, remedy: str) -> CheckedShard:
    base, blocks = f"{folder}/{record['name']}", -(-record["tokens"] // BLOCK)
    offsets = _map(Path(f"{base}.offsets"), record["documents"] + 1, np.dtype("<i8"), remedy)
    checksums = _map(Path(f"{base}.crc"), blocks, np.dtype("<u4"), remedy)
    path = Path(f"{base}.tokens")
    tokens = _map(path, record["tokens"], dtype, remedy)
    for kind, array in (("offsets", offsets), ("crc", checksums)):
        if hashlib.sha256(array).hexdigest() != record["sha256"][kind]:
            raise _damaged(Path(f"{base}.{kind}"), "it is not the file that was written", remedy)
    return CheckedShard(tokens, offsets, checksums, path, remedy)


def _map(path: Path, count: int, dtype: np.dtype, remedy: str) -> np.ndarray:
    """A file of `count` numbers in memory as far as it is read. torch's mapping needs no open file, of which a process may have few."""
    size = count * dtype.itemsize
    try:
        found = path.stat().st_size
        if found != size:
            raise _damaged(path, f"it has {found:,} bytes instead of {size:,}", remedy)
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy().view(dtype)
    except FileNotFoundError as error:
        raise _damaged(path, "it is missing", remedy) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: torch could not open or map it
        raise _damaged(path, " ".join(str(error).split()), remedy) from error


def _damaged(path: Path, what: str, remedy: str) -> UserError:
    return UserError(f"{path} is damaged ({what}): {remedy}.")


def _write_sealed(path: Path, content: dict) -> None:
    """Writes a dictionary as JSON with a checksum of its content and its name: one file in the place of another is damage too."""
    _write(path, (json.dumps({**content, "checksum": _checksum(path.name, content)}, indent=1) + "\n").encode())


def _read_sealed(path: Path, remedy: str) -> dict:
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        whole = checksum == _checksum(path.name, content)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:  # whatever garbage leads to
        raise _damaged(path, "it cannot be read", remedy) from error
    if not whole:
        raise _damaged(path, "its content is not what was written", remedy)
    return content


def _checksum(name: str, content: dict) -> str:
    return hashlib.sha256(json.dumps([name, content], sort_keys=True).encode()).hexdigest()


def _file_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --------------------------------------------------------------------------------------------------------------------- writing


class End(NamedTuple):
    """How far a split has come with a shard: documents of the source read, tokens kept, targets in rows of `PUBLISHED_LENGTH`."""

    read: int = 0
    tokens: int = 0
    targets: int = 0


class Limits(NamedTuple):
    """Where a split ends before its documents do: with the last document that stays within `tokens`, and with the first one that
    brings it to `targets` (None: no limit)."""

    tokens: int | None = None
    targets: int | None = None


class NewShard(NamedTuple):
    tokens: np.ndarray  # as it is stored
    offsets: np.ndarray  # int64 [documents + 1]
    end: End


def prepare(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    target_eval_tokens: int | None = None,
    seed: int | None = None,
) -> int:
    """Tokenises both sets of documents into `folder`; what is there already and whole is kept. Returns the tokens it tokenised.

    `max_tokens` bounds the training set; `target_eval_tokens` the validation set, to the fewest documents that hold as many targets in
    rows of 256; `seed` is what a streamed source was ordered by. Documents that the tokenizer makes nothing of are dropped. The files
    are the same bytes for any number of `processes`, and however often it was killed and called again. A second process that prepares
    the same folder waits for the first. Raises UserError where the folder holds anything else or cannot be written.
    """
    described = {name: getattr(tokenizer, name) for name in ("name", "content_hash", "vocab_size", "eos_id", "pad_id")}
    settings = {
        "format": FORMAT, "tokenizer": described, "dtype": token_dtype(tokenizer.vocab_size).str, "source": source.name,
        "signature": source.signature, "stamp": [source.stamp, split.stamp], "split_rule": split.rule, "shard_tokens": shard_tokens,
        "max_tokens": max_tokens, "target_eval_tokens": target_eval_tokens, "seed": seed if source.streamed else None,
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _only_one(folder):
            settings = _begin(folder, settings)
            files = _save_tokenizer(tokenizer, folder)
            with encoding(tokenizer, processes) as encode:
                preparation = _Preparation(folder, encode, token_dtype(tokenizer.vocab_size), shard_tokens)
                splits = {
                    "validation": preparation.split("validation", split.validation, Limits(targets=target_eval_tokens)),
                    "train": preparation.split("train", split.train, Limits(tokens=max_tokens)),
                }
            _check_not_empty(splits, source.name, split.rule, max_tokens)
            _write_sealed(folder / INDEX, {**settings, "tokenizer_files": files, "splits": splits})
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder} cannot be written ({reason}): put that right and start again, it goes on where it stopped.") from error
    return preparation.tokens_made


def _check_not_empty(splits: dict[str, list], name: str, rule: tuple, max_tokens: int | None) -> None:
    if not splits["train"] and max_tokens is not None:
        raise UserError(f"--max_tokens {max_tokens} is less than the first training document of {name}; give more.")
    for split, empty in (("train", "training"), ("validation", "validation")):
        if not splits[split]:
            raise empty_split_error(empty, name, rule)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """The system gives the lock back when a process dies, however it dies."""
    import fcntl

    from loguru import logger

    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(f"Waiting for another process that prepares {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _begin(folder: Path, settings: dict) -> dict:
    """The settings with which the folder was begun, which is now where it is new. UserError where it holds anything else."""
    noted = next((folder / name for name in (JOURNAL, INDEX) if (folder / name).exists()), None)
    if noted is None and any(path.name != LOCK and path.suffix != ".tmp" for path in folder.iterdir()):
        raise UserError(f"{folder} holds files of something else: give an --output that is new or empty.")
    if noted is not None:
        before = _read_sealed(noted, f"delete {folder} and start again")
        other = [name for name in settings if _essence(before, name) != _essence(settings, name)]
        if other:
            names = ", ".join("state of the source's files" if name == "stamp" else name for name in other)
            raise UserError(f"{folder} was begun with another {names}: give another --output, or delete that folder.")
        settings = {name: before[name] for name in settings}
    _write_sealed(folder / JOURNAL, settings)
    return settings


def _essence(settings: dict, name: str) -> object:
    """A setting without the names by which the user called the same source or tokenizer."""
    value = settings.get(name)
    if name == "tokenizer":
        return {key: part for key, part in value.items() if key != "name"}
    return None if name == "source" else value


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """Saves the tokenizer, unless it is there as it should be; returns the SHA-256 of its files."""
    new, place = folder / f"{TOKENIZER}.tmp", folder / TOKENIZER
    shutil.rmtree(new, ignore_errors=True)
    tokenizer.hf.save_pretrained(new)
    files = _file_hashes(new)
    if place.is_dir() and _file_hashes(place) == files:
        shutil.rmtree(new)
        return files
    for path in new.iterdir():
        _sync(path)
    shutil.rmtree(place, ignore_errors=True)
    os.rename(new, place)
    _sync(folder)
    return files


@dataclass
class _Preparation:
    """Makes the shards that a folder lacks; counts the tokens of those."""

    folder: Path
    encode: Callable[[Iterable[str]], Encoded]
    dtype: np.dtype
    shard_tokens: int
    tokens_made: int = 0

    def split(self, name: str, documents: Iterable[str], limits: Limits) -> list[dict]:
        """The records of all shards of one set of documents, made as far as they are not there or not whole."""
        records, making = [], None
        known = self._known_shards(name)
        while len(records) != known:
            base = f"{name}-{len(records):05d}"
            record = self._whole(base)
            if record is not None:
                making = None  # what comes after it is made from where it ends
            else:
                making = making or self._make(name, documents, End(*records[-1]["end"]) if records else End(), limits)
                shard = next(making, None)
                if shard is None:
                    break
                record = self._store(base, shard)
            records.append(record)
        return records

    def _known_shards(self, name: str) -> int | None:
        """The number of shards of a split where the preparation has come to its end before: the documents need not be read for it."""
        try:
            return len(_read_sealed(self.folder / INDEX, PREPARE_AGAIN)["splits"][name])
        except UserError:
            return None

    def _whole(self, base: str) -> dict | None:
        """The record of a shard every byte of which is as it was written; None for one that is not."""
        try:
            record = _read_sealed(self.folder / f"{base}.json", PREPARE_AGAIN)
            shard = _open_shard(self.folder, record, self.dtype, PREPARE_AGAIN)
            shard.read(0, len(shard.tokens))
        except UserError:
            return None
        return record

    def _make(self, name: str, documents: Iterable[str], end: End, limits: Limits) -> Iterator[NewShard]:
        """The shards from where the last one ended, cut after the first document that fills them."""
        from loguru import logger
        from tqdm import tqdm

        logger.info(f"Tokenising the {name} documents{f' from document {end.read:,} on' if end.read else ''} into {self.folder}")
        batches = self.encode(itertools.islice(documents, end.read, None))
        bar = tqdm(desc=f"tokenising {name}", unit=" tokens", unit_scale=True, initial=end.tokens, disable=None)  # None: only on terminals
        with bar, contextlib.closing(_cut(self._watched(batches, bar), end, limits, self.shard_tokens)) as shards:
            yield from shards

    def _watched(self, batches: Encoded, bar) -> Encoded:
        for tokens, lengths in batches:
            bar.update(len(tokens))
            yield tokens.astype(self.dtype), lengths

    def _store(self, base: str, shard: NewShard) -> dict:
        """Writes the files of a shard, and then the record that makes it one."""
        data = shard.tokens.view(np.uint8).data
        step = BLOCK * shard.tokens.itemsize
        checksums = np.array([zlib.crc32(data[i : i + step]) for i in range(0, len(data), step)], "<u4")
        offsets = shard.offsets.astype("<i8")
        for kind, array in (("tokens", shard.tokens), ("offsets", offsets), ("crc", checksums)):
            _write(self.folder / f"{base}.{kind}", array)
        record = {
            "name": base, "documents": len(offsets) - 1, "tokens": len(shard.tokens), "end": list(shard.end),
            "sha256": {"offsets": hashlib.sha256(offsets).hexdigest(), "crc": hashlib.sha256(checksums).hexdigest()},
        }  # fmt: skip
        _write_sealed(self.folder / f"{base}.json", record)
        self.tokens_made += len(shard.tokens)
        return record


def _cut(batches: Encoded, end: End, limits: Limits, shard_tokens: int) -> Iterator[NewShard]:
    """Shards of encoded documents, from `end` on."""
    documents, held = [], 0
    for length, tokens in _documents(batches):
        if limits.targets is not None and end.targets >= limits.targets:
            break
        if limits.tokens is not None and end.tokens + length > limits.tokens:
            break
        end = End(end.read + 1, end.tokens, end.targets)
        if length == 1:  # only its end: the tokenizer makes nothing of it
            continue
        documents.append(tokens)
        held += length
        end = End(end.read, end.tokens + length, end.targets + min(length, PUBLISHED_LENGTH) - 1)
        if held >= shard_tokens:
            yield _shard(documents, end)
            documents, held = [], 0
    if documents:
        yield _shard(documents, end)


def _documents(batches: Encoded) -> Iterator[tuple[int, np.ndarray]]:
    for tokens, lengths in batches:
        for length, stop in zip(lengths.tolist(), np.cumsum(lengths).tolist(), strict=True):
            yield length, tokens[stop - length : stop]


def _shard(documents: list[np.ndarray], end: End) -> NewShard:
    tokens = np.concatenate(documents).astype(documents[0].dtype, copy=False)  # concatenation forgets the byte order
    return NewShard(tokens, offsets_of(np.fromiter(map(len, documents), np.int64, len(documents))), end)


def _write(path: Path, data: bytes | np.ndarray) -> None:
    """Writes a file that is whole as soon as it has its name, even where the machine stops at any moment."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
