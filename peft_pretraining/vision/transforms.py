"""timm's augmentation, the evaluation crop, and normalisation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

# The ConvNeXt recipe: images of up to 32 pixels are padded and shifted, not zoomed into; these, and those from 384 pixels on, are evaluated
# whole, all others to 7/8 of a side, as ImageNet always was.
PAD_CROP_MAX_SIZE, FULL_CROP_MIN_SIZE, DEFAULT_CROP_PCT = 32, 384, 224 / 256


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
        patch_posterize(augmentation)
    if args.input_size <= PAD_CROP_MAX_SIZE:
        crop = transforms.RandomCrop(args.input_size, padding=args.input_size // 8)
        chain.transforms[:1] = [_resize(args.input_size), crop]
    return chain


def validation_transform(args: argparse.Namespace) -> Callable:
    """PIL image -> float32 [3, input_size, input_size]: the middle of the image, all of it where it is small or as --crop_pct says."""
    from timm.data import create_transform

    return create_transform(
        args.input_size,
        interpolation="bicubic",
        crop_pct=evaluation_crop(args),
        **normalisation(args),
    )


def evaluation_crop(args: argparse.Namespace) -> float:
    """Share of an image's side that evaluation looks at."""
    whole = args.input_size <= PAD_CROP_MAX_SIZE or args.input_size >= FULL_CROP_MIN_SIZE
    return args.crop_pct or (1.0 if whole else DEFAULT_CROP_PCT)


def normalisation(args: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """mean and std of the channels, by those names."""
    from timm.data import constants

    if args.imagenet_default_mean_and_std:
        return {"mean": constants.IMAGENET_DEFAULT_MEAN, "std": constants.IMAGENET_DEFAULT_STD}
    return {"mean": constants.IMAGENET_INCEPTION_MEAN, "std": constants.IMAGENET_INCEPTION_STD}


def patch_posterize(augmentation: Callable) -> None:
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
