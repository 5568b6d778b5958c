"""Token sequences: what a model sees at once.

Without packing a sequence is one document, truncated or padded to `max_length` tokens. With packing
it is a window of `max_length` tokens of the concatenated documents.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.tokenizer_pool import text_batches

if TYPE_CHECKING:
    import torch

# False: one document per sequence. True: packed windows. "within": packed windows in which the
# first token of a document has no label, for a model whose attention stays within a document.
Packing = bool | Literal["within"]

UNIGRAM_SAMPLE_TOKENS = 20_000_000


@dataclass(frozen=True)
class Shard:
    """Tokenized documents, stored one after another.

    Attributes:
        tokens: The tokens of all documents, each of which ends with the end-of-sequence token;
            integers [total tokens].
        offsets: Document i is `tokens[offsets[i]:offsets[i + 1]]`; int64 [documents + 1].
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop)."""
        return self.tokens[start:stop]


@dataclass(frozen=True)
class Sequences:
    """Token sequences of tokenized documents, read by index.

    Without packing, sequence i is document i, truncated to `max_length` tokens, of which the last
    is then replaced by `eos_id`, or padded. With packing it is the i-th window of `max_length`
    tokens. Windows do not cross shards; the incomplete last window of a shard is dropped.

    Attributes:
        shards: The documents.
        max_length: Tokens per sequence.
        pad_id: Token that fills up short sequences.
        eos_id: Token that ends a document.
        packing: See `Packing`.
        max_sequences: Use only that many sequences, from the beginning. None: all.
    """

    shards: tuple[Shard, ...]
    max_length: int
    pad_id: int
    eos_id: int
    packing: Packing = False
    max_sequences: int | None = None

    def __len__(self) -> int:
        available = int(self._shard_starts[-1])
        return available if self.max_sequences is None else min(available, self.max_sequences)

    @functools.cached_property
    def _shard_starts(self) -> np.ndarray:
        """Index of each shard's first sequence, then the total number: int64 [shards + 1]."""
        counts = [
            len(shard.tokens) // self.max_length if self.packing else len(shard.offsets) - 1
            for shard in self.shards
        ]
        return np.cumsum([0, *counts])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence without padding, with the end-of-sequence token: int64 [n]."""
        if self.packing:
            return np.full(len(self), self.max_length)
        documents = np.concatenate(
            [np.empty(0, np.int64), *(np.diff(shard.offsets) for shard in self.shards)]
        )
        return np.minimum(documents[: len(self)], self.max_length)

    @property
    def target_tokens(self) -> int:
        """Number of tokens that the model is scored on: one fewer than the length of each sequence.

        With `packing` "within" the first token of each document is not scored either; this number
        then still counts it.
        """
        return int(self.lengths.sum()) - len(self)

    def unigram_entropy(self) -> float:
        """Return the entropy of the token frequencies in nats.

        This is the loss of a model that knows only how often each token occurs; a model that has
        learned anything else about the text has a lower one. Measured over the first
        `UNIGRAM_SAMPLE_TOKENS` tokens.
        """
        sample = np.concatenate(list(self._first_tokens(UNIGRAM_SAMPLE_TOKENS)))
        counts = np.bincount(sample)
        frequencies = counts[counts > 0] / counts.sum()
        return float(-(frequencies * np.log(frequencies)).sum())

    def _first_tokens(self, count: int) -> Iterator[np.ndarray]:
        for shard in self.shards:
            part = shard.read(0, min(count, len(shard.tokens)))
            yield part
            count -= len(part)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the sequences of these indices.

        Args:
            indices: Indices in [0, len(self)), integers [batch].

        Returns:
            `input_ids` and `labels`, both int64 [batch, max_length]. Labels equal the ids, except
            at padding, where they are `IGNORE_INDEX`; they are not shifted (the model does that).

        Raises:
            UserError: The stored data is damaged.
        """
        import torch

        shards = np.searchsorted(self._shard_starts, indices, side="right") - 1
        indices_in_shards = np.asarray(indices) - self._shard_starts[shards]
        ids = np.full((len(indices_in_shards), self.max_length), self.pad_id, np.int64)
        lengths = np.empty(len(indices_in_shards), np.int64)
        # A loop, because each sequence is stored elsewhere and is verified when it is read: about
        # 3 microseconds a sequence.
        places = zip(shards.tolist(), indices_in_shards.tolist(), strict=True)
        for row, (shard, i) in enumerate(places):
            tokens = self._read(self.shards[shard], i)
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        if self.packing:
            return packed_batch(ids, self.eos_id if self.packing == "within" else None)
        ids[np.arange(len(ids)), lengths - 1] = self.eos_id  # The end of a truncated document.
        # Padding follows from the lengths, because documents may contain the padding token too.
        labels = np.where(np.arange(self.max_length) < lengths[:, None], ids, IGNORE_INDEX)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def _read(self, shard: Shard, i: int) -> np.ndarray:
        if self.packing:
            return shard.read(i * self.max_length, (i + 1) * self.max_length)
        start, stop = shard.offsets[i : i + 2].tolist()
        return shard.read(start, min(stop, start + self.max_length))

    def head(self, target_tokens: int | None) -> Sequences:
        """Return the fewest first sequences that together have `target_tokens` targets.

        All sequences are returned for None, or if they have fewer targets than that.
        """
        if target_tokens is None:
            return self
        targets_so_far = np.cumsum(self.lengths - 1)
        count = int(np.searchsorted(targets_so_far, target_tokens)) + 1
        return replace(self, max_sequences=min(count, len(self)))


