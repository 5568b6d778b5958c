"""The data of a run: from the names on the command line to token sequences and a tokenizer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft_pretraining.data.sequences import Packing, Sequences, tokenize_documents
from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.registry import open_source
from peft_pretraining.data.sources.shards import Shards
from peft_pretraining.data.sources.split import Split, empty_split_error, split_documents
from peft_pretraining.data.streaming import StreamedSequences
from peft_pretraining.data.tokenized.cache import corpus_identity, open_or_prepare, short_hash
from peft_pretraining.data.tokenized.format import is_prepared
from peft_pretraining.data.tokenized.reader import PreparedData, open_prepared
from peft_pretraining.data.tokenizer import Tokenizer, load_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.utils.cache import cache_folder, expanded

DEFAULT_TOKENIZER = "t5-base"


@dataclass(frozen=True)
class Data:
    """What a run is trained and evaluated on.

    Attributes:
        tokenizer: The tokenizer.
        train: The training data.
        validation: The validation data.
        fingerprint: Equal for equal data (names and sizes of the source's files, tokenizer, split,
            sequence length, packing) on any machine. A checkpoint stores it, so that a run is not
            continued on other data unnoticed.
        description: One line for the log.
    """

    tokenizer: Tokenizer
    train: Sequences | StreamedSequences
    validation: Sequences
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
    cache_dir: str | os.PathLike[str] | None = None,
    stream: bool = False,
    packing: Packing = False,
    rank_zero_first: Callable[
        [], contextlib.AbstractContextManager[object]
    ] = contextlib.nullcontext,
) -> Data:
    """Open a folder of prepared data, or a source, which is tokenized and cached if necessary.

    Args:
        dataset: A folder of prepared data, or a source (see `open_source`).
        tokenizer: Name of the tokenizer (see `load_tokenizer`). None: the one of the prepared data,
            or `DEFAULT_TOKENIZER`.
        vocab_size: Number of embeddings of the model.
        max_length: Tokens per sequence.
        seed: Seed of the order of a streamed source.
        target_eval_tokens: Use the fewest validation sequences with that many targets. None: all.
        validation_file: Use the documents of this file for validation.
        cache_dir: See `cache_folder`.
        stream: Read the training documents while training, as is always done for C4.
        packing: See `sequences.Packing`; for training and validation.
        rank_zero_first: Returns a context in which rank 0 runs before the other ranks, which then
            find what it has cached.

    Raises:
        UserError: An argument is wrong, or the data cannot be read.
    """
    if max_length < 2:
        raise UserError(f"--max_length {max_length} leaves no token to predict; give 2 or more.")
    if seed < 0:
        raise UserError(f"--seed {seed} is negative; give 0 or more.")
    folder = expanded(dataset)
    if is_prepared(folder):
        if validation_file is not None:
            raise UserError(
                f"{folder} was prepared with its own validation set: give --validation_file to "
                "the prepare command instead."
            )
        prepared = open_prepared(folder)
        stored_tokenizer = _tokenizer_of(prepared, tokenizer, vocab_size)
        return _prepared_data(prepared, stored_tokenizer, max_length, target_eval_tokens, packing)
    cache = cache_folder(cache_dir)
    cached: PreparedData | None = None
    with rank_zero_first():
        source, split, loaded_tokenizer = open_documents(
            dataset, tokenizer, vocab_size, seed, validation_file, cache
        )
        if not (source.streamed or stream):
            cached = open_or_prepare(source, split, loaded_tokenizer, cache)
    if cached is not None:
        return _prepared_data(
            cached, loaded_tokenizer, max_length, target_eval_tokens, packing, source.files
        )
    # Outside `rank_zero_first`: nothing is cached here, so that no rank has to wait for another.
    train = StreamedSequences(cast(Shards, split.train), loaded_tokenizer, max_length, packing)
    validation = tokenize_documents(
        split.validation, loaded_tokenizer, max_length, target_eval_tokens, packing
    )
    if len(validation) == 0:
        raise empty_split_error("validation", source.name, split.rule)
    content = [source.signature, split.rule, loaded_tokenizer.content_hash, max_length, packing]
    return Data(
        loaded_tokenizer,
        train,
        validation,
        short_hash(content),
        _describe(source.name, split.rule, train, validation, loaded_tokenizer, source.files),
    )


def open_documents(
    dataset: str,
    tokenizer: str | None,
    vocab_size: int,
    seed: int,
    validation_file: str | None,
    cache: Path,
) -> tuple[Source, Split, Tokenizer]:
    """Return a source, its training and validation documents, and the tokenizer.

    The tokenizer `bpe` is trained on the training documents if it is not in `cache`.

    Args: see `load_data`.

    Raises:
        UserError: The source or the tokenizer cannot be opened.
    """
    name = tokenizer or DEFAULT_TOKENIZER
    source = open_source(dataset, seed, cache)
    split = split_documents(source, validation_file)
    sample = split.train
    if source.streamed and name == "bpe":
        # Runs with different seeds need the same tokenizer, so it is trained on the documents in
        # an order without a seed.
        sample = split_documents(open_source(dataset, None, cache), validation_file).train
    fingerprint = short_hash(corpus_identity(source, split))
    return source, split, load_tokenizer(name, vocab_size, sample, cache, fingerprint)


def _tokenizer_of(prepared: PreparedData, name: str | None, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of prepared data.

    Raises:
        UserError: The user gave the name of another one.
    """
    tokenizer = prepared.tokenizer(vocab_size)
    stored = prepared.index["tokenizer"]
    if name is None or name == stored["name"] == "bpe":
        return tokenizer  # A BPE that was trained on a corpus has no other name.
    if name != "bpe":
        given = load_tokenizer(name, stored["vocab_size"], (), prepared.folder, "")
        if given.content_hash == tokenizer.content_hash:
            return tokenizer
    raise UserError(
        f"{prepared.folder} was prepared with the tokenizer {stored['name']}, not with "
        f"--tokenizer {name}; leave --tokenizer out, or prepare the data anew with it."
    )


