"""C4 (`allenai/c4`) from the Hugging Face Hub, or from a folder with a copy of its files."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.files import C4
from peft_pretraining.data.sources.shards import network_errors, read_with_retries
from peft_pretraining.errors import UserError

# ------------------------------------------------------------------------------------------------------------------------- C4


@dataclass(frozen=True)
class C4Documents:
    """C4 `en`, read as it is needed: from the Hub (`folder` None) or from a local mirror of its repository.

    The shards come in an order drawn from `seed` (None: as numbered), the documents of a shard in file order: C4 is shuffled
    already, and a shuffle buffer could not be restarted at an exact document.
    """

    folder: Path | None
    split: str
    seed: int | None

    @property
    def remote(self) -> bool:
        return self.folder is None

    @functools.cached_property  # once, also for the processes that this is pickled for: each would ask the Hub for a thousand files
    def stream(self):
        """The split as a `datasets.IterableDataset`. UserError where the Hub (or the mirror) cannot be read."""
        import datasets

        try:
            if self.folder is None:
                return datasets.load_dataset(C4, "en", split=self.split, streaming=True)
            files = [str(file) for file in mirror_files(self.folder, self.split)]
            return datasets.load_dataset(
                "json", data_files={self.split: files}, split=self.split, streaming=True
            )
        except _stream_errors() as error:
            raise self._failure(error, "be opened") from error

    @property
    def n_shards(self) -> int:
        return self.stream.num_shards

    def __iter__(self) -> Iterator[str]:
        for shard in range(self.n_shards):
            yield from read_with_retries(self, shard)

    def read(self, shard: int, skip: int) -> Iterator[str]:
        """The documents of the shard that comes at this place of the order, without the first `skip`.

        Raises UserError for a broken file or record; what the network is to blame for is raised as it is.
        """
        number = self._order[shard]
        try:
            part = (
                self.stream.shard(num_shards=self.n_shards, index=number)
                .select_columns(["text"])
                .with_format("arrow")
            )
            # `iter`, not `__iter__`: the latter divides the shards once more among the workers of a torch DataLoader.
            for batch in part.iter(batch_size=1000):
                texts = batch["text"].to_pylist()
                if not all(isinstance(text, str) for text in texts):
                    raise ValueError("a record without a string `text`")
                filled = [text for text in texts if text.strip()]
                yield from filled[skip:]
                skip = max(skip - len(filled), 0)
        except _stream_errors() as error:
            if self.remote and isinstance(error, network_errors()):
                raise
            raise self._failure(error, f"be read to the end of shard {number}") from error

    @functools.cached_property
    def _order(self) -> list[int]:
        import numpy as np

        shards = np.arange(self.n_shards)
        if self.seed is not None:
            shards = np.random.Generator(np.random.PCG64(self.seed)).permutation(shards)
        return shards.tolist()

    def _failure(self, error: Exception, what: str) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        if self.folder is None:
            return UserError(
                f"The Hugging Face Hub could not be reached for {C4} ({reason}); connect to the network, "
                "or type `--dataset pydocs` or `--dataset FILE` instead."
            )
        return UserError(
            f"The {self.split} split of the C4 mirror {self.folder} could not {what} ({reason}); fetch that file again."
        )


def _stream_errors() -> tuple[type[Exception], ...]:
    """What `datasets` lets through when the network, a compressed file or a record is broken."""
    import datasets

    return (*network_errors(), ValueError, KeyError, datasets.exceptions.DatasetsError)


def mirror_files(folder: Path, split: str) -> list[Path]:
    """The shards of one split of a local mirror of the C4 repository, as numbered. UserError where it has none."""
    files = sorted((folder / "en").glob(f"c4-{split}.*.json.gz"))
    if not files:
        raise UserError(
            f"The C4 mirror {folder} has no en/c4-{split}.*.json.gz; fetch them too, or give `--validation_file FILE`."
        )
    return files


def open_c4(folder: Path | None, seed: int) -> Source:
    """C4 from the Hub (`folder` None) or a mirror. UserError where the training split cannot be opened."""
    train, validation = C4Documents(folder, "train", seed), C4Documents(folder, "validation", None)
    train.stream  # noqa: B018 - opens it
    if folder is None:
        signature = stamp = ((f"{C4}/en", 0),)
        return Source("c4", train, validation, streamed=True, signature=signature, stamp=stamp)
    files = mirror_files(folder, "train") + sorted((folder / "en").glob("c4-validation.*.json.gz"))
    signature = tuple((file.relative_to(folder).as_posix(), file.stat().st_size) for file in files)
    stamp = tuple(
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    )
    return Source(str(folder), train, validation, streamed=True, signature=signature, stamp=stamp)