def packed_batch(ids: np.ndarray, end_of_document: int | None) -> dict[str, torch.Tensor]:
    """Return packed sequences as a batch, with labels.

    Args:
        ids: int64 [batch, max_length].
        end_of_document: If given, the token after each token of this id has no label.

    Returns:
        `input_ids` and `labels`, both int64 [batch, max_length].
    """
    import torch

    labels = ids.copy()
    if end_of_document is not None:
        labels[:, 1:][ids[:, :-1] == end_of_document] = IGNORE_INDEX
    return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}


def tokenize_documents(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    max_length: int,
    target_tokens: int | None = None,
    packing: Packing = False,
) -> Sequences:
    """Tokenize documents into memory.

    Args:
        documents: Texts. Documents that encode to no tokens are dropped.
        tokenizer: The tokenizer.
        max_length: Tokens per sequence.
        target_tokens: Stop as soon as the sequences have that many targets. None: tokenize all.
        packing: See `Packing`.

    Raises:
        UserError: A token is outside the model's vocabulary.
    """
    token_batches, length_batches, total_tokens, targets = [], [], 0, 0
    for texts in text_batches(documents):
        tokens, lengths = _without_empty(*tokenizer.encode(texts))
        token_batches.append(tokens.astype(token_dtype(tokenizer.vocab_size)))
        length_batches.append(lengths)
        total_tokens += len(tokens)
        if packing:
            targets = total_tokens // max_length * (max_length - 1)
        else:
            targets += int((np.minimum(lengths, max_length) - 1).sum())
        if target_tokens is not None and targets >= target_tokens:
            break
    all_tokens = np.concatenate([np.empty(0, np.uint16), *token_batches])
    offsets = document_offsets(np.concatenate([np.empty(0, np.int64), *length_batches]))
    sequences = Sequences(
        (Shard(all_tokens, offsets),), max_length, tokenizer.pad_id, tokenizer.eos_id, packing
    )
    return sequences.head(target_tokens)


def _without_empty(tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove documents that consist of the end-of-sequence token only."""
    kept = lengths > 1
    return tokens[np.repeat(kept, lengths)], lengths[kept]


def document_offsets(lengths: np.ndarray) -> np.ndarray:
    """Return where documents of these lengths begin, and where the last one ends.

    Args:
        lengths: Integers [documents].

    Returns:
        int64 [documents + 1].
    """
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the type in which tokens are stored, little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<i4")
