"""The data of a run: from the names on the command line to batches, the same for any number of ranks and workers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from peft_pretraining.errors import UserError
from peft_pretraining.data.shuffle import RowOrder
from peft_pretraining.data.tokenized.writer import FORMAT, INDEX, Prepared, is_prepared, open_prepared, prepare
from peft_pretraining.data.sequences import IGNORED, Packing, Rows, tokenize_rows
from peft_pretraining.data.sources.files import Source, Split, cache_folder, empty_split_error, open_source, split_documents
from peft_pretraining.data.streaming import LanePosition, StreamedRows, stream_batches
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer


Batch = dict[str, torch.Tensor]
DEFAULT_TOKENIZER = "t5-base"
WORTH_PROCESSES = 50_000_000  # bytes: a fast tokenizer makes them ids in a quarter of a minute, four times what processes take to start


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
    tokenizer: str | None,
    vocab_size: int,
    max_length: int,
    seed: int,
    target_eval_tokens: int | None,
    validation_file: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    stream: bool = False,
    packing: Packing = False,
    first: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Data:
    """Opens a source, its tokenizer and its rows, making and caching what is not there yet; or a folder of prepared data.

    `tokenizer` None is the one of the prepared folder, else `DEFAULT_TOKENIZER`; `max_length` is in tokens; `target_eval_tokens` bounds
    the validation set (None: all of it). With `stream` training documents are read while training, as C4's always are. `packing` (see
    `Rows`) is for training and validation. `first` gives a context in which rank 0 runs before the other ranks, who then find the
    caches. Raises UserError for everything that the user can put right.
    """
    if max_length < 2:
        raise UserError(f"--max_length {max_length} leaves no token to predict; give 2 or more.")
    if seed < 0:
        raise UserError(f"--seed {seed} is negative; give 0 or more.")
    folder = Path(dataset).expanduser()
    if is_prepared(folder):
        if validation_file is not None:
            raise UserError(f"{folder} was prepared with its own validation set: give --validation_file to the prepare command instead.")
        prepared = open_prepared(folder)
        tokens = _tokenizer_of(prepared, tokenizer, vocab_size)
        return _prepared_data(prepared, tokens, max_length, target_eval_tokens, packing)
    cache = cache_folder(cache_dir)
    with first():
        source, split, tokens = open_documents(dataset, tokenizer, vocab_size, seed, validation_file, cache)
        streamed = source.streamed or stream
        if not streamed:
            prepared = _cached(source, split, tokens, cache)
    if not streamed:
        return _prepared_data(prepared, tokens, max_length, target_eval_tokens, packing)
    # Outside `first`: the ranks share no cache here, so none has to wait for another.
    train = StreamedRows(split.train, tokens, max_length, packing)
    validation = tokenize_rows(split.validation, tokens, max_length, target_eval_tokens, packing)
    if len(validation) == 0:
        raise empty_split_error("validation", source.name, split.rule)
    fingerprint = _hash([source.signature, split.rule, tokens.content_hash, max_length, packing])
    return Data(tokens, train, validation, fingerprint, _describe(source.name, split.rule, train, validation, tokens))


def open_documents(
    dataset: str, tokenizer: str | None, vocab_size: int, seed: int, validation_file: str | None, cache: Path
) -> tuple[Source, Split, Tokenizer]:
    """The source that `dataset` names, its two sets of documents and the tokenizer, which may have to be trained on them."""
    name = tokenizer or DEFAULT_TOKENIZER
    source = open_source(dataset, seed, cache)
    split = split_documents(source, validation_file)
    sample = split.train
    if source.streamed and name == "bpe":  # in an order without a seed: runs with different seeds need the same tokenizer
        sample = split_documents(open_source(dataset, None, cache), validation_file).train
    return source, split, load_tokenizer(name, vocab_size, sample, cache, _hash(_stamp(source, split)))


def tokenizing_processes(source: Source) -> int:
    """As many as there are cores, unless the source is so small that starting them takes longer than it saves."""
    size = sum(file[1] for file in source.stamp)
    return os.cpu_count() or 1 if source.streamed or size > WORTH_PROCESSES else 1


def _cached(source: Source, split: Split, tokenizer: Tokenizer, cache: Path) -> Prepared:
    """The documents of a local source as prepared data in the cache, which is made or finished where it is not."""
    key = [FORMAT, _stamp(source, split), tokenizer.content_hash, tokenizer.vocab_size]
    folder = cache / "prepared" / _hash(key)
    if not (folder / INDEX).exists():
        prepare(source, split, tokenizer, folder, processes=tokenizing_processes(source))
    return open_prepared(folder, remedy=f"delete {folder} and start again")


def _tokenizer_of(prepared: Prepared, name: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a prepared folder; UserError where `name` (None: not given) is another."""
    tokenizer = prepared.tokenizer(vocab_size)
    stored = prepared.index["tokenizer"]
    if name is None or name == stored["name"] == "bpe":  # a BPE of a corpus cannot be named otherwise
        return tokenizer
    if name == "bpe" or load_tokenizer(name, stored["vocab_size"], (), prepared.folder, "").content_hash != tokenizer.content_hash:
        raise UserError(
            f"{prepared.folder} was prepared with the tokenizer {stored['name']}, not with --tokenizer {name}; "
            "leave --tokenizer out, or prepare the data anew with it."
        )
    return tokenizer


