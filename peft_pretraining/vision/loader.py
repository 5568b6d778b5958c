"""Images to batches. What a batch holds is a function of the seed and its place in the run alone: not of ranks, workers or restarts."""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from peft_pretraining.errors import UserError
from peft_pretraining.data.workers import loaded
from peft_pretraining.data.shuffle import RowOrder
from peft_pretraining.vision.datasets import ArrayImages, FolderImages

if TYPE_CHECKING:
    from PIL.Image import Image


Batch = dict[str, Tensor]
# The ConvNeXt recipe: images of up to 32 pixels are padded and shifted, not zoomed into; these, and those from 384 pixels on, are evaluated
# whole, all others to 7/8 of a side, as ImageNet always was.
SMALL, LARGE, ORIGINAL_CROP = 32, 384, 224 / 256


# -------------------------------------------------------------------------------------------------------------- transforms


def training_transform(args: argparse.Namespace, mirrors: bool) -> Callable:
    """timm's augmentation as the flags say: PIL image -> float32 [3, input_size, input_size]. mirrors: flip half of the images."""
    from timm.data import create_transform
    from torchvision import transforms

    chain = create_transform(
        args.input_size,
        is_training=True,
        hflip=0.5 if mirrors else 0.0,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        **normalisation(args),
    )
    for augmentation in chain.transforms:
        keep_a_bit(augmentation)
    if args.input_size <= SMALL:
        crop = transforms.RandomCrop(args.input_size, padding=args.input_size // 8)
        chain.transforms[:1] = [_resize(args.input_size), crop]
    return chain


def validation_transform(args: argparse.Namespace) -> Callable:
    """PIL image -> float32 [3, input_size, input_size]: the middle of the image, all of it where it is small or as --crop_pct says."""
    from timm.data import create_transform

    return create_transform(args.input_size, interpolation="bicubic", crop_pct=evaluation_crop(args), **normalisation(args))


def evaluation_crop(args: argparse.Namespace) -> float:
    """Share of an image's side that evaluation looks at."""
    whole = args.input_size <= SMALL or args.input_size >= LARGE
    return args.crop_pct or (1.0 if whole else ORIGINAL_CROP)


def normalisation(args: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """mean and std of the channels, by those names."""
    from timm.data import constants

    if args.imagenet_default_mean_and_std:
        return {"mean": constants.IMAGENET_DEFAULT_MEAN, "std": constants.IMAGENET_DEFAULT_STD}
    return {"mean": constants.IMAGENET_INCEPTION_MEAN, "std": constants.IMAGENET_INCEPTION_STD}


def keep_a_bit(augmentation: Callable) -> None:
    """At its greatest strength timm posterizes to 0 bits, a black image, which Pillow refuses from version 13 on."""
    from timm.data import auto_augment

    policy = [op for part in getattr(augmentation, "policy", ()) for op in part]
    for op in (*getattr(augmentation, "ops", ()), *policy):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize


def _posterize(image: Image, bits: int, **more) -> Image:
    from timm.data import auto_augment

    return auto_augment.posterize(image, max(1, bits), **more)


def _resize(size: int) -> Callable:
    from torchvision import transforms

    return transforms.Resize((size, size), transforms.InterpolationMode.BICUBIC)


# ------------------------------------------------------------------------------------------------------------ random numbers


AUGMENTATION, TRAINING = range(2)  # what random numbers are for, so that no two uses share theirs


def seed_everything(*key: int) -> None:
    """Start every random number generator that transforms, mixup and models draw from, at a state that depends on `key` alone."""
    words = np.random.SeedSequence(key).generate_state(2)
    seed = int(words[0]) << 31 | int(words[1]) >> 1
    random.seed(seed)
    np.random.seed(words[0])
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long where CUDA has not been used yet
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


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

    def __init__(self, images: FolderImages | ArrayImages, transform: Callable, skip_bad: bool, seed: int):
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
            index = (index + 1) % len(self.images)  # the next takes its place: a batch must not shrink
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

    order: RowOrder
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
                yield [(epoch, int(index)) for index in self.order.indices(first, first + self.batch_size)]


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
    order = RowOrder(samples.seed, len(samples.images))
    micro_batches = MicroBatches(order, update, total_batch_size, batch_size, rank, world_size)
    items = _batches(samples, micro_batches, workers, pin_memory, "training images")
    while True:
        yield list(itertools.islice(items, total_batch_size // (batch_size * world_size)))


def validation_batches(
    samples: ValidationSamples, batch_size: int, rank: int, world_size: int, workers: int, pin_memory: bool
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
    for batch in loaded(loader, what, "--num_workers"):
        if isinstance(batch, UserError):
            raise batch
        for text in batch.pop("bad"):
            _warn(text)
        yield batch


def _warn(text: str) -> None:
    from loguru import logger

    logger.warning(f"left out: {text.removesuffix(', or give --skip_bad_images')}")
