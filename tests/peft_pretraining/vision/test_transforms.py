"""Augmentation and the centre crop of the evaluation."""

import numpy as np
import timm
import torch
from PIL import Image

from peft_pretraining.vision.transforms import training_transform, validation_transform
from tests.support.vision import arguments


def test_posterize_at_full_strength():
    """timm asks for 0 bits there, which Pillow refuses from version 13 on."""
    transform = training_transform(arguments("--aa", "rand-m10-n16-inc1"), True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    assert all(transform(image).isfinite().all() for _ in range(30))


def test_evaluation_uses_the_standard_centre_crop():
    """7/8 of each side at 224 pixels, as usual for ImageNet; the whole of a small image."""
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    )
    args = arguments("--input_size", 224)
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    )
    middle = torch.from_numpy(np.asarray(image)[16:240, 16:240].copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(
        validation_transform(args)(image), (middle - mean) / std, rtol=0, atol=1e-5
    )
    small = image.resize((32, 32))
    whole = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(
        validation_transform(arguments())(small), (whole - mean) / std, rtol=0, atol=1e-5
    )
