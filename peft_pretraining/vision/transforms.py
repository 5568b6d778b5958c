"""timm's augmentation, the centre crop of the evaluation, and normalisation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

# As in the ConvNeXt recipe: training images of up to 32 pixels are padded and shifted instead of
# zoomed into. The evaluation uses the whole image up to 32 and from 384 pixels on, and otherwise
# 7/8 of each side, the usual crop of ImageNet.
PAD_CROP_MAX_SIZE, FULL_CROP_MIN_SIZE, DEFAULT_CROP_PCT = 32, 384, 224 / 256


def training_transform(args: argparse.Namespace, allow_flip: bool) -> Callable:
    """Return timm's augmentation: PIL image -> float32 [3, input_size, input_size].

    Args:
        args: parsed flags of main_vit.py.
        allow_flip: flip half of the images horizontally.
    """
    from timm.data import create_transform
    from torchvision import transforms

    pipeline: Any = create_transform(
        args.input_size,
        is_training=True,
        hflip=0.5 if allow_flip else 0.0,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        **normalisation(args),
    )
    for transform in pipeline.transforms:
        patch_posterize(transform)
    if args.input_size <= PAD_CROP_MAX_SIZE:
        size = (args.input_size, args.input_size)
        pipeline.transforms[:1] = [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.RandomCrop(args.input_size, padding=args.input_size // 8),
        ]
    return pipeline


def validation_transform(args: argparse.Namespace) -> Callable:
    """Return the evaluation's transform: PIL image -> float32 [3, input_size, input_size].

    It takes the centre of the image; `evaluation_crop` says how much of it.

    Args:
        args: parsed flags of main_vit.py.
    """
    from timm.data import create_transform

    return create_transform(
        args.input_size,
        interpolation="bicubic",
        crop_pct=evaluation_crop(args),
        **normalisation(args),
    )


def evaluation_crop(args: argparse.Namespace) -> float:
    """Return the fraction of an image's side that the evaluation uses; --crop_pct overrides it."""
    whole = args.input_size <= PAD_CROP_MAX_SIZE or args.input_size >= FULL_CROP_MIN_SIZE
    return args.crop_pct or (1.0 if whole else DEFAULT_CROP_PCT)


def normalisation(args: argparse.Namespace) -> dict[str, Any]:
    """Return the mean and standard deviation of each channel as {"mean": ..., "std": ...}."""
    from timm.data import constants

    if args.imagenet_default_mean_and_std:
        return {"mean": constants.IMAGENET_DEFAULT_MEAN, "std": constants.IMAGENET_DEFAULT_STD}
    return {"mean": constants.IMAGENET_INCEPTION_MEAN, "std": constants.IMAGENET_INCEPTION_STD}


def patch_posterize(transform: Callable) -> None:
    """Make timm's posterize keep at least 1 bit.

    At full strength timm posterizes to 0 bits, a black image, which Pillow refuses from version 13
    on.

    Args:
        transform: one part of timm's augmentation; parts that do not posterize stay unchanged.
    """
    from timm.data import auto_augment

    policy = [op for sub_policy in getattr(transform, "policy", ()) for op in sub_policy]
    for op in (*getattr(transform, "ops", ()), *policy):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize_at_least_1_bit


def _posterize_at_least_1_bit(image: Image, bits: int, **kwargs) -> Image:
    from timm.data import auto_augment

    return auto_augment.posterize(image, max(1, bits), **kwargs)
