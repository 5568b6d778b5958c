"""Training data that is read while training, in substreams that can be resumed at any document.

A stream with n shards is split into V substreams. Each reads every V-th shard, one after another,
and starts again at its end. Every global batch of B sequences takes the next B/V sequences of each
substream. With n = 6 shards, V = 3 substreams and B = 6:

    substream 0 reads the shards 0, 3, 0, 3, ...:   a0 a1 | a2 a3 | a4 a5 | ...
    substream 1 reads the shards 1, 4, 1, 4, ...:   b0 b1 | b2 b3 | b4 b5 | ...
    substream 2 reads the shards 2, 5, 2, 5, ...:   c0 c1 | c2 c3 | c4 c5 | ...
    global batch                                      0       1       2

The first global batch is a0 a1 b0 b1 c0 c1. V depends only on B and n. A global batch is therefore
the same for any number of ranks, processes and micro-batches; and because each process reads only
the substreams of its own sequences, no document is read twice or read without being used.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch

from peft_pretraining.data.sequences import (
    Packing,
    Sequences,
    Shard,
    document_offsets,
    packed_batch,
)
from peft_pretraining.data.sources.shards import Shards, read_with_retries
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.workers import ReaderStart, iterate_loader
from peft_pretraining.errors import UserError

# As many as eight ranks with eight worker processes each can share. Each holds a file open.
MAX_SUBSTREAMS = 64
# Roughly, for English text: determines how much a packed substream reads ahead.
CHARACTERS_PER_TOKEN = 4


class SubstreamState(NamedTuple):
    """The position of a substream. Stored in checkpoints as a list of these four numbers.

    Attributes:
        shards: Shards of the substream that were finished in this pass.
        documents: Documents that were used up in the current shard.
        tokens: Tokens that were used of the next document (packed sequences only).
        passes: Complete passes through all shards of the substream.
    """

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    passes: int = 0


class Document(NamedTuple):
    """A document of a substream, with the positions before and after it."""

    text: str
    before: SubstreamState
    after: SubstreamState


class SequenceRange(NamedTuple):
    """The sequences [start, stop) of those that a substream contributes to each global batch."""

    substream: int
    start: int
    stop: int


Batch = dict[str, torch.Tensor]
# What a worker process sends: a part of a global batch with the states of its substreams after it;
# at the end of the data None, or the error that ends the data.
Item = tuple[Batch, list[SubstreamState]] | UserError | None


@dataclass(frozen=True)
class StreamedSequences:
    """Token sequences that are read from a stream while training.

    Without packing a sequence is one document, truncated or padded to `max_length` tokens, as in
    `Sequences`. With packing the documents of a substream, each followed by the end-of-sequence
    token, are concatenated and cut into windows of `max_length` tokens without any padding.

    Attributes:
        documents: The documents, in shards.
        tokenizer: The tokenizer.
        max_length: Tokens per sequence.
        packing: See `sequences.Packing`.
    """

    documents: Shards
    tokenizer: Tokenizer
    max_length: int
    packing: Packing = False

    def substream_count(self, total_batch_size: int) -> int:
        """Return the number of substreams for a global batch of so many sequences.

        It is the greatest divisor of `total_batch_size` that exceeds neither `MAX_SUBSTREAMS` nor
        the number of shards.
        """
        limit = min(MAX_SUBSTREAMS, self.documents.n_shards)
        return max(count for count in range(1, limit + 1) if total_batch_size % count == 0)

    def batches(
        self,
        ranges: list[SequenceRange],
        starts: list[SubstreamState],
        substreams: int,
        per_batch: int,
        max_passes: int | None = None,
    ) -> Iterator[tuple[Batch, list[SubstreamState]]]:
        """Yield the sequences of these ranges of one global batch after another.

        Ends when a substream has too few sequences left in its `max_passes` passes.

        Args:
            ranges: Which sequences to return; at most one range per substream.
            starts: Position from which the substream of each range continues.
            substreams: Number of substreams of the stream.
            per_batch: Sequences that each substream contributes to a global batch.
            max_passes: Passes through each substream. None: without end.

        Yields:
            `input_ids` and `labels`, int64 [sequences of all ranges, max_length], in the order of
            the ranges; and the position of each range's substream after the global batch.

        Raises:
            UserError: A substream contains no document, or the source cannot be read.
        """
        sources: list[Iterator[tuple[str | np.ndarray, SubstreamState]]] = []
        for part, start in zip(ranges, starts, strict=True):
            documents = self._documents(part.substream, substreams, start, max_passes)
            if self.packing:
                sources.append(self._windows(documents, per_batch))
            else:
                sources.append((text, after) for text, _, after in documents)
        while True:
            sequences: list[str | np.ndarray] = []
            states = []
            for part, source in zip(ranges, sources, strict=True):
                found = list(itertools.islice(source, per_batch))
                if len(found) < per_batch:
                    return
                sequences += [sequence for sequence, _ in found[part.start : part.stop]]
                states.append(found[-1][1])
            yield self._batch(sequences), states

    def _documents(
        self, substream: int, substreams: int, start: SubstreamState, max_passes: int | None
    ) -> Iterator[Document]:
        """Yield the documents of a substream from a position on, pass after pass."""
        shards = range(substream, self.documents.n_shards, substreams)
        before = start
        while max_passes is None or before.passes < max_passes:
            # A pass that is resumed in the middle may have no documents left. That is no error.
            empty = before.shards == before.documents == 0
            for finished in range(before.shards, len(shards)):
                texts = read_with_retries(self.documents, shards[finished], before.documents)
                for text, is_last in _mark_last(texts):
                    # The shard counts as finished with its last document, so that a resumed run
                    # does not open it again only to find nothing left.
                    if is_last:
                        after = SubstreamState(finished + 1, 0, 0, before.passes)
                    else:
                        after = SubstreamState(finished, before.documents + 1, 0, before.passes)
                    yield Document(text, before, after)
                    before, empty = after, False
                before = SubstreamState(finished + 1, 0, 0, before.passes)
            if empty:
                raise UserError(
                    f"Substream {substream} of {substreams} of the training stream, which has "
                    f"{len(shards)} of its {self.documents.n_shards} shards, contains no document; "
                    "give more or larger files, or leave --stream out."
                )
            before = SubstreamState(passes=before.passes + 1)

    def _windows(
        self, documents: Iterator[Document], per_batch: int
    ) -> Iterator[tuple[np.ndarray, SubstreamState]]:
        """Yield windows of the concatenated documents, and the substream's position after each.

        Yields:
            Tokens, int64 [max_length]; position.
        """
        window, filled = np.empty(self.max_length, np.int64), 0
        # Encode about as much text at once as one global batch needs.
        characters = CHARACTERS_PER_TOKEN * self.max_length * per_batch
        for document, ids in self._encoded(documents, characters):
            used = document.before.tokens
            while used < len(ids):
                taken = min(len(ids) - used, self.max_length - filled)
                window[filled : filled + taken] = ids[used : used + taken]
                used, filled = used + taken, filled + taken
                if filled == self.max_length:
                    if used == len(ids):
                        state = document.after
                    else:
                        state = document.before._replace(tokens=used)
                    yield window.copy(), state
                    filled = 0

    def _encoded(
        self, documents: Iterator[Document], characters: int
    ) -> Iterator[tuple[Document, np.ndarray]]:
        """Yield each document with its tokens, int32 [tokens].

        About `characters` characters of text are encoded at once, on the tokenizer's threads.
        """
        while batch := _take_characters(documents, characters):
            tokens, lengths = self.tokenizer.encode([document.text for document in batch])
            yield from zip(batch, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True)

    def _batch(self, sequences: list[str | np.ndarray]) -> Batch:
        """Return sequences as a batch: windows of tokens if packed, texts otherwise."""
        tokenizer = self.tokenizer
        if self.packing:
            windows = np.stack(cast(list[np.ndarray], sequences))
            return packed_batch(windows, tokenizer.eos_id if self.packing == "within" else None)
        tokens, lengths = tokenizer.encode(cast(list[str], sequences))
        shards = (Shard(tokens, document_offsets(lengths)),)
        batch = Sequences(shards, self.max_length, tokenizer.pad_id, tokenizer.eos_id)
        return batch.batch(np.arange(len(sequences)))


def _mark_last(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Yield each text, and whether it is the last one."""
    for text in texts:
        for following in texts:
            yield text, False
            text = following
        yield text, True


