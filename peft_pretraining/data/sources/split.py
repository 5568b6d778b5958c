"""Split documents into training and validation documents."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.files import open_files
from peft_pretraining.data.sources.shards import Shards
from peft_pretraining.errors import UserError

HELD_OUT_SHARE = 0.01


@dataclass(frozen=True)
class Split:
    """Two sets of documents that share none, and the rule that parted them (goes into fingerprints)."""

    train: Iterable[str]
    validation: Iterable[str]
    rule: tuple
    stamp: tuple = ()


# ---------------------------------------------------------------------------------------------------------- training/validation


@dataclass(frozen=True)
class Filtered:
    """The documents for which `keep` is true, in their order and in the same shards."""

    documents: Shards
    keep: Callable[[str], bool]

    def __iter__(self) -> Iterator[str]:
        return filter(self.keep, iter(self.documents))

    @property
    def n_shards(self) -> int:
        return self.documents.n_shards

    @property
    def remote(self) -> bool:
        return self.documents.remote

    def read(self, shard: int, skip: int) -> Iterator[str]:
        return itertools.islice(filter(self.keep, self.documents.read(shard, 0)), skip, None)


def digest(text: str) -> bytes:
    """Sixteen bytes that stand for a document's text, the same on every machine."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def in_share(text: str, share: float, inside: bool = True) -> bool:
    """Whether the hash of a document puts it into (or, with `inside` False, outside) a given share of all documents."""
    return (int.from_bytes(digest(text)[:8], "big") < share * 2**64) == inside


def _not_among(text: str, digests: frozenset[bytes]) -> bool:
    return digest(text) not in digests


def split_documents(
    source: Source, validation_file: str | None = None, share: float = HELD_OUT_SHARE
) -> Split:
    """Parts a source into training and validation documents that have no text in common.

    A validation file goes before the source's own split, and that before a share of the documents chosen by their hash.
    Raises UserError where the validation file cannot be read.
    """
    if validation_file is not None:
        own = open_files(Path(validation_file).expanduser(), "--validation_file")
        digests = frozenset(map(digest, own.train))
        train = Filtered(source.train, functools.partial(_not_among, digests=digests))
        return Split(train, own.train, ("file", own.signature), own.stamp)
    if source.validation is None:
        kept, held_out = (
            functools.partial(in_share, share=share, inside=inside) for inside in (False, True)
        )
        return Split(
            Filtered(source.train, kept), Filtered(source.train, held_out), ("hash", share)
        )
    if source.streamed:
        return Split(source.train, source.validation, ("own",))  # C4's published split, as it is
    digests = frozenset(map(digest, source.validation))
    return Split(
        Filtered(source.train, functools.partial(_not_among, digests=digests)),
        source.validation,
        ("own",),
    )


def empty_split_error(empty: str, name: str, rule: Sequence) -> UserError:
    """What to say where the `training` or `validation` set of the source of that name, parted by that rule, holds nothing."""
    if rule[0] == "hash":
        share = f"{rule[1]:.0%} of its documents"
        return UserError(
            f"{name} is too small to hold out {share}: the {empty} set is empty; give `--validation_file FILE`."
        )
    if empty == "training":
        return UserError(
            f"Every training document of {name} is in the validation set too; give another `--validation_file`."
        )
    return UserError(
        f"The tokenizer makes nothing of the validation set of {name}; give another `--validation_file`."
    )
