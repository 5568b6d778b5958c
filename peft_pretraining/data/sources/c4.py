"""C4 (`allenai/c4`) from the Hugging Face Hub, or from a folder with a copy of its files."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.files import identity_of, signature_of
from peft_pretraining.data.sources.shards import network_errors, read_with_retries
from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import reason_of

if TYPE_CHECKING:
    import datasets

C4 = "allenai/c4"


@dataclass(frozen=True)
class C4Documents:
    """The documents of one split of C4 `en`, read when they are needed.

    The order of the shards is drawn from `seed`; within a shard the documents are in the order of
    the file. C4 is shuffled already, and a shuffle buffer could not be restarted at an exact
    document.

    Attributes:
        folder: A local mirror of the repository. None: read from the Hub.
        split: `train` or `validation`.
        seed: Seed of the order of the shards. None: as they are numbered.
    """

    folder: Path | None
    split: str
    seed: int | None

    @property
    def remote(self) -> bool:
        """Whether the documents come over the network."""
        return self.folder is None

    # Cached, and pickled with the object: each worker process would otherwise ask the Hub for the
    # list of a thousand files.
    @functools.cached_property
    def dataset(self) -> datasets.IterableDataset:
        """The split. Raises UserError if the Hub (or the mirror) cannot be read."""
        import datasets

        try:
            if self.folder is None:
                return datasets.load_dataset(C4, "en", split=self.split, streaming=True)
            files = [str(file) for file in mirror_files(self.folder, self.split)]
            return datasets.load_dataset(
                "json", data_files={self.split: files}, split=self.split, streaming=True
            )
        except _read_errors() as error:
            raise self._user_error(error, "be opened") from error

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return self.dataset.num_shards

    def __iter__(self) -> Iterator[str]:
        for shard in range(self.n_shards):
            yield from read_with_retries(self, shard)

    def read(self, shard: int, skip: int) -> Iterator[str]:
        """Yield the documents of one shard without the first `skip`.

        Args:
            shard: Position of the shard in the order drawn from `seed`.
            skip: Number of documents to leave out at the beginning.

        Raises:
            UserError: A file or a record is broken. Network errors are raised unchanged.
        """
        number = self._shard_order[shard]
        try:
            one_shard = self.dataset.shard(num_shards=self.n_shards, index=number)
            texts_only = one_shard.select_columns(["text"]).with_format("arrow")
            # `iter`, not `__iter__`, which would divide the shards once more among the workers of
            # a torch DataLoader.
            for batch in texts_only.iter(batch_size=1000):
                texts = batch["text"].to_pylist()
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError("a record without a string `text`")
                not_blank = [text for text in texts if text.strip()]
                yield from not_blank[skip:]
                skip = max(skip - len(not_blank), 0)
        except _read_errors() as error:
            if self.remote and isinstance(error, network_errors()):
                raise
            raise self._user_error(error, f"be read to the end of shard {number}") from error

    @functools.cached_property
    def _shard_order(self) -> list[int]:
        import numpy as np

        shards = np.arange(self.n_shards)
        if self.seed is not None:
            shards = np.random.Generator(np.random.PCG64(self.seed)).permutation(shards)
        return shards.tolist()

    def _user_error(self, error: Exception, what: str) -> UserError:
        reason = reason_of(error)
        if self.folder is None:
            return UserError(
                f"The Hugging Face Hub could not be reached for {C4} ({reason}); connect to the "
                "network, or type `--dataset pydocs` or `--dataset FILE` instead."
            )
        return UserError(
            f"The {self.split} split of the C4 mirror {self.folder} could not {what} ({reason}); "
            "fetch that file again."
        )


def _read_errors() -> tuple[type[Exception], ...]:
    """Return what `datasets` raises if the network, a compressed file or a record is broken."""
    import datasets

    return (*network_errors(), ValueError, KeyError, datasets.exceptions.DatasetsError)


def mirror_files(folder: Path, split: str) -> list[Path]:
    """Return the files of one split of a local mirror of the C4 repository, as numbered.

    Raises:
        UserError: There are none.
    """
    files = _files_of_split(folder, split)
    if not files:
        raise UserError(
            f"The C4 mirror {folder} has no en/c4-{split}.*.json.gz; fetch them too, or give "
            "`--validation_file FILE`."
        )
    return files


def _files_of_split(folder: Path, split: str) -> list[Path]:
    return sorted((folder / "en").glob(f"c4-{split}.*.json.gz"))


def open_c4(folder: Path | None, seed: int | None) -> Source:
    """Return C4 as a source.

    Args:
        folder: A local mirror of the repository. None: read from the Hub.
        seed: Seed of the order of the training shards. None: as they are numbered.

    Raises:
        UserError: The training split cannot be opened.
    """
    train, validation = C4Documents(folder, "train", seed), C4Documents(folder, "validation", None)
    train.dataset  # noqa: B018 - opens it, so that an error is raised here
    if folder is None:
        identity = ((f"{C4}/en", 0),)
        return Source(
            "c4", train, validation, streamed=True, signature=identity, file_identity=identity
        )
    files = mirror_files(folder, "train") + _files_of_split(folder, "validation")
    return Source(
        str(folder),
        train,
        validation,
        streamed=True,
        signature=signature_of(files, folder),
        file_identity=identity_of(files),
    )