def _take_characters(documents: Iterator[Document], characters: int) -> list[Document]:
    """Return the fewest next documents with so many characters in total; fewer at the end."""
    found = []
    for document in documents:
        found.append(document)
        characters -= len(document.text)
        if characters <= 0:
            break
    return found


# ---------------------------------------------------------------- the part of the stream of a rank


def stream_batches(
    train: StreamedSequences,
    position: dict | None,
    total_batch_size: int,
    own: range,
    workers: int,
    max_passes: int | None,
) -> Iterator[tuple[Batch, dict[str, SubstreamState]]]:
    """Yield this rank's sequences of one global batch after another.

    Ends where the data ends.

    Args:
        train: The stream.
        position: Where to continue: its entry "lanes" has the state of each substream.
            None: from the beginning.
        total_batch_size: Sequences in a global batch.
        own: Which of them belong to this rank.
        workers: Number of worker processes that read, at most one for each substream of this rank.
            0: this process reads.
        max_passes: Passes through each substream. None: without end.

    Yields:
        `input_ids` and `labels`, int64 [len(own), max_length]; and the state after the global batch
        of each substream that they come from, by its number as text.

    Raises:
        UserError: `position` has another number of substreams, the source cannot be read, or a
            worker process was killed.
    """
    substreams = train.substream_count(total_batch_size)
    per_batch = total_batch_size // substreams
    ranges = [
        SequenceRange(
            substream,
            max(own.start - substream * per_batch, 0),
            min(own.stop - substream * per_batch, per_batch),
        )
        for substream in range(own.start // per_batch, -(-own.stop // per_batch))
    ]
    states = _initial_states(position, substreams, total_batch_size)
    readers = min(workers, len(ranges)) or 1
    cuts = [len(ranges) * reader // readers for reader in range(readers + 1)]
    ranges_of_readers = [ranges[start:stop] for start, stop in itertools.pairwise(cuts)]
    dataset = _StreamDataset(train, ranges_of_readers, states, substreams, per_batch, max_passes)
    items = _read_in_workers(dataset, readers) if workers else dataset.worker_items(0)
    return _join_parts(items, readers, [str(part.substream) for part in ranges])


def _initial_states(
    position: dict | None, substreams: int, total_batch_size: int
) -> list[SubstreamState]:
    """Return the state of each substream. Raises UserError if `position` does not have them."""
    if position is None:
        return [SubstreamState()] * substreams
    found = position.get("lanes")
    if found is None:
        raise UserError(
            "The position to continue from is not one of a stream; give the --dataset it was "
            "trained with, without --stream."
        )
    if len(found) != substreams:
        raise UserError(
            f"The stream to continue was read in {len(found)} substreams, --total_batch_size "
            f"{total_batch_size} makes {substreams}; give the --total_batch_size it was trained "
            "with."
        )
    return [SubstreamState(*found[str(substream)]) for substream in range(substreams)]


class _StreamDataset(torch.utils.data.IterableDataset):
    """What each worker process reads: some of the ranges of a rank."""

    def __init__(
        self,
        train: StreamedSequences,
        ranges_of_workers: list[list[SequenceRange]],
        states: list[SubstreamState],
        substreams: int,
        per_batch: int,
        max_passes: int | None,
    ):
        self.train, self.ranges_of_workers, self.states = train, ranges_of_workers, states
        self.substreams, self.per_batch, self.max_passes = substreams, per_batch, max_passes

    def __iter__(self) -> Iterator[Item]:
        worker = torch.utils.data.get_worker_info()
        assert worker is not None, "the DataLoader iterates over it in worker processes only"
        if worker.num_workers > 1:
            # The workers provide the parallelism; threads in each would compete for the cores.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return self.worker_items(worker.id)

    def worker_items(self, worker: int) -> Iterator[Item]:
        """Yield the batches of one worker; then None at the end of the data, or the UserError."""
        ranges = self.ranges_of_workers[worker]
        starts = [self.states[part.substream] for part in ranges]
        try:
            yield from self.train.batches(
                ranges, starts, self.substreams, self.per_batch, self.max_passes
            )
        except UserError as error:
            yield error  # If a worker raised it, it would arrive wrapped in a traceback.
        yield None


def _join_parts(
    items: Iterator[Item], readers: int, substreams: Iterable[str]
) -> Iterator[tuple[Batch, dict[str, SubstreamState]]]:
    """Join the parts of each global batch that the readers provide in turn.

    Tensors are concatenated; states are returned by the names of their `substreams`.
    """
    while True:
        parts = list(itertools.islice(items, readers))
        for part in parts:
            if isinstance(part, UserError):
                raise part
        if None in parts:
            return
        batches, states = zip(*cast(list[tuple[Batch, list]], parts), strict=True)
        batch = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        all_states = itertools.chain.from_iterable(states)
        yield batch, dict(zip(substreams, all_states, strict=True))


def _read_in_workers(dataset: _StreamDataset, workers: int) -> Iterator[Item]:
    """Yield what worker processes read, one item of each in turn.

    Raises:
        UserError: A worker process was killed.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        # Forked workers would inherit locked threads of the tokenizer, of Arrow and of CUDA.
        multiprocessing_context="spawn",
        worker_init_fn=ReaderStart(),
        # Without a generator torch draws a number from the global one, and a resumed run would
        # have other random numbers than an uninterrupted one.
        generator=torch.Generator(),
    )
    return iterate_loader(loader, "training stream", "--workers")
