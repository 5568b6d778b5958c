"""Training data read while training: in lanes, each of which can be taken up again at any document.

A stream with n shards is read in V lanes: lane v reads the shards v, v + V, v + 2V, ... and begins again at their end. Every
global batch of B rows takes B/V consecutive rows of each lane, lane by lane. V depends on B and n alone, so that a global batch is the
same however it is cut into ranks, processes and micro-batches; and since each process reads only the lanes that it has rows of, no
document is read twice or read only to be thrown away.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from peft_pretraining.data.sequences import Packing, Rows, Shard, offsets_of, packed_batch
from peft_pretraining.data.sources.shards import Shards, read_with_retries
from peft_pretraining.data.tokenizer import Tokenizer
from peft_pretraining.data.workers import loaded
from peft_pretraining.errors import UserError

MAX_SUBSTREAMS = (
    64  # as many as eight ranks with eight processes each can share; each holds a file open
)
CHARACTERS_PER_TOKEN = 4  # of English text, roughly: how much a packed lane reads ahead


class SubstreamState(NamedTuple):
    """Where a lane stands: shards that it has finished in this pass, documents that it has used up in its current shard, tokens
    used of the document after them (packed rows only), and passes through all its shards that are complete."""

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    passes: int = 0


class Document(NamedTuple):
    """A document of a lane, with the positions before and after it."""

    text: str
    before: SubstreamState
    after: SubstreamState


class Block(NamedTuple):
    """The rows [start, stop) among those that a lane gives to each global batch."""

    lane: int
    start: int
    stop: int


@dataclass(frozen=True)
class StreamedRows:
    """Rows read from a stream while training.

    A row is one document, cut or filled up to `max_length` ids, as in `Rows`; with `packing` the documents of a lane, each ended
    by the end-of-sequence id, are joined and cut into windows of `max_length` without any padding.
    """

    documents: Shards
    tokenizer: Tokenizer
    max_length: int
    packing: Packing = False

    def lanes(self, total_batch_size: int) -> int:
        """The number of lanes: the greatest divisor of the global batch that is neither above `MOST_LANES` nor the number of shards."""
        most = min(MAX_SUBSTREAMS, self.documents.n_shards)
        return max(lanes for lanes in range(1, most + 1) if total_batch_size % lanes == 0)

    def parts(
        self,
        blocks: list[Block],
        starts: list[SubstreamState],
        lanes: int,
        each: int,
        max_passes: int | None = None,
    ) -> Iterator[tuple[dict[str, torch.Tensor], list[SubstreamState]]]:
        """The rows of these blocks of one global batch after another, and where each block's lane stands after the batch.

        Rows are `input_ids` and `labels`, int64 [rows of all blocks, max_length], in the order of the blocks. Lane
        `blocks[i].lane` of `lanes` goes on from `starts[i]` and gives `each` rows to every global batch. Ends where a lane has
        too few left of its `max_passes` passes (None: never). Raises UserError for a lane without a document.
        """
        sources = []
        for block, start in zip(blocks, starts, strict=True):
            documents = self._documents(block.lane, lanes, start, max_passes)
            sources.append(
                self._windows(documents, each)
                if self.packing
                else ((text, after) for text, _, after in documents)
            )
        while True:
            rows, positions = [], []
            for block, source in zip(blocks, sources, strict=True):
                found = list(itertools.islice(source, each))
                if len(found) < each:
                    return
                rows += [row for row, _ in found[block.start : block.stop]]
                positions.append(found[-1][1])
            yield self._batch(rows), positions

    def _documents(
        self, lane: int, lanes: int, start: SubstreamState, max_passes: int | None
    ) -> Iterator[Document]:
        """The documents of a lane from a position on, pass after pass."""
        shards = range(lane, self.documents.n_shards, lanes)
        before = start
        while max_passes is None or before.passes < max_passes:
            empty = (
                before.shards == before.documents == 0
            )  # a pass taken up in its middle may find nothing left
            for finished in range(before.shards, len(shards)):
                for text, last in _with_last(
                    read_with_retries(self.documents, shards[finished], before.documents)
                ):
                    # With its last document a shard is finished: it is not opened again to find nothing left in it.
                    shard, documents = (
                        (finished + 1, 0) if last else (finished, before.documents + 1)
                    )
                    after = SubstreamState(shard, documents, 0, before.passes)
                    yield Document(text, before, after)
                    before, empty = after, False
                before = SubstreamState(finished + 1, 0, 0, before.passes)
            if empty:
                raise UserError(
                    f"Lane {lane} of {lanes} of the training stream, {len(shards)} of its {self.documents.n_shards} shards, "
                    "holds no document; give more or larger files, or leave --stream out."
                )
            before = SubstreamState(passes=before.passes + 1)

    def _windows(
        self, documents: Iterator[Document], each: int
    ) -> Iterator[tuple[np.ndarray, SubstreamState]]:
        """The joined documents in windows, each int64 [max_length], and where their lane stands after it."""
        window, filled = np.empty(self.max_length, np.int64), 0
        for document, ids in self._encoded(
            documents, CHARACTERS_PER_TOKEN * self.max_length * each
        ):
            used = document.before.tokens
            while used < len(ids):
                taken = min(len(ids) - used, self.max_length - filled)
                window[filled : filled + taken] = ids[used : used + taken]
                used, filled = used + taken, filled + taken
                if filled == self.max_length:
                    yield (
                        window.copy(),
                        document.after
                        if used == len(ids)
                        else document.before._replace(tokens=used),
                    )
                    filled = 0

    def _encoded(
        self, documents: Iterator[Document], characters: int
    ) -> Iterator[tuple[Document, np.ndarray]]:
        """Each document with its ids (int32 [tokens]); so many characters of text are encoded at once, on the tokenizer's threads."""
        while batch := _first_characters(documents, characters):
            tokens, lengths = self.tokenizer.encode([document.text for document in batch])
            yield from zip(batch, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True)

    def _batch(self, rows: list[str] | list[np.ndarray]) -> dict[str, torch.Tensor]:
        if self.packing:
            return packed_batch(
                np.stack(rows), self.tokenizer.eos_id if self.packing == "within" else None
            )
        tokens, lengths = self.tokenizer.encode(rows)
        shard = Shard(tokens, offsets_of(lengths))
        return Rows((shard,), self.max_length, self.tokenizer.pad_id, self.tokenizer.eos_id).batch(
            np.arange(len(rows))
        )


