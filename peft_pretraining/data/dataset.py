"""The data of a run: from the names on the command line to batches, the same for any number of ranks and workers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining.data.sequences import Packing, Rows, tokenize_rows
from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.registry import open_source
from peft_pretraining.data.sources.split import Split, empty_split_error, split_documents
from peft_pretraining.data.streaming import StreamedRows
from peft_pretraining.data.tokenized.cache import file_identity, open_or_prepare, short_hash
from peft_pretraining.data.tokenized.format import is_prepared
from peft_pretraining.data.tokenized.reader import Prepared, open_prepared
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.utils.cache import cache_folder

DEFAULT_TOKENIZER = "t5-base"


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
            raise UserError(
                f"{folder} was prepared with its own validation set: give --validation_file to the prepare command instead."
            )
        prepared = open_prepared(folder)
        tokens = _tokenizer_of(prepared, tokenizer, vocab_size)
        return _prepared_data(prepared, tokens, max_length, target_eval_tokens, packing)
    cache = cache_folder(cache_dir)
    with first():
        source, split, tokens = open_documents(
            dataset, tokenizer, vocab_size, seed, validation_file, cache
        )
        streamed = source.streamed or stream
        if not streamed:
            prepared = open_or_prepare(source, split, tokens, cache)
    if not streamed:
        return _prepared_data(prepared, tokens, max_length, target_eval_tokens, packing)
    # Outside `first`: the ranks share no cache here, so none has to wait for another.
    train = StreamedRows(split.train, tokens, max_length, packing)
    validation = tokenize_rows(split.validation, tokens, max_length, target_eval_tokens, packing)
    if len(validation) == 0:
        raise empty_split_error("validation", source.name, split.rule)
    fingerprint = short_hash(
        [source.signature, split.rule, tokens.content_hash, max_length, packing]
    )
    return Data(
        tokens,
        train,
        validation,
        fingerprint,
        _describe(source.name, split.rule, train, validation, tokens),
    )


def open_documents(
    dataset: str,
    tokenizer: str | None,
    vocab_size: int,
    seed: int,
    validation_file: str | None,
    cache: Path,
) -> tuple[Source, Split, Tokenizer]:
    """The source that `dataset` names, its two sets of documents and the tokenizer, which may have to be trained on them."""
    name = tokenizer or DEFAULT_TOKENIZER
    source = open_source(dataset, seed, cache)
    split = split_documents(source, validation_file)
    sample = split.train
    if (
        source.streamed and name == "bpe"
    ):  # in an order without a seed: runs with different seeds need the same tokenizer
        sample = split_documents(open_source(dataset, None, cache), validation_file).train
    return (
        source,
        split,
        load_tokenizer(name, vocab_size, sample, cache, short_hash(file_identity(source, split))),
    )


def _tokenizer_of(prepared: Prepared, name: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a prepared folder; UserError where `name` (None: not given) is another."""
    tokenizer = prepared.tokenizer(vocab_size)
    stored = prepared.index["tokenizer"]
    if (
        name is None or name == stored["name"] == "bpe"
    ):  # a BPE of a corpus cannot be named otherwise
        return tokenizer
    if (
        name == "bpe"
        or load_tokenizer(name, stored["vocab_size"], (), prepared.folder, "").content_hash
        != tokenizer.content_hash
    ):
        raise UserError(
            f"{prepared.folder} was prepared with the tokenizer {stored['name']}, not with --tokenizer {name}; "
            "leave --tokenizer out, or prepare the data anew with it."
        )
    return tokenizer


def _describe(
    name: str, rule: Sequence, train: Rows | StreamedRows, validation: Rows, tokenizer: Tokenizer
) -> str:
    amount = "streamed"
    if isinstance(train, Rows):
        entropy = f"unigram entropy {train.unigram_entropy():.3f} nats"
        amount = f"{_size(train)}, {int(train.lengths.sum()):,} tokens a pass, {entropy}"
    origin = {"hash": "held out by hash", "own": "its own split", "file": "from a file"}[rule[0]]
    held_out = f"{_size(validation)}, {validation.target_tokens:,} target tokens, {origin}"
    return f"{name}, {amount}; validation: {held_out}; tokenizer {tokenizer.name}"


def _size(rows: Rows) -> str:
    return f"{len(rows):,} packed rows" if rows.packing else f"{len(rows):,} documents"


def _prepared_data(
    prepared: Prepared,
    tokenizer: Tokenizer,
    max_length: int,
    target_eval_tokens: int | None,
    packing: Packing,
) -> Data:
    index = prepared.index
    train, validation = (
        prepared.rows(name, max_length, packing) for name in ("train", "validation")
    )
    for name, rows in (("training", train), ("validation", validation)):
        if len(rows) == 0:  # a prepared set holds a document, but packed rows are whole
            longest = max(len(shard.tokens) for shard in rows.shards)
            raise UserError(
                f"The {name} set of {index['source']} has {longest:,} tokens: too few for --packing; give a --max_length up to that."
            )
    validation = validation.head(target_eval_tokens)
    content = [index["signature"], index["split_rule"], tokenizer.content_hash, max_length, packing]
    if (
        index["max_tokens"] is not None or index["seed"] is not None
    ):  # which part of the source it is
        content.append([index["max_tokens"], index["seed"]])
    return Data(
        tokenizer,
        train,
        validation,
        short_hash(content),
        _describe(index["source"], index["split_rule"], train, validation, tokenizer),
    )
