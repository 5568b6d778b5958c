"""What a source of documents is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `train` and `validation` are re-iterable (`validation` is None where the source has no split of its own). `streamed` says
    that the corpus is read while training rather than tokenised beforehand. `signature` is (name, bytes) of every file, equal
    on every machine that has the same files; `stamp` adds paths and times and identifies the files on this machine.
    """

    name: str
    train: Iterable[str]
    validation: Iterable[str] | None
    streamed: bool
    signature: tuple
    stamp: tuple
