"""Write tokenized data: documents are tokenized once into a folder, for any number of runs.

    index.json           what was prepared from what: tokenizer, source, split, shards. Written
                         last: a folder without index.json is incomplete.
    preparation.json     the same without the shards. Written first: an interrupted preparation is
                         continued only with the same settings.
    tokenizer/           as transformers saves it
    train-00000.tokens   documents one after another, each followed by the end-of-sequence token:
                         uint16, or int32 for vocabularies of more than 65,536 ids
    train-00000.offsets  where each document begins, and where the last one ends: int64
    train-00000.crc      CRC-32 of every 1,024 tokens: uint32
    train-00000.json     sizes of these files and SHA-256 of the two small ones. Written last: a
                         shard without it is incomplete.

All numbers are little-endian. Everything is verified when it is read: JSON files contain a checksum
of their own content, small files are verified when the folder is opened, and tokens whenever they
are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from peft_pretraining.data.sequences import document_offsets, token_dtype
from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.split import Split, empty_split_error
from peft_pretraining.data.tokenized.format import (
    CHECKSUM_BLOCK,
    FORMAT_VERSION,
    INDEX_FILE,
    LOCK_FILE,
    PREPARE_AGAIN,
    SETTINGS_FILE,
    SHARD_TOKENS,
    TOKENIZER_FOLDER,
    file_hashes,
    read_json_with_checksum,
    write_json_with_checksum,
)
from peft_pretraining.data.tokenized.reader import open_shard
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.tokenizer_pool import EncodedBatches, document_encoder
from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import (
    TEMPORARY_SUFFIX,
    atomic_write,
    exclusive_lock,
    reason_of,
    replace_directory,
)

if TYPE_CHECKING:
    from tqdm import tqdm

# Sequence length with which `target_eval_tokens` is counted: the published one, because the length
# of the runs that will use the data is not known yet.
PUBLISHED_LENGTH = 256


class SplitProgress(NamedTuple):
    """How much of a split has been tokenized at the end of a shard.

    Attributes:
        documents: Documents of the source that were read, with those that were dropped.
        tokens: Tokens that were stored.
        targets: Targets in sequences of `PUBLISHED_LENGTH` tokens.
    """

    documents: int = 0
    tokens: int = 0
    targets: int = 0


class SplitLimits(NamedTuple):
    """Where a split ends before its documents do. None: no limit.

    Attributes:
        tokens: Stop before the first document that would exceed this number of tokens.
        targets: Stop after the first document that reaches this number of targets.
    """

    tokens: int | None = None
    targets: int | None = None


class NewShard(NamedTuple):
    """A shard in memory: tokens as stored, offsets (int64 [documents + 1]), progress at its end."""

    tokens: np.ndarray
    offsets: np.ndarray
    end: SplitProgress


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
    """Tokenize the training and validation documents of a source into a folder.

    Shards that exist and are intact are kept. The files are the same bytes for any number of
    `processes`, and however often the preparation was killed and called again. A second process
    that prepares the same folder waits for the first. Documents that encode to no tokens are
    dropped.

    Args:
        source: The source.
        split: Its training and validation documents.
        tokenizer: The tokenizer.
        folder: The folder to write: new, empty, or begun with the same settings.
        processes: Number of tokenizing processes.
        shard_tokens: Tokens in a shard. A shard ends with the document that reaches this number.
        max_tokens: Use at most that many tokens for training. None: all. A folder that was prepared
            with a lower limit is continued.
        target_eval_tokens: Keep the fewest validation documents with that many targets in sequences
            of 256 tokens. None: keep all.
        seed: Seed of the order of a streamed source.

    Returns:
        The number of tokens that were tokenized now.

    Raises:
        UserError: The folder contains something else or cannot be written, or a set of documents is
            empty.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    tokenizer_settings = {
        name: getattr(tokenizer, name)
        for name in ("name", "content_hash", "vocab_size", "eos_id", "pad_id")
    }
    settings = {
        "format": FORMAT_VERSION,
        "tokenizer": tokenizer_settings,
        "dtype": dtype.str,
        "source": source.name,
        "signature": source.signature,
        "stamp": [source.file_identity, split.file_identity],
        "split_rule": split.rule,
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
        "target_eval_tokens": target_eval_tokens,
        "seed": seed if source.streamed else None,
    }
    settings = json.loads(json.dumps(settings))  # As it will be read back: tuples become lists.
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder / LOCK_FILE, on_wait=lambda: _log_waiting(folder)):
            settings = _start_or_resume(folder, settings)
            tokenizer_files = _save_tokenizer(tokenizer, folder)
            with document_encoder(tokenizer, processes) as encode:
                preparation = _Preparation(folder, encode, dtype, shard_tokens)
                splits = {
                    "validation": preparation.tokenize_split(
                        "validation", split.validation, SplitLimits(targets=target_eval_tokens)
                    ),
                    "train": preparation.tokenize_split(
                        "train", split.train, SplitLimits(tokens=max_tokens)
                    ),
                }
            _check_not_empty(splits, source.name, split.rule, max_tokens)
            index = {**settings, "tokenizer_files": tokenizer_files, "splits": splits}
            write_json_with_checksum(folder / INDEX_FILE, index)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({reason_of(error)}): fix that and start again, it goes "
            "on where it stopped."
        ) from error
    return preparation.new_tokens


