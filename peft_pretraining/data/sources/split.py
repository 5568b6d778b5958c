"""Split documents into training and validation documents."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.files import open_files
from peft_pretraining.data.sources.shards import Shards
from peft_pretraining.errors import UserError
from peft_pretraining.utils.cache import expanded

HELD_OUT_FRACTION = 0.01


@dataclass(frozen=True)
class Split:
    """Training and validation documents that have no document in common.

    Attributes:
        train: The training documents.
        validation: The validation documents.
        rule: How they were split: ("hash", fraction), ("own",) or ("file", signature of the
            validation file). Part of the fingerprint of the data.
        file_identity: Of the validation file, as in `Source`.
    """

    train: Iterable[str]
    validation: Iterable[str]
    rule: tuple
    file_identity: tuple = ()


@dataclass(frozen=True)
class FilteredDocuments:
    """The documents for which `keep` returns True, in the same order and the same shards."""

    documents: Shards
    keep: Callable[[str], bool]

    def __iter__(self) -> Iterator[str]:
        return filter(self.keep, iter(self.documents))

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return self.documents.n_shards

    @property
    def remote(self) -> bool:
        """Whether the documents come over the network."""
        return self.documents.remote

    def read(self, shard: int, skip: int) -> Iterator[str]:
        """Yield the documents of one shard without the first `skip` that are kept."""
        return itertools.islice(filter(self.keep, self.documents.read(shard, 0)), skip, None)


def text_digest(text: str) -> bytes:
    """Return 16 bytes that identify a text, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_in_fraction(text: str, fraction: float, inside: bool = True) -> bool:
    """Return whether the hash of a document puts it into a given fraction of all documents.

    Args:
        text: The document.
        fraction: From 0 to 1.
        inside: False: return whether the document is outside the fraction.
    """
    return (int.from_bytes(text_digest(text)[:8], "big") < fraction * 2**64) == inside


def _is_not_among(text: str, digests: frozenset[bytes]) -> bool:
    return text_digest(text) not in digests


def split_documents(
    source: Source, validation_file: str | None = None, fraction: float = HELD_OUT_FRACTION
) -> Split:
    """Split a source into training and validation documents that have no text in common.

    Args:
        source: The documents.
        validation_file: Use these validation documents, whatever split the source has.
        fraction: If the source has no split of its own either, hold out this fraction of its
            documents, chosen by their hash.

    Raises:
        UserError: The validation file cannot be read.
    """
    # Documents of all sources that are split by filtering can be read shard by shard.
    train = cast(Shards, source.train)
    if validation_file is not None:
        own = open_files(expanded(validation_file), "--validation_file")
        kept = FilteredDocuments(train, _not_among(own.train))
        return Split(kept, own.train, ("file", own.signature), own.file_identity)
    if source.validation is None:
        outside, inside = (
            functools.partial(is_in_fraction, fraction=fraction, inside=inside)
            for inside in (False, True)
        )
        return Split(
            FilteredDocuments(train, outside),
            FilteredDocuments(train, inside),
            ("hash", fraction),
        )
    if source.streamed:
        return Split(source.train, source.validation, ("own",))  # C4's published split.
    kept = FilteredDocuments(train, _not_among(source.validation))
    return Split(kept, source.validation, ("own",))


def _not_among(documents: Iterable[str]) -> Callable[[str], bool]:
    """Return a function, which can be pickled, that is True for texts not among the documents."""
    return functools.partial(_is_not_among, digests=frozenset(map(text_digest, documents)))


def empty_split_error(empty: str, name: str, rule: Sequence) -> UserError:
    """Return the error for a source whose training or validation set is empty.

    Args:
        empty: `training` or `validation`.
        name: Name of the source.
        rule: `Split.rule`.
    """
    if rule[0] == "hash":
        return UserError(
            f"{name} is too small to hold out {rule[1]:.0%} of its documents: the {empty} set is "
            "empty; give `--validation_file FILE`."
        )
    if empty == "training":
        return UserError(
            f"Every training document of {name} is in the validation set too; give another "
            "`--validation_file`."
        )
    return UserError(
        f"The validation set of {name} encodes to no tokens; give another `--validation_file`."
    )
