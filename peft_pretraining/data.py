"""The data of a run: from the names on the command line to batches, the same for any number of ranks and workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.rows import RowOrder, Rows, cached_rows, tokenize_rows
from peft_pretraining.sources import Source, Split, cache_folder, open_source, split_documents
from peft_pretraining.stream import LanePosition, StreamedRows, stream_batches
from peft_pretraining.tokenization import Tokenizer, load_tokenizer

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """What a run trains and is evaluated on.

    `fingerprint` is equal for equal data (sources' names and sizes, tokenizer, split, row length), on any machine: a checkpoint
    keeps it, so that a run is not continued on other data unnoticed. `description` is one line for the log.
    """

    tokenizer: Tokenizer
    train: Rows | StreamedRows
    validation: Rows
    fingerprint: str
    description: str


def load_data(
    dataset: str,
    tokenizer: str,
    vocab_size: int,
    max_length: int,
    seed: int,
    target_eval_tokens: int | None,
    validation_file: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    stream: bool = False,
    first: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Data:
    """Opens a source, its tokenizer and its rows, making and caching what is not there yet.

    `max_length` is in tokens; `target_eval_tokens` bounds the validation set (None: all of it). With `stream`
    training documents are read while training, as C4's always are. `first` gives a context in which rank 0 runs before the other
    ranks, who then find the caches. Raises UserError for everything that the user can put right.
    """
    if max_length < 2:
        raise UserError(f"--max_length {max_length} leaves no token to predict; give 2 or more.")
    if seed < 0:
        raise UserError(f"--seed {seed} is negative; give 0 or more.")
    cache = cache_folder(cache_dir)
    with first():
        source = open_source(dataset, seed, cache)
        split = split_documents(source, validation_file)
        stamp = [source.stamp, split.rule, split.stamp]
        sample = split.train
        if source.streamed and tokenizer == "bpe":  # in an order without a seed: runs with different seeds need the same tokenizer
            sample = split_documents(open_source(dataset, None, cache), validation_file).train
        tokens = load_tokenizer(tokenizer, vocab_size, sample, cache, _hash(stamp))
        streamed = source.streamed or stream
        if not streamed:
            rows = cached_rows({"train": split.train, "validation": split.validation}, stamp, tokens, max_length, cache)
            train, validation = rows["train"], rows["validation"].head(target_eval_tokens)
    if streamed:  # outside `first`: the ranks share no cache here, so none has to wait for another
        train = StreamedRows(split.train, tokens, max_length)
        validation = tokenize_rows(split.validation, tokens, max_length, target_eval_tokens)
    _check_not_empty(source, split, train, validation)
    fingerprint = _hash([source.signature, split.rule, tokens.content_hash, max_length])
    return Data(tokens, train, validation, fingerprint, _describe(source, split, train, validation, tokens))


def _hash(content: object) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def _check_not_empty(source: Source, split: Split, train: Rows | StreamedRows, validation: Rows) -> None:
    empty = "training" if isinstance(train, Rows) and len(train) == 0 else "validation" if len(validation) == 0 else None
    if empty is None:
        return
    if split.rule[0] == "hash":
        share = f"{split.rule[1]:.0%} of its documents"
        raise UserError(f"{source.name} is too small to hold out {share}: the {empty} set is empty; give `--validation_file FILE`.")
    if empty == "training":
        raise UserError(f"Every training document of {source.name} is in the validation set too; give another `--validation_file`.")
    raise UserError(f"The tokenizer makes nothing of the validation set of {source.name}; give another `--validation_file`.")


def _describe(source: Source, split: Split, train: Rows | StreamedRows, validation: Rows, tokenizer: Tokenizer) -> str:
    amount = "streamed"
    if isinstance(train, Rows):
        entropy = f"unigram entropy {train.unigram_entropy():.3f} nats"
        amount = f"{len(train):,} documents, {int(train.lengths.sum()):,} tokens a pass, {entropy}"
    origin = {"hash": "held out by hash", "own": "its own split", "file": "from a file"}[split.rule[0]]
    held_out = f"{len(validation):,} documents, {validation.target_tokens:,} target tokens, {origin}"
    return f"{source.name}, {amount}; validation: {held_out}; tokenizer {tokenizer.name}"


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
    read a stream; `Rows` are quick to read and need none. Raises UserError where the batch sizes do not divide, where `position`
    does not fit the data, and where the data has been gone through `max_passes` times.
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
        raise UserError("The position to continue from is one of a stream; give the --dataset it was trained with, and --stream.")
    else:
        parts = _row_parts(train, RowOrder(seed, len(train)), seen, total_batch_size, own, max_passes)
    return _steps(parts, seen, total_batch_size, batch_size, pin_memory)


def merge_positions(positions: list[dict]) -> dict:
    """Where the data stands after an update, of the positions that all ranks have after it: what a checkpoint keeps."""
    merged = dict(positions[0])
    if "lanes" in merged:
        merged["lanes"] = {lane: reached for position in positions for lane, reached in position["lanes"].items()}
    return merged


def _steps(parts: Iterator[tuple[Batch, np.ndarray, dict]], seen: int, total: int, batch_size: int, pin_memory: bool) -> Iterator[Step]:
    for batch, rows, position in parts:
        yield Step(_micro_batches(batch, batch_size, pin_memory), rows, position)
        seen = position["rows"]
    raise UserError(
        f"The training data ends after {seen // total:,} updates of {total:,} rows; "
        "give more data or fewer --num_training_steps, or leave --max_passes out."
    )


def _micro_batches(batch: Batch, size: int, pin_memory: bool) -> list[Batch]:
    cut = zip(*(tensor.split(size) for tensor in batch.values()), strict=True)
    return [{name: part.pin_memory() if pin_memory else part for name, part in zip(batch, parts, strict=True)} for parts in cut]


def _row_parts(
    train: Rows, order: RowOrder, seen: int, total: int, own: range, max_passes: int | None
) -> Iterator[tuple[Batch, np.ndarray, dict]]:
    """The rows `own` of each global batch, which of the data's rows they are, and the position after the batch."""
    while max_passes is None or seen + total <= max_passes * len(train):
        rows = order.indices(seen + own.start, seen + own.stop)
        seen += total
        yield train.batch(rows), rows, {"rows": seen}


def _stream_parts(
    batches: Iterator[tuple[Batch, dict[str, LanePosition]]], position: dict | None, seen: int, total: int, own: range
) -> Iterator[tuple[Batch, np.ndarray, dict]]:
    """As `_row_parts`, of a stream."""
    from loguru import logger

    repeated = position is not None and any(LanePosition(*reached).passes for reached in position["lanes"].values())
    for batch, lanes in batches:
        if not repeated and any(reached.passes for reached in lanes.values()):
            repeated = True
            if own.start == 0:  # one rank speaks for all
                logger.warning("The training stream has ended and begins again: from here on data is seen more than once")
        rows = np.arange(seen + own.start, seen + own.stop)
        seen += total
        yield batch, rows, {"rows": seen, "lanes": {lane: list(reached) for lane, reached in lanes.items()}}


def validation_batches(validation: Rows, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's share of the validation rows (every `world_size`-th from `rank` on), as `Rows.batch` gives them.

    The last batch may be shorter; a rank may have none. No row comes twice and none is left out.
    """
    own = np.arange(rank, len(validation), world_size)
    for start in range(0, len(own), batch_size):
        yield validation.batch(own[start : start + batch_size])
