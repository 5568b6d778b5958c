"""Read tokenized data: memory-mapped shards, whose every read is checked against a checksum."""

from __future__ import annotations

import functools
import hashlib
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from peft_pretraining.data.sequences import Packing, Rows, Shard, token_dtype
from peft_pretraining.data.tokenized.format import (
    BLOCK,
    FORMAT,
    INDEX,
    PREPARE_AGAIN,
    TOKENIZER,
    damaged_error,
    file_hashes,
    read_json_with_checksum,
)
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.errors import UserError

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
            if (
                zlib.crc32(self._bytes[block * self._block_bytes : (block + 1) * self._block_bytes])
                != self._expected[block]
            ):
                raise damaged_error(
                    self.path,
                    f"tokens from {block * BLOCK:,} on are not as they were written",
                    self.remedy,
                )
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
        shards = tuple(
            open_shard(self.folder, record, dtype, self.remedy)
            for record in self.index["splits"][split]
        )
        return Rows(
            shards,
            max_length,
            self.index["tokenizer"]["pad_id"],
            self.index["tokenizer"]["eos_id"],
            packing,
        )

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
            found = file_hashes(folder)
        except OSError as error:
            raise damaged_error(folder, error.strerror, self.remedy) from error
        for name in sorted(found.keys() | self.index["tokenizer_files"].keys()):
            if found.get(name) != self.index["tokenizer_files"].get(name):
                raise damaged_error(
                    folder / name, "it is not the file that was written", self.remedy
                )
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
        raise UserError(
            f"{folder} is not prepared to its end ({INDEX} is missing): run the prepare command again, it goes on from there."
        )
    index = read_json_with_checksum(path, remedy)
    if index["format"] != FORMAT:
        raise UserError(
            f"{folder} has format {index['format']}, this version reads format {FORMAT}; prepare the data anew."
        )
    return Prepared(folder, index, remedy)


def open_shard(folder: Path, record: dict, dtype: np.dtype, remedy: str) -> CheckedShard:
    base, blocks = f"{folder}/{record['name']}", -(-record["tokens"] // BLOCK)
    offsets = _map(Path(f"{base}.offsets"), record["documents"] + 1, np.dtype("<i8"), remedy)
    checksums = _map(Path(f"{base}.crc"), blocks, np.dtype("<u4"), remedy)
    path = Path(f"{base}.tokens")
    tokens = _map(path, record["tokens"], dtype, remedy)
    for kind, array in (("offsets", offsets), ("crc", checksums)):
        if hashlib.sha256(array).hexdigest() != record["sha256"][kind]:
            raise damaged_error(
                Path(f"{base}.{kind}"), "it is not the file that was written", remedy
            )
    return CheckedShard(tokens, offsets, checksums, path, remedy)


def _map(path: Path, count: int, dtype: np.dtype, remedy: str) -> np.ndarray:
    """A file of `count` numbers in memory as far as it is read. torch's mapping needs no open file, of which a process may have few."""
    size = count * dtype.itemsize
    try:
        found = path.stat().st_size
        if found != size:
            raise damaged_error(path, f"it has {found:,} bytes instead of {size:,}", remedy)
        return (
            torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
            .numpy()
            .view(dtype)
        )
    except FileNotFoundError as error:
        raise damaged_error(path, "it is missing", remedy) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: torch could not open or map it
        raise damaged_error(path, " ".join(str(error).split()), remedy) from error