def _log_waiting(folder: Path) -> None:
    from loguru import logger

    logger.info(f"Waiting for another process that prepares {folder}")


def _check_not_empty(
    splits: dict[str, list], name: str, rule: tuple, max_tokens: int | None
) -> None:
    if not splits["train"] and max_tokens is not None:
        raise UserError(
            f"--max_tokens {max_tokens} is less than the first training document of {name}; give "
            "more."
        )
    for split, empty in (("train", "training"), ("validation", "validation")):
        if not splits[split]:
            raise empty_split_error(empty, name, rule)


def _start_or_resume(folder: Path, settings: dict) -> dict:
    """Return the settings with which the folder was begun, and store them if it is new.

    Raises:
        UserError: The folder contains something else, or was begun with other settings.
    """
    stored = next(
        (folder / name for name in (SETTINGS_FILE, INDEX_FILE) if (folder / name).exists()), None
    )
    if stored is None:
        for path in folder.iterdir():
            if path.name != LOCK_FILE and path.suffix != TEMPORARY_SUFFIX:
                raise UserError(
                    f"{folder} holds files of something else: give an --output that is new or "
                    "empty."
                )
    else:
        before = read_json_with_checksum(stored, f"delete {folder} and start again")
        different = [
            name
            for name in settings
            if _comparable_setting(before, name) != _comparable_setting(settings, name)
        ]
        if different == ["max_tokens"] and _is_raised(before["max_tokens"], settings["max_tokens"]):
            _remove_cut_shard(folder, settings["shard_tokens"])
            settings = {name: before[name] for name in settings} | {
                "max_tokens": settings["max_tokens"]
            }
        elif different:
            names = ", ".join(
                "state of the source's files" if name == "stamp" else name for name in different
            )
            raise UserError(
                f"{folder} was begun with another {names}: give another --output, or delete that "
                "folder."
            )
        else:
            settings = {name: before[name] for name in settings}
    write_json_with_checksum(folder / SETTINGS_FILE, settings)
    return settings


def _is_raised(before: int | None, now: int | None) -> bool:
    """Return whether a limit is higher than before. None: no limit."""
    return before is not None and (now is None or now > before)


def _remove_cut_shard(folder: Path, shard_tokens: int) -> None:
    """Reopen a folder that ended at a lower limit of tokens.

    The limit may have cut the last training shard. It is made anew, so that the folder gets the
    same files as one that was prepared with the higher limit at once.
    """
    (folder / INDEX_FILE).unlink(missing_ok=True)
    records = sorted(folder.glob("train-*.json"))
    if records and read_json_with_checksum(records[-1], PREPARE_AGAIN)["tokens"] < shard_tokens:
        records[-1].unlink()


def _comparable_setting(settings: dict, name: str) -> object:
    """Return a setting without the user's name for the source or the tokenizer.

    The same source and the same tokenizer may be given by different names.
    """
    if name == "source":
        return None
    value = settings.get(name)
    if name == "tokenizer" and value is not None:
        return {key: part for key, part in value.items() if key != "name"}
    return value


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """Save the tokenizer unless it exists already, and return the SHA-256 of its files."""
    path = folder / TOKENIZER_FOLDER
    new = path.with_name(path.name + TEMPORARY_SUFFIX)
    shutil.rmtree(new, ignore_errors=True)
    tokenizer.hf.save_pretrained(new)
    files = file_hashes(new)
    if path.is_dir() and file_hashes(path) == files:
        shutil.rmtree(new)  # A run may be reading the existing one.
    else:
        replace_directory(new, path)
    return files


