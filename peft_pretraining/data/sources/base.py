"""The data type of a source of documents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    A document is a string. `train` and `validation` can be iterated over again from the start, give
    the same order each time and on each machine, and can be pickled, so that a data-loading process
    can read them by itself.

    Attributes:
        name: The name by which the user called it.
        train: The training documents.
        validation: The validation documents. None: the source has no split of its own.
        streamed: The documents are read while training instead of being tokenized beforehand.
        signature: (name, bytes) of each file; equal on all machines that have the same files.
        file_identity: (path, bytes, ...) of each file, with its modification time; identifies the
            files on this machine.
        files: A part of the log line: which files of a folder are read, and which are left out and
            why. Empty for other sources.
    """

    name: str
    train: Iterable[str]
    validation: Iterable[str] | None
    streamed: bool
    signature: tuple
    file_identity: tuple
    files: str = ""