def _describe(
    name: str,
    rule: Sequence,
    train: Sequences | StreamedSequences,
    validation: Sequences,
    tokenizer: Tokenizer,
    files: str,
) -> str:
    if isinstance(train, Sequences):
        amount = (
            f"{_size(train)}, {int(train.lengths.sum()):,} tokens a pass, "
            f"unigram entropy {train.unigram_entropy():.3f} nats"
        )
    else:
        amount = "streamed"
    origin = {"hash": "held out by hash", "own": "its own split", "file": "from a file"}[rule[0]]
    held_out = f"{_size(validation)}, {validation.target_tokens:,} target tokens, {origin}"
    read = f"{files}; " if files else ""
    return f"{name}, {amount}; {read}validation: {held_out}; tokenizer {tokenizer.name}"


def _size(sequences: Sequences) -> str:
    kind = "packed sequences" if sequences.packing else "documents"
    return f"{len(sequences):,} {kind}"


def _prepared_data(
    prepared: PreparedData,
    tokenizer: Tokenizer,
    max_length: int,
    target_eval_tokens: int | None,
    packing: Packing,
    files: str = "",
) -> Data:
    index = prepared.index
    train, validation = (
        prepared.sequences(split, max_length, packing) for split in ("train", "validation")
    )
    for name, sequences in (("training", train), ("validation", validation)):
        if len(sequences) == 0:
            # Prepared data contains at least one document, but packed sequences must be complete.
            longest = max(len(shard.tokens) for shard in sequences.shards)
            raise UserError(
                f"The {name} set of {index['source']} has {longest:,} tokens: too few for "
                "--packing; give a --max_length up to that."
            )
    validation = validation.head(target_eval_tokens)
    content = [index["signature"], index["split_rule"], tokenizer.content_hash, max_length, packing]
    if index["max_tokens"] is not None or index["seed"] is not None:
        content.append([index["max_tokens"], index["seed"]])  # Which part of the source it is.
    return Data(
        tokenizer,
        train,
        validation,
        short_hash(content),
        _describe(index["source"], index["split_rule"], train, validation, tokenizer, files),
    )