def _with_last(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each text, and whether it is the last."""
    for text in texts:
        for following in texts:
            yield text, False
            text = following
        yield text, True


def _first_characters(documents: Iterator[Document], characters: int) -> list[Document]:
    """The fewest next documents that have so many characters together; those that there are at the end."""
    found = []
    for document in documents:
        found.append(document)
        characters -= len(document.text)
        if characters <= 0:
            break
    return found


# ------------------------------------------------------------------------------------------------- a rank's part of the batches


def stream_batches(
    train: StreamedRows,
    position: dict | None,
    total_batch_size: int,
    rows: range,
    workers: int,
    max_passes: int | None,
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, SubstreamState]]]:
    """The `rows` of one global batch after another, and where each lane that they come from stands after that batch.

    Goes on from the "lanes" of `position` (None: the beginning) and ends where the data ends. Up to `workers` processes read, one
    for each lane at the most; 0: none but this one. Raises UserError for a position in other lanes than the batch size makes, and
    for whatever the data is to blame for, a process that was killed among it.
    """
    lanes = train.lanes(total_batch_size)
    each = total_batch_size // lanes
    touched = range(rows.start // each, -(-rows.stop // each))
    blocks = [
        Block(lane, max(rows.start - lane * each, 0), min(rows.stop - lane * each, each))
        for lane in touched
    ]
    starts = _starts(position, lanes, total_batch_size)
    shares = min(workers, len(blocks)) or 1
    cuts = [len(blocks) * share // shares for share in range(shares + 1)]
    parts = _Parts(
        train, [blocks[a:b] for a, b in itertools.pairwise(cuts)], starts, lanes, each, max_passes
    )
    return _joined(
        _loaded(parts, shares) if workers else parts.share(0),
        shares,
        [str(block.lane) for block in blocks],
    )


def _starts(position: dict | None, lanes: int, total_batch_size: int) -> list[SubstreamState]:
    """The position of each lane. UserError where `position` is not one of so many lanes."""
    if position is None:
        return [SubstreamState()] * lanes
    found = position.get("lanes")
    if found is None:
        raise UserError(
            "The position to continue from is not one of a stream; give the --dataset it was trained with, without --stream."
        )
    if len(found) != lanes:
        raise UserError(
            f"The stream to continue was read in {len(found)} lanes, --total_batch_size {total_batch_size} makes {lanes}; "
            "give the --total_batch_size it was trained with."
        )
    return [SubstreamState(*found[str(lane)]) for lane in range(lanes)]


class _Parts(torch.utils.data.IterableDataset):
    """What each worker process reads: its share of the blocks."""

    def __init__(
        self,
        train: StreamedRows,
        shares: list[list[Block]],
        starts: list[SubstreamState],
        lanes: int,
        each: int,
        max_passes: int | None,
    ):
        self.train, self.shares, self.starts = train, shares, starts
        self.lanes, self.each, self.max_passes = lanes, each, max_passes

    def __iter__(self) -> Iterator:
        info = torch.utils.data.get_worker_info()
        if info.num_workers > 1:
            os.environ["TOKENIZERS_PARALLELISM"] = (
                "false"  # the workers are the parallelism; threads in each would fight for the cores
            )
        return self.share(info.id)

    def share(
        self, index: int
    ) -> Iterator[tuple[dict[str, torch.Tensor], list[SubstreamState]] | UserError | None]:
        """`StreamedRows.parts` of one share; then None where the data ends, or the UserError that ends it."""
        blocks = self.shares[index]
        try:
            yield from self.train.parts(
                blocks,
                [self.starts[block.lane] for block in blocks],
                self.lanes,
                self.each,
                self.max_passes,
            )
        except UserError as error:
            yield error  # raised in a worker, it would arrive wrapped in a traceback
        yield None


def _joined(
    items: Iterator, shares: int, lanes: list[str]
) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, SubstreamState]]]:
    """The parts of each global batch, put together: the tensors one after another, the positions by the names of their `lanes`."""
    while True:
        parts = list(itertools.islice(items, shares))
        for part in parts:
            if isinstance(part, UserError):
                raise part
        if None in parts:
            return
        batches, positions = zip(*parts, strict=True)
        batch = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        yield batch, dict(zip(lanes, itertools.chain.from_iterable(positions), strict=True))


def _loaded(parts: _Parts, workers: int) -> Iterator:
    """What `workers` processes read, one item of each in turn. UserError where one of them is killed."""
    loader = torch.utils.data.DataLoader(
        parts,
        batch_size=None,
        num_workers=workers,
        # Forked workers would inherit locked threads of the tokenizer, Arrow and CUDA.
        multiprocessing_context="spawn",
        generator=torch.Generator(),  # otherwise torch draws from the global generator, and a resumed run drifts from a straight one
    )
    return loaded(loader, "training stream", "--workers")
