"""Micro-batches of images.

The content of a batch depends only on the seed and on its position in the run: it does not depend
on the number of ranks, on worker processes or on restarts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from peft_pretraining.data.shuffle import ShuffledIndices
from peft_pretraining.data.workers import ReaderStart, iterate_loader
from peft_pretraining.errors import UserError
from peft_pretraining.utils.seeding import AUGMENTATION, seed_everything
from peft_pretraining.vision.datasets import ArrayImages, FolderImages

Batch = dict[str, Tensor]
# (transformed image, or None if it was unreadable; label; messages about unreadable images), or the
# error that ends the run. The error is an item like any other, because an exception raised in a
# worker process would arrive wrapped in that process's traceback.
Sample: TypeAlias = tuple[Tensor | None, int, list[str]] | UserError


class _Samples(torch.utils.data.Dataset):
    """Transformed images.

    Args:
        images: the images.
        transform: PIL image -> tensor.
        skip_bad: skip images that cannot be read instead of ending the run.
    """

    def __init__(self, images: FolderImages | ArrayImages, transform: Callable, skip_bad: bool):
        self.images, self.transform, self.skip_bad = images, transform, skip_bad

    def _read(self, index: int) -> Sample:
        try:
            image = self.images.read(index)
        except UserError as error:
            return (None, -1, [str(error)]) if self.skip_bad else error
        return self.transform(image), int(self.images.labels[index]), []


class TrainingSamples(_Samples):
    """Augmented images, indexed by (epoch, index).

    The random numbers of the augmentation depend only on the seed, the epoch and the index.

    Args:
        images: the training images.
        transform: PIL image -> tensor.
        skip_bad: replace an image that cannot be read by the next one instead of ending the run.
        seed: seed of the run.
    """

    def __init__(
        self, images: FolderImages | ArrayImages, transform: Callable, skip_bad: bool, seed: int
    ):
        super().__init__(images, transform, skip_bad)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        skipped: list[str] = []
        for _ in range(len(self.images)):
            seed_everything(self.seed, AUGMENTATION, epoch, index)
            sample = self._read(index)
            if isinstance(sample, UserError):
                return sample
            image, label, problems = sample
            if image is not None:
                return image, label, skipped
            skipped += problems
            # The next image replaces it, so that the batch keeps its size.
            index = (index + 1) % len(self.images)
        return UserError(f"no training image can be read; the first: {skipped[0]}")


class ValidationSamples(_Samples):
    """Images as they are evaluated, by index."""

    def __getitem__(self, index: int) -> Sample:
        return self._read(index)


def collate(samples: list[Sample]) -> dict | UserError:
    """Return a batch of samples, or the first error among them.

    Returns:
        images: [n, 3, height, width]. labels: int64 [n]. bad: messages about images that were
        skipped.
    """
    images, labels, bad = [], [], []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        image, label, problems = sample
        bad += problems
        if image is not None:
            images.append(image)
            labels.append(label)
    return {
        "images": torch.stack(images) if images else torch.empty(0),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "bad": bad,
    }


@dataclass(frozen=True)
class MicroBatches:
    """The (epoch, index) of the images in each micro-batch of one rank, without end.

    Update t of an epoch takes the images [t * total, (t + 1) * total) of the epoch's order, and
    rank r the r-th part of them. The images at the end of an epoch that do not fill an update are
    not used in that epoch.

    Args:
        order: order of the images in each epoch.
        update: the first update, counted from 0.
        total_batch_size: images of an update, over all ranks.
        batch_size: images of a micro-batch.
        rank: this rank.
        world_size: number of ranks.
    """

    order: ShuffledIndices
    update: int
    total_batch_size: int
    batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_rank = self.total_batch_size // self.world_size
        for update in itertools.count(self.update):
            epoch, t = divmod(update, self.order.n // self.total_batch_size)
            start = epoch * self.order.n + t * self.total_batch_size + self.rank * per_rank
            for first in range(start, start + per_rank, self.batch_size):
                indices = self.order.indices(first, first + self.batch_size)
                yield [(epoch, int(index)) for index in indices]


def training_steps(
    samples: TrainingSamples,
    *,
    update: int,
    total_batch_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of one update after another, without end.

    Args:
        samples: the training images.
        update: the first update, counted from 0.
        total_batch_size: images of an update, over all ranks.
        batch_size: images of a micro-batch.
        rank: this rank.
        world_size: number of ranks.
        workers: number of processes that read images.
        pin_memory: put batches into pinned memory.

    Raises:
        UserError: if an image cannot be read.
    """
    order = ShuffledIndices(samples.seed, len(samples.images))
    micro_batches = MicroBatches(order, update, total_batch_size, batch_size, rank, world_size)
    batches = _load_batches(samples, micro_batches, workers, pin_memory, "training images")
    while True:
        yield list(itertools.islice(batches, total_batch_size // (batch_size * world_size)))


def validation_batches(
    samples: ValidationSamples,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """Yield this rank's validation images: every `world_size`-th one, starting at `rank`.

    Over all ranks each image comes exactly once. Arguments as in `training_steps`.

    Raises:
        UserError: if an image cannot be read.
    """
    own = range(rank, len(samples.images), world_size)
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    return _load_batches(samples, batches, workers, pin_memory, "validation images")


def _load_batches(
    samples: _Samples, indices: Iterable, workers: int, pin_memory: bool, content: str
) -> Iterator[Batch]:
    """Yield the batches of these indices. content: what is read, for error messages."""
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=indices,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ReaderStart(),
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise torch draws from the global generator
    )
    for batch in iterate_loader(loader, content, "--num_workers"):
        if isinstance(batch, UserError):
            raise batch
        for message in batch.pop("bad"):
            _warn_skipped(message)
        yield batch


def _warn_skipped(message: str) -> None:
    from loguru import logger

    logger.warning(f"skipped: {message.removesuffix(', or give --skip_bad_images')}")
