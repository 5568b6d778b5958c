"""Open or prepare a local source in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.split import Split
from peft_pretraining.data.tokenized.format import FORMAT, INDEX
from peft_pretraining.data.tokenized.reader import Prepared, open_prepared
from peft_pretraining.data.tokenized.writer import prepare
from peft_pretraining.data.tokenizer import Tokenizer

MIN_BYTES_FOR_MULTIPROCESSING = 50_000_000  # bytes: a fast tokenizer makes them ids in a quarter of a minute, four times what processes take to start


def open_or_prepare(source: Source, split: Split, tokenizer: Tokenizer, cache: Path) -> Prepared:
    """The documents of a local source as prepared data in the cache, which is made or finished where it is not."""
    key = [FORMAT, file_identity(source, split), tokenizer.content_hash, tokenizer.vocab_size]
    folder = cache / "prepared" / short_hash(key)
    if not (folder / INDEX).exists():
        prepare(source, split, tokenizer, folder, processes=tokenizing_processes(source))
    return open_prepared(folder, remedy=f"delete {folder} and start again")


def file_identity(source: Source, split: Split) -> list:
    return [source.stamp, split.rule, split.stamp]


def short_hash(content: object) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=12).hexdigest()


def tokenizing_processes(source: Source) -> int:
    """As many as there are cores, unless the source is so small that starting them takes longer than it saves."""
    size = sum(file[1] for file in source.stamp)
    return os.cpu_count() or 1 if source.streamed or size > MIN_BYTES_FOR_MULTIPROCESSING else 1
