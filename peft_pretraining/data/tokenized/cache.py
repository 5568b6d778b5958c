"""Open a local source as tokenized data in the cache folder, tokenizing it at the first time."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.split import Split
from peft_pretraining.data.tokenized.format import FORMAT_VERSION, INDEX_FILE
from peft_pretraining.data.tokenized.reader import PreparedData, open_prepared
from peft_pretraining.data.tokenized.writer import prepare
from peft_pretraining.data.tokenizer import Tokenizer

# A fast tokenizer encodes that many bytes in a quarter of a minute, four times as long as processes
# take to start.
MIN_BYTES_FOR_MULTIPROCESSING = 50_000_000


def open_or_prepare(
    source: Source, split: Split, tokenizer: Tokenizer, cache: Path
) -> PreparedData:
    """Return the documents of a local source as tokenized data.

    The folder in `cache` is made if it does not exist, and completed if it is incomplete.

    Raises:
        UserError: The folder cannot be written, is damaged, or a set of documents is empty.
    """
    key = [
        FORMAT_VERSION,
        corpus_identity(source, split),
        tokenizer.content_hash,
        tokenizer.vocab_size,
    ]
    folder = cache / "prepared" / short_hash(key)
    if not (folder / INDEX_FILE).exists():
        prepare(source, split, tokenizer, folder, processes=default_processes(source))
    return open_prepared(folder, remedy=f"delete {folder} and start again")


def corpus_identity(source: Source, split: Split) -> list:
    """Return what identifies the documents on this machine: files, split, validation file."""
    return [source.file_identity, split.rule, split.file_identity]


def short_hash(content: object) -> str:
    """Return a hash of 24 hexadecimal digits of anything that JSON can represent."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def default_processes(source: Source) -> int:
    """Return the number of tokenizing processes: one per core, or 1 for a small source."""
    size = sum(file[1] for file in source.file_identity)
    if source.streamed or size > MIN_BYTES_FOR_MULTIPROCESSING:
        return os.cpu_count() or 1
    return 1
