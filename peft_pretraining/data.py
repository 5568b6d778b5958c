"""The data of a run: from the names on the command line to batches, the same for any number of ranks and workers."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.order import RowOrder
from peft_pretraining.prepared import FORMAT, INDEX, Prepared, is_prepared, open_prepared, prepare
from peft_pretraining.rows import Rows, StreamedRows, tokenize_rows
from peft_pretraining.sources import Source, Split, cache_folder, empty_split_error, open_source, split_documents
from peft_pretraining.tokenization import Tokenizer, load_tokenizer

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
    packing: bool = False,
    first: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Data:
    """Opens a source, its tokenizer and its rows, making and caching what is not there yet; or a folder of prepared data.

    `tokenizer` None is the one of the prepared folder, else `DEFAULT_TOKENIZER`; `max_length` is in tokens; `target_eval_tokens` bounds
    the validation set (None: all of it); `packing` gives rows without padding, in training and validation. `first` gives a context
    in which rank 0 runs before the other ranks, who then find the caches. Raises UserError for everything that the user can put right.
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
        if not source.streamed:
            prepared = _cached(source, split, tokens, cache)
    if not source.streamed:
        return _prepared_data(prepared, tokens, max_length, target_eval_tokens, packing)
    # Outside `first`: the ranks share no cache here, so none has to wait for another.
    if packing:
        raise UserError(f"--packing needs data on disk: prepare {dataset} with `python -m peft_pretraining.prepare_data` first.")
    train = StreamedRows(split.train, tokens, max_length)
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


def _prepared_data(prepared: Prepared, tokenizer: Tokenizer, max_length: int, target_eval_tokens: int | None, packing: bool) -> Data:
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
class Slices:
    """Which positions of the data one rank reads: of the global batch t (positions [t * total, (t + 1) * total)), micro-batch a
    of rank r is the `batch_size` positions from t * total + (a * world_size + r) * batch_size on."""

    total_batch_size: int
    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        each = self.batch_size * self.world_size
        if self.batch_size < 1 or self.total_batch_size < 1 or self.total_batch_size % each:
            raise UserError(
                f"--total_batch_size {self.total_batch_size} is not a multiple of --batch_size {self.batch_size} "
                f"times {self.world_size} processes; give a multiple of {each}."
            )

    def starts(self, step: int) -> list[int]:
        """First position of each of this rank's micro-batches in one optimizer step."""
        first = step * self.total_batch_size + self.rank * self.batch_size
        return list(range(first, (step + 1) * self.total_batch_size, self.batch_size * self.world_size))


class _StreamedBatches(torch.utils.data.IterableDataset):
    """The micro-batches of one rank, without end; worker w of W gives every W-th from the w-th on, and torch deals them out in turn."""

    def __init__(self, train: StreamedRows, slices: Slices, start_step: int):
        self.train, self.slices, self.start_step = train, slices, start_step

    def __iter__(self) -> Iterator[Batch | UserError]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism; threads in each would fight for the cores
        starts = itertools.chain.from_iterable(map(self.slices.starts, itertools.count(self.start_step)))
        own = itertools.islice(starts, worker, None, workers)
        try:
            yield from self.train.batches(own, self.slices.batch_size, warn=worker == 0 and self.slices.rank == 0)
        except UserError as error:
            yield error  # raised in a worker, it would arrive wrapped in a traceback


def training_batches(
    train: Rows | StreamedRows,
    *,
    seed: int,
    start_step: int,
    total_batch_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """Endless training data: each item is one optimizer step, the list of this rank's micro-batches from `start_step` on.

    Each micro-batch is `input_ids` and `labels`, int64 [batch_size, max_length]. The rows of a step depend on `seed` and the step
    alone (those of a stream on the seed that it was opened with). `workers` processes read a stream; `Rows` are quick to read and
    need none. Raises UserError where the batch sizes do not divide.
    """
    slices = Slices(total_batch_size, batch_size, rank, world_size)
    if isinstance(train, Rows):
        steps = _row_steps(train, RowOrder(seed, len(train)), slices, start_step)
    else:
        steps = _stream_steps(train, slices, start_step, workers)
    if pin_memory:
        return ([{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in step] for step in steps)
    return steps


def _row_steps(train: Rows, order: RowOrder, slices: Slices, start_step: int) -> Iterator[list[Batch]]:
    for step in itertools.count(start_step):
        yield [train.batch(order.indices(start, start + slices.batch_size)) for start in slices.starts(step)]


def _stream_steps(train: StreamedRows, slices: Slices, start_step: int, workers: int) -> Iterator[list[Batch]]:
    from loguru import logger

    if start_step and slices.rank == 0:
        logger.info(f"Skipping the {start_step * slices.total_batch_size:,} documents of the first {start_step:,} steps")
    batches = iter(
        torch.utils.data.DataLoader(
            _StreamedBatches(train, slices, start_step),
            batch_size=None,
            num_workers=workers,
            # Forked workers would inherit locked threads of the tokenizer, Arrow and CUDA.
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator(),  # otherwise torch draws from the global generator, and a resumed run drifts from a straight one
        )
    )
    accumulation = len(slices.starts(0))
    while True:
        step = []
        for batch in itertools.islice(batches, accumulation):
            if isinstance(batch, UserError):
                raise batch
            step.append(batch)
        yield step


def validation_batches(validation: Rows, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's share of the validation rows (every `world_size`-th from `rank` on), as `Rows.batch` gives them.

    The last batch may be shorter; a rank may have none. No row comes twice and none is left out.
    """
    own = np.arange(rank, len(validation), world_size)
    for start in range(0, len(own), batch_size):
        yield validation.batch(own[start : start + batch_size])
