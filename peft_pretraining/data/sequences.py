"""Rows: what a model sees at once. One document each, cut or filled up to `max_length` ids; or, packed, windows of joined documents."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.tokenizer_pool import text_batches

Packing = bool | Literal["within"]


@dataclass(frozen=True)
class Shard:
    """Tokenised documents.

    `tokens` holds them whole and one after another, each ending in the end-of-sequence id (integers [all tokens]); document i is
    `tokens[offsets[i]:offsets[i + 1]]` (offsets: int64 [documents + 1]).
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop)."""
        return self.tokens[start:stop]


@dataclass(frozen=True)
class Rows:
    """Tokenised documents, read by index.

    Row i is document i, cut to `max_length`, its last id then replaced by `eos_id`. With `packing` it is the i-th window of
    `max_length` tokens of the documents joined one after another; windows lie within a shard, whose last incomplete one is left out.
    `packing` "within": besides, no document's first token has a label, for a model that does not see the document before it.
    `most` bounds the number of rows.
    """

    shards: tuple[Shard, ...]
    max_length: int
    pad_id: int
    eos_id: int
    packing: Packing = False
    most: int | None = None

    def __len__(self) -> int:
        whole = int(self._first_rows[-1])
        return whole if self.most is None else min(whole, self.most)

    @functools.cached_property
    def _first_rows(self) -> np.ndarray:
        """The index of each shard's first row, and the number of all rows: int64 [shards + 1]."""
        counts = [
            len(shard.tokens) // self.max_length if self.packing else len(shard.offsets) - 1
            for shard in self.shards
        ]
        return np.cumsum([0, *counts])

    @property
    def lengths(self) -> np.ndarray:
        """Ids of each row that are not padding, the end-of-sequence id included: int64 [rows]."""
        if self.packing:
            return np.full(len(self), self.max_length)
        documents = np.concatenate(
            [np.empty(0, np.int64), *(np.diff(shard.offsets) for shard in self.shards)]
        )
        return np.minimum(documents[: len(self)], self.max_length)

    @property
    def target_tokens(self) -> int:
        """Ids that a model is scored on, one fewer than its length in each row; with `packing` "within" it is scored on fewer."""
        return int(self.lengths.sum()) - len(self)

    def unigram_entropy(self) -> float:
        """Entropy of the ids' frequencies, in nats, over at most 20 million of them: the loss of a model that knows only how often
        each token occurs, which a model that has learnt anything of the text is well below."""
        counts = np.bincount(np.concatenate(list(self._first_tokens(20_000_000))))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def _first_tokens(self, most: int) -> Iterator[np.ndarray]:
        for shard in self.shards:
            part = shard.read(0, min(most, len(shard.tokens)))
            yield part
            most -= len(part)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The rows of these indices as `input_ids` and `labels`, both int64 [batch, max_length].

        Labels equal the ids and are -100 at padding; they are not shifted (the model does that). Raises UserError for damaged data.
        """
        shards = np.searchsorted(self._first_rows, indices, side="right") - 1
        within = np.asarray(indices) - self._first_rows[shards]
        ids = np.full((len(within), self.max_length), self.pad_id, np.int64)
        lengths = np.empty(len(within), np.int64)
        # A loop, because each row lies elsewhere and what it touches is checked: about 3 microseconds a row.
        for row, (shard, i) in enumerate(zip(shards.tolist(), within.tolist(), strict=True)):
            tokens = self._read(self.shards[shard], i)
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        if self.packing:
            return packed_batch(ids, self.eos_id if self.packing == "within" else None)
        ids[np.arange(len(ids)), lengths - 1] = self.eos_id  # the end of a document that was cut
        # What is padding follows from lengths: the filler may be an id that documents hold too.
        labels = np.where(np.arange(self.max_length) < lengths[:, None], ids, IGNORE_INDEX)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def _read(self, shard: Shard, i: int) -> np.ndarray:
        if self.packing:
            return shard.read(i * self.max_length, (i + 1) * self.max_length)
        start, stop = shard.offsets[i : i + 2].tolist()
        return shard.read(start, min(stop, start + self.max_length))

    def head(self, target_tokens: int | None) -> Rows:
        """The fewest first rows that hold `target_tokens` targets; all of them for None or where they hold fewer."""
        if target_tokens is None:
            return self
        reached = np.cumsum(self.lengths - 1)
        return replace(self, most=min(int(np.searchsorted(reached, target_tokens)) + 1, len(self)))


def packed_batch(ids: np.ndarray, end: int | None) -> dict[str, torch.Tensor]:
    """Packed rows, int64 [batch, max_length], and their labels; with the id that ends documents none for what comes after it."""
    labels = ids.copy()
    if end is not None:
        labels[:, 1:][ids[:, :-1] == end] = IGNORE_INDEX
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


# ------------------------------------------------------------------------------------------------------------------ in memory


def tokenize_rows(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    max_length: int,
    target_tokens: int | None = None,
    packing: Packing = False,
) -> Rows:
    """Tokenises documents into memory, until `target_tokens` targets are reached (None: all)."""
    parts, counts, total, reached = [], [], 0, 0
    for texts in text_batches(documents):
        tokens, lengths = _without_empty(*tokenizer.encode(texts))
        parts.append(tokens.astype(token_dtype(tokenizer.vocab_size)))
        counts.append(lengths)
        total += len(tokens)
        reached += int((np.minimum(lengths, max_length) - 1).sum())
        if packing:
            reached = total // max_length * (max_length - 1)
        if target_tokens is not None and reached >= target_tokens:
            break
    tokens = np.concatenate([np.empty(0, np.uint16), *parts])
    shard = Shard(tokens, offsets_of(np.concatenate([np.empty(0, np.int64), *counts])))
    return Rows((shard,), max_length, tokenizer.pad_id, tokenizer.eos_id, packing).head(
        target_tokens
    )


def _without_empty(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encoded documents without those that the tokenizer makes nothing of: only their end is left."""
    kept = lengths > 1
    return tokens[np.repeat(kept, lengths)], lengths[kept]


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Where documents of these lengths begin, and where the last one ends: int64 [documents + 1]."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that tokens are kept in, little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")
