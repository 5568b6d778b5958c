"""Rows: one document each, cut or filled up to `max_length` ids, and the order in which a run sees them."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.tokenization import Tokenizer

ROWS_FORMAT = 1  # raise it when what is stored changes
IGNORED = -100  # the label that torch's cross-entropy leaves out


@dataclass(frozen=True)
class Rows:
    """Tokenised documents, read by index.

    `tokens` holds whole documents one after another, each ending in `eos_id` (uint16 or int32 [all tokens], often memory-mapped);
    document i is `tokens[offsets[i]:offsets[i + 1]]` (offsets: int64 [documents + 1]). Row i is document i, cut to `max_length`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    max_length: int
    pad_id: int
    eos_id: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Ids of each row that are not padding, the end-of-sequence id included: int64 [rows]."""
        return np.minimum(np.diff(self.offsets), self.max_length)

    @property
    def target_tokens(self) -> int:
        """Ids that a model is scored on, one fewer than its length in each row."""
        return int(self.lengths.sum()) - len(self)

    def unigram_entropy(self) -> float:
        """Entropy of the ids' frequencies, in nats, over at most 20 million of them: the loss of a model that knows only how often
        each token occurs, which a model that has learnt anything of the text is well below."""
        counts = np.bincount(self.tokens[:20_000_000])
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The rows of these indices as `input_ids` and `labels`, both int64 [batch, max_length].

        Labels equal the ids and are -100 at padding; they are not shifted (the model does that).
        """
        starts = self.offsets[indices]
        lengths = np.minimum(self.offsets[np.asarray(indices) + 1] - starts, self.max_length)
        columns = np.arange(self.max_length)
        real = columns < lengths[:, None]  # [batch, max_length]
        # Padding reads the row's last id, which is always there, and is overwritten.
        ids = self.tokens[starts[:, None] + np.minimum(columns, lengths[:, None] - 1)].astype(np.int64)
        ids[np.arange(len(ids)), lengths - 1] = self.eos_id  # the end of a document that was cut
        labels = np.where(real, ids, IGNORED)
        ids[~real] = self.pad_id
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def head(self, target_tokens: int | None) -> Rows:
        """The fewest first rows that hold `target_tokens` targets; all of them for None or where they hold fewer."""
        if target_tokens is None:
            return self
        reached = np.cumsum(self.lengths - 1)
        count = min(int(np.searchsorted(reached, target_tokens)) + 1, len(self))
        return Rows(self.tokens, self.offsets[: count + 1], self.max_length, self.pad_id, self.eos_id)


# ---------------------------------------------------------------------------------------------------------------------- order


class RowOrder:
    """The endless order of `n` rows: epoch after epoch, each a fresh permutation that depends on the seed and the epoch alone."""

    def __init__(self, seed: int, n: int):
        self.seed, self.n = seed, n
        self._permutations: dict[int, np.ndarray] = {}

    def indices(self, start: int, stop: int) -> np.ndarray:
        """The rows at the positions [start, stop): int64 [stop - start]."""
        epochs = range(start // self.n, (stop - 1) // self.n + 1)
        # Kept for the next call are only the epochs that this call touched.
        self._permutations = {epoch: self._permutation(epoch) for epoch in epochs}
        whole = np.concatenate(list(self._permutations.values())) if len(epochs) > 1 else self._permutations[epochs[0]]
        first = epochs[0] * self.n
        return whole[start - first : stop - first]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch in self._permutations:
            return self._permutations[epoch]
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.n)


# -------------------------------------------------------------------------------------------------------------------- storing


def tokenize_rows(documents: Iterable[str], tokenizer: Tokenizer, max_length: int, target_tokens: int | None = None) -> Rows:
    """Tokenises documents into memory, until `target_tokens` targets are reached (None: all)."""
    parts, counts, reached = [], [], 0
    for tokens, lengths in _encoded(documents, tokenizer):
        parts.append(tokens.astype(_dtype(tokenizer)))
        counts.append(lengths)
        reached += int(np.minimum(lengths, max_length).sum()) - len(lengths)
        if target_tokens is not None and reached >= target_tokens:
            break
    tokens = np.concatenate(parts) if parts else np.empty(0, _dtype(tokenizer))
    offsets = _offsets(np.concatenate(counts) if counts else np.empty(0, np.int64))
    return Rows(tokens, offsets, max_length, tokenizer.pad_id, tokenizer.eos_id).head(target_tokens)


def cached_rows(parts: dict[str, Iterable[str]], key: object, tokenizer: Tokenizer, max_length: int, cache: Path) -> dict[str, Rows]:
    """Rows of each named set of documents, tokenised once and then memory-mapped from a folder of `cache`.

    `key` (anything JSON can write) must identify the documents; the tokenizer and the format are added to it.
    Raises UserError for a set without a document and for a damaged cache.
    """
    whole_key = [ROWS_FORMAT, key, tokenizer.content_hash, tokenizer.vocab_size]
    folder = cache / "rows" / hashlib.blake2b(json.dumps(whole_key).encode(), digest_size=12).hexdigest()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            for name, documents in parts.items():
                _write(documents, name, tokenizer, whole)
            try:
                os.rename(whole, folder)
            except OSError:
                if not folder.is_dir():  # another process may have been first; its rows are the same
                    raise
    return {name: _read(folder, name, tokenizer, max_length) for name in parts}


def _write(documents: Iterable[str], name: str, tokenizer: Tokenizer, folder: Path) -> None:
    from loguru import logger
    from tqdm import tqdm

    counts = []
    logger.info(f"Tokenising the {name} documents (once)")
    bar = tqdm(desc=f"tokenising {name}", unit=" tokens", unit_scale=True, disable=None)  # None: silent without a terminal
    with open(folder / f"{name}.tokens", "wb") as file, bar:
        for tokens, lengths in _encoded(documents, tokenizer):
            tokens.astype(_dtype(tokenizer)).tofile(file)
            counts.append(lengths)
            bar.update(len(tokens))
    np.save(folder / f"{name}.offsets.npy", _offsets(np.concatenate(counts) if counts else np.empty(0, np.int64)))


def _read(folder: Path, name: str, tokenizer: Tokenizer, max_length: int) -> Rows:
    path = folder / f"{name}.tokens"
    try:
        offsets = np.load(folder / f"{name}.offsets.npy")
        tokens = np.memmap(path, _dtype(tokenizer), "r") if path.stat().st_size else np.empty(0, _dtype(tokenizer))
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The cached rows in {folder} are damaged ({error}); delete that folder and start again.") from error
    if offsets[-1] != len(tokens):
        raise UserError(f"The cached rows in {folder} are damaged ({path.name} is not whole); delete that folder and start again.")
    return Rows(tokens, offsets, max_length, tokenizer.pad_id, tokenizer.eos_id)


def _encoded(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of encoded documents; a document that the tokenizer makes nothing of (only its end is left) is dropped."""
    for texts in _text_batches(documents):
        tokens, lengths = tokenizer.encode(texts)
        kept = lengths > 1
        yield tokens[np.repeat(kept, lengths)], lengths[kept]


def _text_batches(documents: Iterable[str], most: int = 1000, characters: int = 4_000_000) -> Iterator[list[str]]:
    """Lists of documents, bounded by number and by size: a thousand books at once would not fit in memory."""
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if len(texts) == most or size >= characters:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _dtype(tokenizer: Tokenizer) -> type[np.integer]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