def _prepared_data(prepared: Prepared, tokenizer: Tokenizer, max_length: int, target_eval_tokens: int | None, packing: Packing) -> Data:
    index = prepared.index
    train, validation = (prepared.rows(name, max_length, packing) for name in ("train", "validation"))
    for name, rows in (("training", train), ("validation", validation)):
        if len(rows) == 0:  # a prepared set holds a document, but packed rows are whole
            longest = max(len(shard.tokens) for shard in rows.shards)
            raise UserError(
                f"The {name} set of {index['source']} has {longest:,} tokens: too few for --packing; give a --max_length up to that."
            )
    validation = validation.head(target_eval_tokens)
    content = [index["signature"], index["split_rule"], tokenizer.content_hash, max_length, packing]
    if index["max_tokens"] is not None or index["seed"] is not None:  # which part of the source it is
        content.append([index["max_tokens"], index["seed"]])
    return Data(tokenizer, train, validation, _hash(content), _describe(index["source"], index["split_rule"], train, validation, tokenizer))


def _stamp(source: Source, split: Split) -> list:
    return [source.stamp, split.rule, split.stamp]


def _hash(content: object) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def _describe(name: str, rule: Sequence, train: Rows | StreamedRows, validation: Rows, tokenizer: Tokenizer) -> str:
    amount = "streamed"
    if isinstance(train, Rows):
        entropy = f"unigram entropy {train.unigram_entropy():.3f} nats"
        amount = f"{_size(train)}, {int(train.lengths.sum()):,} tokens a pass, {entropy}"
    origin = {"hash": "held out by hash", "own": "its own split", "file": "from a file"}[rule[0]]
    held_out = f"{_size(validation)}, {validation.target_tokens:,} target tokens, {origin}"
    return f"{name}, {amount}; validation: {held_out}; tokenizer {tokenizer.name}"


def _size(rows: Rows) -> str:
    return f"{len(rows):,} packed rows" if rows.packing else f"{len(rows):,} documents"


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
        raise UserError("The position to continue from is one of a stream; give the --dataset it was trained with, and --stream.")
    else:
        parts = _row_parts(train, RowOrder(seed, len(train)), seen, total_batch_size, own, max_passes)
        return _one_ahead(_steps(parts, seen, total_batch_size, batch_size, pin_memory), pin_memory)
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


def _one_ahead(steps: Iterator[Step], on_gpu: bool) -> Iterator[Step]:
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

    All batches of all ranks have one shape, and each rank has as many, as compiled and sharded models need it: what is missing is
    filled with rows that have no target. No row comes twice and none is left out.
    """
    own, each = np.arange(rank, len(validation), world_size), math.ceil(len(validation) / world_size)
    size = min(batch_size, each)
    for start in range(0, each, size):
        batch = validation.batch(own[start : start + size])
        missing = (0, 0, 0, size - len(batch["labels"]))
        yield {name: F.pad(rows, missing, value=IGNORED if name == "labels" else 0) for name, rows in batch.items()}