@dataclass
class _Preparation:
    """Makes the shards that a folder lacks.

    Attributes:
        folder: The folder.
        encode: Encodes documents, batch by batch.
        dtype: Type in which tokens are stored.
        shard_tokens: Tokens in a shard.
        new_tokens: Number of tokens in the shards that were made.
    """

    folder: Path
    encode: Callable[[Iterable[str]], EncodedBatches]
    dtype: np.dtype
    shard_tokens: int
    new_tokens: int = 0

    def tokenize_split(
        self, name: str, documents: Iterable[str], limits: SplitLimits
    ) -> list[dict]:
        """Return the records of all shards of a split; make those that are missing or damaged."""
        records: list[dict] = []
        new_shards: Iterator[NewShard] | None = None
        known = self._known_shards(name)
        while len(records) != known:
            base = f"{name}-{len(records):05d}"
            record = self._load_complete_shard(base)
            if record is not None:
                new_shards = None  # The next missing shard begins where this one ends.
            else:
                if new_shards is None:
                    start = SplitProgress(*records[-1]["end"]) if records else SplitProgress()
                    new_shards = self._tokenize_shards(name, documents, start, limits)
                shard = next(new_shards, None)
                if shard is None:
                    break
                record = self._write_shard(base, shard)
            records.append(record)
        return records

    def _known_shards(self, name: str) -> int | None:
        """Return the number of shards of a split if the folder was complete before, else None.

        The documents then need not be read to their end.
        """
        try:
            return len(
                read_json_with_checksum(self.folder / INDEX_FILE, PREPARE_AGAIN)["splits"][name]
            )
        except UserError:
            return None

    def _load_complete_shard(self, base: str) -> dict | None:
        """Return the record of a shard if every byte of the shard is intact, else None."""
        try:
            record = read_json_with_checksum(self.folder / f"{base}.json", PREPARE_AGAIN)
            shard = open_shard(self.folder, record, self.dtype, PREPARE_AGAIN)
            shard.read(0, len(shard.tokens))
        except UserError:
            return None
        return record

    def _tokenize_shards(
        self, name: str, documents: Iterable[str], start: SplitProgress, limits: SplitLimits
    ) -> Iterator[NewShard]:
        """Yield the shards of a split from `start` on, with a progress bar on terminals."""
        from loguru import logger
        from tqdm import tqdm

        where = f" from document {start.documents:,} on" if start.documents else ""
        logger.info(f"Tokenizing the {name} documents{where} into {self.folder}")
        batches = self.encode(itertools.islice(documents, start.documents, None))
        with (
            tqdm(
                desc=f"tokenizing {name}",
                unit=" tokens",
                unit_scale=True,
                initial=start.tokens,
                disable=None,  # Show it on terminals only.
            ) as bar,
            contextlib.closing(
                _cut_into_shards(self._stored_type(batches, bar), start, limits, self.shard_tokens)
            ) as shards,
        ):
            yield from shards

    def _stored_type(self, batches: EncodedBatches, bar: tqdm) -> EncodedBatches:
        for tokens, lengths in batches:
            bar.update(len(tokens))
            yield tokens.astype(self.dtype), lengths

    def _write_shard(self, base: str, shard: NewShard) -> dict:
        """Write the files of a shard, last its record, and return the record."""
        data = shard.tokens.view(np.uint8).data
        block_bytes = CHECKSUM_BLOCK * shard.tokens.itemsize
        blocks = (data[i : i + block_bytes] for i in range(0, len(data), block_bytes))
        arrays = {
            "tokens": shard.tokens,
            "offsets": shard.offsets.astype("<i8"),
            "crc": np.array([zlib.crc32(block) for block in blocks], "<u4"),
        }
        for kind, array in arrays.items():
            atomic_write(self.folder / f"{base}.{kind}", array)
        record = {
            "name": base,
            "documents": len(shard.offsets) - 1,
            "tokens": len(shard.tokens),
            "end": list(shard.end),
            "sha256": {
                kind: hashlib.sha256(arrays[kind].data).hexdigest() for kind in ("offsets", "crc")
            },
        }
        write_json_with_checksum(self.folder / f"{base}.json", record)
        self.new_tokens += len(shard.tokens)
        return record


def _cut_into_shards(
    batches: EncodedBatches, progress: SplitProgress, limits: SplitLimits, shard_tokens: int
) -> Generator[NewShard, None, None]:
    """Yield shards of encoded documents.

    Args:
        batches: The encoded documents after `progress`.
        progress: How much of the split is in earlier shards.
        limits: Where the split ends.
        shard_tokens: A shard ends with the document that reaches this number of tokens.
    """
    documents: list[np.ndarray] = []
    tokens_in_shard = 0
    for length, tokens in _split_batches(batches):
        if limits.targets is not None and progress.targets >= limits.targets:
            break
        if limits.tokens is not None and progress.tokens + length > limits.tokens:
            break
        progress = progress._replace(documents=progress.documents + 1)
        if length == 1:  # Only the end-of-sequence token: the text encodes to nothing.
            continue
        documents.append(tokens)
        tokens_in_shard += length
        progress = progress._replace(
            tokens=progress.tokens + length,
            targets=progress.targets + min(length, PUBLISHED_LENGTH) - 1,
        )
        if tokens_in_shard >= shard_tokens:
            yield _new_shard(documents, progress)
            documents, tokens_in_shard = [], 0
    if documents:
        yield _new_shard(documents, progress)


def _split_batches(batches: EncodedBatches) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the length and the tokens of each document."""
    for tokens, lengths in batches:
        for length, stop in zip(lengths.tolist(), np.cumsum(lengths).tolist(), strict=True):
            yield length, tokens[stop - length : stop]


def _new_shard(documents: list[np.ndarray], end: SplitProgress) -> NewShard:
    # Concatenation does not keep the byte order of a type.
    tokens = np.concatenate(documents).astype(documents[0].dtype, copy=False)
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    return NewShard(tokens, document_offsets(lengths), end)
