"""Batches of a rank: training batches with their position in the data, validation batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.data.sequences import Rows
from peft_pretraining.data.shuffle import RowOrder
from peft_pretraining.data.streaming import StreamedRows, SubstreamState, stream_batches
from peft_pretraining.errors import UserError

Batch = dict[str, torch.Tensor]


# -------------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Step:
    """One rank's part of an update.

    Each of `micro_batches` is `input_ids` and `labels`, int64 [batch_size, max_length]. `rows` says which row of the data each of
    their rows is, int64 [total_batch_size / world_size]: an index of `Rows`; in a stream the how manyth row of the run. `position`,
    which JSON can write, says where the data stands after the update, as far as this rank knows: see `merge_positions`.
    """

    micro_batches: list[Batch]
    rows: np.ndarray
    position: dict


def training_batches(
    train: Rows | StreamedRows,
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
    """This rank's part of one update after another, endless without `max_passes`.

    Goes on from `position` (None: the beginning), which `merge_positions` made of any number of ranks' positions. Rank r has the
    rows [r, r + 1) * total_batch_size / world_size of each global batch, in their order. What a global batch holds depends on
    `seed` and its number alone (for a stream on the seed that it was opened with, and on `total_batch_size`). `workers` processes
    read a stream; of `Rows` a thread reads the next step while one is being used. Raises UserError where the batch sizes do not
    divide, where `position` does not fit the data, and where the data has been gone through `max_passes` times.
    """
    if min(batch_size, total_batch_size) < 1 or total_batch_size % (batch_size * world_size):
        raise UserError(
            f"--total_batch_size {total_batch_size} is not a multiple of --batch_size {batch_size} "
            f"times {world_size} processes; give a multiple of {batch_size * world_size}."
        )
    each = total_batch_size // world_size
    own = range(rank * each, (rank + 1) * each)
    seen = position["rows"] if position else 0
    if isinstance(train, StreamedRows):
        batches = stream_batches(train, position, total_batch_size, own, workers, max_passes)
        parts = _stream_parts(batches, position, seen, total_batch_size, own)
    elif position and "lanes" in position:
        raise UserError(
            "The position to continue from is one of a stream; give the --dataset it was trained with, and --stream."
        )
    else:
        parts = _row_parts(
            train, RowOrder(seed, len(train)), seen, total_batch_size, own, max_passes
        )
        return _prefetch(_steps(parts, seen, total_batch_size, batch_size, pin_memory), pin_memory)
    return _steps(parts, seen, total_batch_size, batch_size, pin_memory)


def merge_positions(positions: list[dict]) -> dict:
    """Where the data stands after an update, of the positions that all ranks have after it: what a checkpoint keeps."""
    merged = dict(positions[0])
    if "lanes" in merged:
        merged["lanes"] = {
            lane: reached for position in positions for lane, reached in position["lanes"].items()
        }
    return merged


def _steps(
    parts: Iterator[tuple[Batch, np.ndarray, dict]],
    seen: int,
    total: int,
    batch_size: int,
    pin_memory: bool,
) -> Iterator[Step]:
    for batch, rows, position in parts:
        yield Step(_micro_batches(batch, batch_size, pin_memory), rows, position)
        seen = position["rows"]
    raise UserError(
        f"The training data ends after {seen // total:,} updates of {total:,} rows; "
        "give more data or fewer --num_training_steps, or leave --max_passes out."
    )


def _prefetch(steps: Iterator[Step], on_gpu: bool) -> Iterator[Step]:
    """The same steps, endless or ended by an error; a thread makes the next one while one is being used.

    Pages of the disk, checksums and pinned copies so cost the training nothing. An error comes in place of its own step.
    """
    # Threads begin on the first GPU; pinning would make a context there for each process of the node.
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if on_gpu else (None, ())
    with ThreadPoolExecutor(1, "data", *device) as thread:
        coming = thread.submit(next, steps)
        while True:
            step = coming.result()
            coming = thread.submit(next, steps)
            yield step


def _micro_batches(batch: Batch, size: int, pin_memory: bool) -> list[Batch]:
    cut = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
    return [
        {
            name: part.pin_memory() if pin_memory else part
            for name, part in zip(batch, parts, strict=True)
        }
        for parts in cut
    ]


def _row_parts(
    train: Rows, order: RowOrder, seen: int, total: int, own: range, max_passes: int | None
) -> Iterator[tuple[Batch, np.ndarray, dict]]:
    """The rows `own` of each global batch, which of the data's rows they are, and the position after the batch."""
    while max_passes is None or seen + total <= max_passes * len(train):
        rows = order.indices(seen + own.start, seen + own.stop)
        seen += total
        yield train.batch(rows), rows, {"rows": seen}


def _stream_parts(
    batches: Iterator[tuple[Batch, dict[str, SubstreamState]]],
    position: dict | None,
    seen: int,
    total: int,
    own: range,
) -> Iterator[tuple[Batch, np.ndarray, dict]]:
    """As `_row_parts`, of a stream."""
    from loguru import logger

    repeated = position is not None and any(
        SubstreamState(*reached).passes for reached in position["lanes"].values()
    )
    for batch, lanes in batches:
        if not repeated and any(reached.passes for reached in lanes.values()):
            repeated = True
            if own.start == 0:  # one rank speaks for all
                logger.warning(
                    "The training stream has ended and begins again: from here on data is seen more than once"
                )
        rows = np.arange(seen + own.start, seen + own.stop)
        seen += total
        yield (
            batch,
            rows,
            {"rows": seen, "lanes": {lane: list(reached) for lane, reached in lanes.items()}},
        )


def validation_batches(
    validation: Rows, batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's share of the validation rows (every `world_size`-th from `rank` on), as `Rows.batch` gives them.

    All batches of all ranks have one shape, and each rank has as many, as compiled and sharded models need it: what is missing is
    filled with rows that have no target. No row comes twice and none is left out.
    """
    own, each = (
        np.arange(rank, len(validation), world_size),
        math.ceil(len(validation) / world_size),
    )
    size = min(batch_size, each)
    for start in range(0, each, size):
        batch = validation.batch(own[start : start + size])
        missing = (0, 0, 0, size - len(batch["labels"]))
        yield {
            name: F.pad(rows, missing, value=IGNORE_INDEX if name == "labels" else 0)
            for name, rows in batch.items()
        }
