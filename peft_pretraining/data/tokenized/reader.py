"""Read tokenized data: memory-mapped shards, verified with checksums whenever they are read."""

from __future__ import annotations

import functools
import hashlib
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from peft_pretraining.data.sequences import Packing, Sequences, Shard, token_dtype
from peft_pretraining.data.tokenized.format import (
    CHECKSUM_BLOCK,
    FORMAT_VERSION,
    INDEX_FILE,
    PREPARE_AGAIN,
    TOKENIZER_FOLDER,
    damaged_error,
    file_hashes,
    read_json_with_checksum,
)
from peft_pretraining.data.tokenizer import Tokenizer, load_stored_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import reason_of


@dataclass(frozen=True)
class CheckedShard(Shard):
    """A memory-mapped shard on the disk.

    Attributes:
        checksums: CRC-32 of every `CHECKSUM_BLOCK` tokens; uint32.
        path: The file of the tokens.
        remedy: What to do about damage; ends the error message.
    """

    checksums: np.ndarray
    path: Path
    remedy: str

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop).

        Raises:
            UserError: A block that contains some of them is not as it was written.
        """
        for block in range(start // CHECKSUM_BLOCK, -(-stop // CHECKSUM_BLOCK)):
            data = self._bytes[block * self._block_bytes : (block + 1) * self._block_bytes]
            if zlib.crc32(data) != self._expected[block]:
                first = block * CHECKSUM_BLOCK
                what = f"tokens from {first:,} on are not as they were written"
                raise damaged_error(self.path, what, self.remedy)
        return self.tokens[start:stop]

    # Memory views, because Python reads an item of one in 50 nanoseconds, several times faster
    # than an item of a NumPy array.

    @functools.cached_property
    def _bytes(self) -> memoryview:
        return self.tokens.view(np.uint8).data

    @functools.cached_property
    def _expected(self) -> memoryview:
        return self.checksums.astype(np.uint32).data

    @functools.cached_property
    def _block_bytes(self) -> int:
        return CHECKSUM_BLOCK * self.tokens.itemsize


@dataclass(frozen=True)
class PreparedData:
    """A complete folder of tokenized data.

    Attributes:
        folder: The folder.
        index: The content of its index.json.
        remedy: What to do about damage; ends the error messages.
    """

    folder: Path
    index: dict
    remedy: str

    def sequences(self, split: str, max_length: int, packing: Packing = False) -> Sequences:
        """Return the sequences of a split.

        Args:
            split: `train` or `validation`.
            max_length: Tokens per sequence.
            packing: See `sequences.Packing`.

        Raises:
            UserError: A file is missing or damaged.
        """
        tokenizer = self.index["tokenizer"]
        dtype = token_dtype(tokenizer["vocab_size"])
        shards = tuple(
            open_shard(self.folder, record, dtype, self.remedy)
            for record in self.index["splits"][split]
        )
        return Sequences(shards, max_length, tokenizer["pad_id"], tokenizer["eos_id"], packing)

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """Return the tokenizer of the data.

        Args:
            vocab_size: Number of embeddings of the model.

        Raises:
            UserError: The data was prepared for more embeddings, or the tokenizer is damaged or
                encodes differently than when the data was prepared.
        """
        stored, folder = self.index["tokenizer"], self.folder / TOKENIZER_FOLDER
        if vocab_size < stored["vocab_size"]:
            raise UserError(
                f"{self.folder} was prepared for a vocab_size of {stored['vocab_size']}, the "
                f"model's is {vocab_size}; give a model config with {stored['vocab_size']} or "
                f"more, or prepare the data anew with --vocab_size {vocab_size}."
            )
        try:
            found = file_hashes(folder)
        except OSError as error:
            raise damaged_error(folder, reason_of(error), self.remedy) from error
        expected = self.index["tokenizer_files"]
        for name in sorted(found.keys() | expected.keys()):
            if found.get(name) != expected.get(name):
                what = "it is not the file that was written"
                raise damaged_error(folder / name, what, self.remedy)
        tokenizer = load_stored_tokenizer(folder, stored)
        if tokenizer.content_hash != stored["content_hash"]:
            raise UserError(
                f"The tokenizer in {folder} encodes differently than when the data was prepared: "
                "install the versions of transformers and tokenizers of that time, or prepare the "
                "data anew."
            )
        return replace(tokenizer, name=stored["name"], vocab_size=vocab_size)


def open_prepared(folder: Path, remedy: str = PREPARE_AGAIN) -> PreparedData:
    """Open a folder that `prepare` has completed.

    Args:
        folder: The folder.
        remedy: What to do about damage; ends the error messages.

    Raises:
        UserError: The folder is not complete, its index is damaged, or it has another format.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        raise UserError(
            f"{folder} is not prepared to its end ({INDEX_FILE} is missing): run the prepare "
            "command again, it goes on from there."
        )
    index = read_json_with_checksum(path, remedy)
    if index["format"] != FORMAT_VERSION:
        raise UserError(
            f"{folder} has format {index['format']}, this version reads format {FORMAT_VERSION}; "
            "prepare the data anew."
        )
    return PreparedData(folder, index, remedy)


def open_shard(folder: Path, record: dict, dtype: np.dtype, remedy: str) -> CheckedShard:
    """Open a shard, and verify its offsets and checksums.

    Args:
        folder: The folder of the data.
        record: The shard's record, as in index.json.
        dtype: Type of the tokens.
        remedy: What to do about damage; ends the error messages.

    Raises:
        UserError: A file is missing or damaged.
    """
    name, tokens, documents = record["name"], record["tokens"], record["documents"]

    def file(kind: str) -> Path:
        return folder / f"{name}.{kind}"

    blocks = -(-tokens // CHECKSUM_BLOCK)
    offsets = _memory_map(file("offsets"), documents + 1, np.dtype("<i8"), remedy)
    checksums = _memory_map(file("crc"), blocks, np.dtype("<u4"), remedy)
    token_array = _memory_map(file("tokens"), tokens, dtype, remedy)
    for kind, array in (("offsets", offsets), ("crc", checksums)):
        if hashlib.sha256(array.data).hexdigest() != record["sha256"][kind]:
            raise damaged_error(file(kind), "it is not the file that was written", remedy)
    return CheckedShard(token_array, offsets, checksums, file("tokens"), remedy)


def _memory_map(path: Path, count: int, dtype: np.dtype, remedy: str) -> np.ndarray:
    """Return a file of `count` numbers as an array, which is read from the disk when it is used.

    torch maps the file, because its mapping needs no open file, of which a process may have few.

    Raises:
        UserError: The file is missing, has another size, or cannot be mapped.
    """
    import torch

    size = count * dtype.itemsize
    try:
        found = path.stat().st_size
        if found != size:
            raise damaged_error(path, f"it has {found:,} bytes instead of {size:,}", remedy)
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        return mapped.numpy().view(dtype)
    except FileNotFoundError as error:
        raise damaged_error(path, "it is missing", remedy) from error
    except (OSError, RuntimeError) as error:  # RuntimeError: torch could not open or map it.
        raise damaged_error(path, reason_of(error), remedy) from error
