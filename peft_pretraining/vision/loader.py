"""Images to batches. What a batch holds is a function of the seed and its place in the run alone: not of ranks, workers or restarts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peft_pretraining.data.shuffle import ShuffledIndices
from peft_pretraining.data.workers import iterate_loader
from peft_pretraining.errors import UserError
from peft_pretraining.vision.datasets import ArrayImages, FolderImages

if TYPE_CHECKING:
    pass
from peft_pretraining.vision.seeding import AUGMENTATION, seed_everything

Batch = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------------------- batches


class _Samples(torch.utils.data.Dataset):
    """Transformed images: (image, label, names of the bad images left out), or the UserError that ends the run."""

    def __init__(self, images: FolderImages | ArrayImages, transform: Callable, skip_bad: bool):
        self.images, self.transform, self.skip_bad = images, transform, skip_bad

    def _read(self, index: int) -> tuple[Tensor | None, int, list[str]] | UserError:
        try:
            image = self.images.read(index)
        except UserError as error:
            return (None, -1, [str(error)]) if self.skip_bad else error
        return self.transform(image), int(self.images.labels[index]), []


class TrainingSamples(_Samples):
    """Augmented images, by (epoch, index): its transforms' random numbers depend on that and the seed alone."""

    def __init__(
        self, images: FolderImages | ArrayImages, transform: Callable, skip_bad: bool, seed: int
    ):
        super().__init__(images, transform, skip_bad)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]] | UserError:
        epoch, index = key
        skipped: list[str] = []
        for _ in range(len(self.images)):
            seed_everything(self.seed, AUGMENTATION, epoch, index)
            sample = self._read(index)
            if isinstance(sample, UserError) or sample[0] is not None:
                return sample if isinstance(sample, UserError) else (*sample[:2], skipped)
            skipped += sample[2]
            index = (index + 1) % len(
                self.images
            )  # the next takes its place: a batch must not shrink
        return UserError(f"no training image can be read; the first: {skipped[0]}")


class ValidationSamples(_Samples):
    """Images as they are evaluated, by index."""

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, list[str]] | UserError:
        return self._read(index)


def collate(samples: list) -> Batch | UserError:
    """A batch: images [n, 3, height, width], labels int64 [n], and bad: what is wrong with images that were left out."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample  # raised in a worker, it would arrive wrapped in a traceback
    good = [sample for sample in samples if sample[0] is not None]
    images = torch.stack([image for image, _, _ in good]) if good else torch.empty(0)
    return {
        "images": images,
        "labels": torch.tensor([label for _, label, _ in good], dtype=torch.int64),
        "bad": [text for _, _, bad in samples for text in bad],
    }


@dataclass(frozen=True)
class MicroBatches:
    """Which images are in each micro-batch of one rank, from `update` (0: the first) on, without end: lists of (epoch, index).

    Update t of an epoch takes the images [t * total, (t + 1) * total) of the epoch's order, rank r its r-th part of them. The
    images that do not fill an update are left out of that epoch.
    """

    order: ShuffledIndices
    update: int
    total_batch_size: int
    batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        each = self.total_batch_size // self.world_size
        for update in itertools.count(self.update):
            epoch, t = divmod(update, self.order.n // self.total_batch_size)
            start = epoch * self.order.n + t * self.total_batch_size + self.rank * each
            for first in range(start, start + each, self.batch_size):
                yield [
                    (epoch, int(index))
                    for index in self.order.indices(first, first + self.batch_size)
                ]


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
    """The micro-batches of this rank for one update after another, from `update` (0: the first) on, without end.

    `workers` processes read them. Raises UserError for an image that cannot be read.
    """
    order = ShuffledIndices(samples.seed, len(samples.images))
    micro_batches = MicroBatches(order, update, total_batch_size, batch_size, rank, world_size)
    items = _batches(samples, micro_batches, workers, pin_memory, "training images")
    while True:
        yield list(itertools.islice(items, total_batch_size // (batch_size * world_size)))


def validation_batches(
    samples: ValidationSamples,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    pin_memory: bool,
) -> Iterator[Batch]:
    """This rank's share of the validation images, every `world_size`-th from `rank` on; no image comes twice and none is left out."""
    own = range(rank, len(samples.images), world_size)
    batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
    return _batches(samples, batches, workers, pin_memory, "validation images")


def _batches(samples: _Samples, keys, workers: int, pin_memory: bool, what: str) -> Iterator[Batch]:
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # otherwise torch draws from the global generator
    )
    for batch in iterate_loader(loader, what, "--num_workers"):
        if isinstance(batch, UserError):
            raise batch
        for text in batch.pop("bad"):
            _warn(text)
        yield batch


def _warn(text: str) -> None:
    from loguru import logger

    logger.warning(f"left out: {text.removesuffix(', or give --skip_bad_images')}")
