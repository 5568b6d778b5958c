"""Batches of a rank: training batches with their position in the data, and validation batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.data.sequences import Sequences
from peft_pretraining.data.shuffle import ShuffledIndices
from peft_pretraining.data.streaming import StreamedSequences, SubstreamState, stream_batches
from peft_pretraining.errors import UserError

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """The data of one update on one rank.

    Attributes:
        micro_batches: Each has `input_ids` and `labels`, int64 [batch_size, max_length].
        indices: Which sequences they are, int64 [total_batch_size / world_size]: indices of
            `Sequences`; for a stream the index of the sequence within the run.
        position: The position in the data after the update, as far as this rank knows it; can be
            written as JSON. See `merge_positions`.
    """

    micro_batches: list[Batch]
    indices: np.ndarray
    position: dict


def training_batches(
    train: Sequences | StreamedSequences,
    *,
    seed: int,
    position: dict | None,
    total_batch_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int = 0,
    pin_memory: bool = False,
    max_passes: int | None = None,
) -> Iterator[Step]:
    """Yield this rank's part of one update after another.

    Rank r gets the sequences [r, r + 1) * total_batch_size / world_size of each global batch. A
    global batch depends only on `seed` and its number; for a stream on the seed that it was opened
    with and on `total_batch_size`.

    Args:
        train: The training data.
        seed: Seed of the order of `Sequences`.
        position: Where to continue: the result of `merge_positions`, of any number of ranks.
            None: from the beginning.
        total_batch_size: Sequences in a global batch.
        batch_size: Sequences in a micro-batch.
        rank: This rank.
        world_size: Number of ranks.
        workers: Number of worker processes that read a stream. For `Sequences` a thread reads the
            next step while the current one is used.
        pin_memory: Put the tensors into page-locked memory.
        max_passes: Passes through the data. None: without end.

    Raises:
        UserError: The batch sizes do not divide, `position` does not fit the data, the data is
            damaged, or it has ended after `max_passes` passes.
    """
    if min(batch_size, total_batch_size) < 1 or total_batch_size % (batch_size * world_size):
        raise UserError(
            f"--total_batch_size {total_batch_size} is not a multiple of --batch_size {batch_size} "
            f"times {world_size} processes; give a multiple of {batch_size * world_size}."
        )
    per_rank = total_batch_size // world_size
    own = range(rank * per_rank, (rank + 1) * per_rank)
    # "rows" and "lanes" are the names in checkpoints of sequences seen and substreams.
    seen = position["rows"] if position else 0
    if isinstance(train, StreamedSequences):
        batches = stream_batches(train, position, total_batch_size, own, workers, max_passes)
        parts = _streamed_parts(batches, position, seen, total_batch_size, own)
        return _steps(parts, seen, total_batch_size, batch_size, pin_memory)
    if position and "lanes" in position:
        raise UserError(
            "The position to continue from is one of a stream; give the --dataset it was trained "
            "with, and --stream."
        )
    order = ShuffledIndices(seed, len(train))
    parts = _indexed_parts(train, order, seen, total_batch_size, own, max_passes)
    return _prefetch(_steps(parts, seen, total_batch_size, batch_size, pin_memory), pin_memory)


def merge_positions(positions: list[dict]) -> dict:
    """Return the position of the data after an update, for a checkpoint.

    Args:
        positions: The positions of all ranks after that update.
    """
    merged = dict(positions[0])
    if "lanes" in merged:
        merged["lanes"] = {
            substream: state
            for position in positions
            for substream, state in position["lanes"].items()
        }
    return merged


def _steps(
    parts: Iterator[tuple[Batch, np.ndarray, dict]],
    seen: int,
    total_batch_size: int,
    batch_size: int,
    pin_memory: bool,
) -> Iterator[Step]:
    """Split this rank's part of each global batch into micro-batches.

    Raises:
        UserError: The data has ended.
    """
    for batch, indices, position in parts:
        yield Step(_micro_batches(batch, batch_size, pin_memory), indices, position)
        seen = position["rows"]
    raise UserError(
        f"The training data ends after {seen // total_batch_size:,} updates of "
        f"{total_batch_size:,} sequences; give more data or fewer --num_training_steps, or leave "
        "--max_passes out."
    )


def _prefetch(steps: Iterator[Step], on_gpu: bool) -> Iterator[Step]:
    """Yield the steps unchanged, while a thread prepares the next one.

    Reading from the disk, checksums and page-locked copies then take no time from the training. An
    error is raised in place of its step.

    Args:
        steps: The steps; must end with an error or not at all.
        on_gpu: The thread uses the current CUDA device.
    """
    # Otherwise the thread would use the first GPU, and page-locked memory would create a CUDA
    # context there for each process of the machine.
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if on_gpu else (None, ())
    with ThreadPoolExecutor(1, "data", *device) as thread:
        future = thread.submit(next, steps)
        while True:
            step = future.result()
            future = thread.submit(next, steps)
            yield step


def _micro_batches(batch: Batch, batch_size: int, pin_memory: bool) -> list[Batch]:
    split = zip(*(tensor.split(batch_size) for tensor in batch.values()), strict=True)
    return [
        {
            name: part.pin_memory() if pin_memory else part
            for name, part in zip(batch, parts, strict=True)
        }
        for parts in split
    ]


def _indexed_parts(
    train: Sequences,
    order: ShuffledIndices,
    seen: int,
    total_batch_size: int,
    own: range,
    max_passes: int | None,
) -> Iterator[tuple[Batch, np.ndarray, dict]]:
    """Yield the sequences `own` of each global batch, their indices, and the position after it."""
    while max_passes is None or seen + total_batch_size <= max_passes * len(train):
        indices = order.indices(seen + own.start, seen + own.stop)
        seen += total_batch_size
        yield train.batch(indices), indices, {"rows": seen}


def _streamed_parts(
    batches: Iterator[tuple[Batch, dict[str, SubstreamState]]],
    position: dict | None,
    seen: int,
    total_batch_size: int,
    own: range,
) -> Iterator[tuple[Batch, np.ndarray, dict]]:
    """Do the same as `_indexed_parts` for a stream; warn when data is used a second time."""
    from loguru import logger

    warned = position is not None and any(
        SubstreamState(*state).passes for state in position["lanes"].values()
    )
    for batch, states in batches:
        if not warned and any(state.passes for state in states.values()):
            warned = True
            if own.start == 0:  # Warn on one rank only.
                logger.warning(
                    "The training stream has ended and begins again: from here on data is seen "
                    "more than once"
                )
        indices = np.arange(seen + own.start, seen + own.stop)
        seen += total_batch_size
        lanes = {substream: list(state) for substream, state in states.items()}
        yield batch, indices, {"rows": seen, "lanes": lanes}


def validation_batches(
    validation: Sequences, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Yield this rank's validation sequences: every `world_size`-th, starting with `rank`.

    All batches of all ranks have the same shape, and all ranks have the same number of batches, as
    compiled and sharded models need it. Missing sequences are filled with ones that have no target.
    Each sequence occurs exactly once.

    Args:
        validation: The validation data.
        batch_size: Sequences in a batch, at most.
        rank: This rank.
        world_size: Number of ranks.

    Yields:
        `input_ids` and `labels`, int64 [batch, max_length], as `Sequences.batch` returns them.
    """
    own = np.arange(rank, len(validation), world_size)
    per_rank = math.ceil(len(validation) / world_size)
    batch_size = min(batch_size, per_rank)
    for start in range(0, per_rank, batch_size):
        batch = validation.batch(own[start : start + batch_size])
        missing = batch_size - len(batch["labels"])
        yield {
            name: F.pad(tensor, (0, 0, 0, missing), value=IGNORE_INDEX if name == "labels" else 0)
            for name, tensor in batch.items()
        }
