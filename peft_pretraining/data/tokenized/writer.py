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
import hashlib
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from peft_pretraining.data.sequences import offsets_of, token_dtype
from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.split import Split, empty_split_error
from peft_pretraining.data.tokenized.format import (
    BLOCK,
    FORMAT,
    INDEX,
    JOURNAL,
    LOCK,
    PREPARE_AGAIN,
    SHARD_TOKENS,
    TOKENIZER,
    file_hashes,
    read_json_with_checksum,
    write_json_with_checksum,
)
from peft_pretraining.data.tokenized.reader import open_shard
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.tokenizer_pool import Encoded, encoding
from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import atomic_write, fsync_path

PUBLISHED_LENGTH = (
    256  # the row length by which `target_eval_tokens` counts: that of the run is not known yet
)


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
    described = {
        name: getattr(tokenizer, name)
        for name in ("name", "content_hash", "vocab_size", "eos_id", "pad_id")
    }
    settings = {
        "format": FORMAT, "tokenizer": described, "dtype": token_dtype(tokenizer.vocab_size).str, "source": source.name,
        "signature": source.signature, "stamp": [source.stamp, split.stamp], "split_rule": split.rule, "shard_tokens": shard_tokens,
        "max_tokens": max_tokens, "target_eval_tokens": target_eval_tokens, "seed": seed if source.streamed else None,
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive_lock(folder):
            settings = _begin(folder, settings)
            files = _save_tokenizer(tokenizer, folder)
            with encoding(tokenizer, processes) as encode:
                preparation = _Preparation(
                    folder, encode, token_dtype(tokenizer.vocab_size), shard_tokens
                )
                splits = {
                    "validation": preparation.split(
                        "validation", split.validation, Limits(targets=target_eval_tokens)
                    ),
                    "train": preparation.split("train", split.train, Limits(tokens=max_tokens)),
                }
            _check_not_empty(splits, source.name, split.rule, max_tokens)
            write_json_with_checksum(
                folder / INDEX, {**settings, "tokenizer_files": files, "splits": splits}
            )
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{folder} cannot be written ({reason}): put that right and start again, it goes on where it stopped."
        ) from error
    return preparation.tokens_made


def _check_not_empty(
    splits: dict[str, list], name: str, rule: tuple, max_tokens: int | None
) -> None:
    if not splits["train"] and max_tokens is not None:
        raise UserError(
            f"--max_tokens {max_tokens} is less than the first training document of {name}; give more."
        )
    for split, empty in (("train", "training"), ("validation", "validation")):
        if not splits[split]:
            raise empty_split_error(empty, name, rule)


@contextlib.contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
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
    if noted is None and any(
        path.name != LOCK and path.suffix != ".tmp" for path in folder.iterdir()
    ):
        raise UserError(
            f"{folder} holds files of something else: give an --output that is new or empty."
        )
    if noted is not None:
        before = read_json_with_checksum(noted, f"delete {folder} and start again")
        other = [
            name
            for name in settings
            if _comparable_setting(before, name) != _comparable_setting(settings, name)
        ]
        if other:
            names = ", ".join(
                "state of the source's files" if name == "stamp" else name for name in other
            )
            raise UserError(
                f"{folder} was begun with another {names}: give another --output, or delete that folder."
            )
        settings = {name: before[name] for name in settings}
    write_json_with_checksum(folder / JOURNAL, settings)
    return settings


def _comparable_setting(settings: dict, name: str) -> object:
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
    files = file_hashes(new)
    if place.is_dir() and file_hashes(place) == files:
        shutil.rmtree(new)
        return files
    for path in new.iterdir():
        fsync_path(path)
    shutil.rmtree(place, ignore_errors=True)
    os.rename(new, place)
    fsync_path(folder)
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
                making = making or self._make(
                    name, documents, End(*records[-1]["end"]) if records else End(), limits
                )
                shard = next(making, None)
                if shard is None:
                    break
                record = self._store(base, shard)
            records.append(record)
        return records

    def _known_shards(self, name: str) -> int | None:
        """The number of shards of a split where the preparation has come to its end before: the documents need not be read for it."""
        try:
            return len(read_json_with_checksum(self.folder / INDEX, PREPARE_AGAIN)["splits"][name])
        except UserError:
            return None

    def _whole(self, base: str) -> dict | None:
        """The record of a shard every byte of which is as it was written; None for one that is not."""
        try:
            record = read_json_with_checksum(self.folder / f"{base}.json", PREPARE_AGAIN)
            shard = open_shard(self.folder, record, self.dtype, PREPARE_AGAIN)
            shard.read(0, len(shard.tokens))
        except UserError:
            return None
        return record

    def _make(
        self, name: str, documents: Iterable[str], end: End, limits: Limits
    ) -> Iterator[NewShard]:
        """The shards from where the last one ended, cut after the first document that fills them."""
        from loguru import logger
        from tqdm import tqdm

        logger.info(
            f"Tokenising the {name} documents{f' from document {end.read:,} on' if end.read else ''} into {self.folder}"
        )
        batches = self.encode(itertools.islice(documents, end.read, None))
        bar = tqdm(
            desc=f"tokenising {name}",
            unit=" tokens",
            unit_scale=True,
            initial=end.tokens,
            disable=None,
        )  # None: only on terminals
        with (
            bar,
            contextlib.closing(
                _cut(self._watched(batches, bar), end, limits, self.shard_tokens)
            ) as shards,
        ):
            yield from shards

    def _watched(self, batches: Encoded, bar) -> Encoded:
        for tokens, lengths in batches:
            bar.update(len(tokens))
            yield tokens.astype(self.dtype), lengths

    def _store(self, base: str, shard: NewShard) -> dict:
        """Writes the files of a shard, and then the record that makes it one."""
        data = shard.tokens.view(np.uint8).data
        step = BLOCK * shard.tokens.itemsize
        checksums = np.array(
            [zlib.crc32(data[i : i + step]) for i in range(0, len(data), step)], "<u4"
        )
        offsets = shard.offsets.astype("<i8")
        for kind, array in (("tokens", shard.tokens), ("offsets", offsets), ("crc", checksums)):
            atomic_write(self.folder / f"{base}.{kind}", array)
        record = {
            "name": base, "documents": len(offsets) - 1, "tokens": len(shard.tokens), "end": list(shard.end),
            "sha256": {"offsets": hashlib.sha256(offsets).hexdigest(), "crc": hashlib.sha256(checksums).hexdigest()},
        }  # fmt: skip
        write_json_with_checksum(self.folder / f"{base}.json", record)
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
    tokens = np.concatenate(documents).astype(
        documents[0].dtype, copy=False
    )  # concatenation forgets the byte order
    return NewShard(
        tokens, offsets_of(np.fromiter(map(len, documents), np.int64, len(documents))), end
    )
