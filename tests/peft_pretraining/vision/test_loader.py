"""Batches of images: the same for any number of ranks and workers and after a restart."""

import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.vision.datasets import read_class_folders
from peft_pretraining.vision.loader import (
    TrainingSamples,
    ValidationSamples,
    training_steps,
    validation_batches,
)
from peft_pretraining.vision.transforms import training_transform, validation_transform
from tests.end_to_end.common import write_images
from tests.support.vision import arguments


def training_batches(folder, update=0, rank=0, world_size=1, workers=0, batch_size=4, n=7):
    """One rank's micro-batches of n updates: [(images, labels), ...] for each update."""
    args = arguments()
    samples = TrainingSamples(
        read_class_folders(folder / "train"), training_transform(args, True), False, seed=3
    )
    steps = training_steps(
        samples,
        update=update,
        total_batch_size=16,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        workers=workers,
        pin_memory=False,
    )
    return [[(b["images"], b["labels"]) for b in next(steps)] for _ in range(n)]


def join_ranks(parts):
    """Return images and labels of each update, the parts of all ranks put together."""
    return [
        tuple(
            torch.cat(tensors)
            for tensors in zip(*(b for part in parts for b in part[t]), strict=True)
        )
        for t in range(len(parts[0]))
    ]


def assert_same(ours, theirs):
    for (images, labels), (their_images, their_labels) in zip(ours, theirs, strict=True):
        assert torch.equal(labels, their_labels) and torch.equal(images, their_images)


def test_batches_do_not_depend_on_ranks_workers_or_restarts(folder):
    straight = join_ranks([training_batches(folder)])
    assert_same(join_ranks([training_batches(folder, batch_size=8)]), straight)
    assert_same(
        join_ranks([training_batches(folder, rank=r, world_size=2, workers=r) for r in (0, 1)]),
        straight,
    )
    assert_same(
        join_ranks([training_batches(folder, rank=r, world_size=4) for r in range(4)]), straight
    )
    assert_same(join_ranks([training_batches(folder, update=4, workers=2, n=3)]), straight[4:])


def test_an_epoch_is_a_permutation(folder):
    """48 images in 3 updates of 16: an epoch holds each image once.

    The next epoch has another order and other augmentations.
    """
    args = arguments()
    transform = validation_transform(args)
    images = read_class_folders(folder / "train")
    samples = TrainingSamples(images, transform, False, seed=3)
    steps = training_steps(
        samples,
        update=0,
        total_batch_size=16,
        batch_size=16,
        rank=0,
        world_size=1,
        workers=0,
        pin_memory=False,
    )
    epochs = [torch.cat([next(steps)[0]["images"] for _ in range(3)]) for _ in range(2)]
    everything = {transform(images.read(i)).numpy().tobytes() for i in range(48)}
    seen = [[image.numpy().tobytes() for image in epoch] for epoch in epochs]
    assert set(seen[0]) == set(seen[1]) == everything and len(seen[0]) == 48 and seen[0] != seen[1]
    augmented = TrainingSamples(images, training_transform(args, True), False, seed=3)
    assert torch.equal(augmented[0, 5][0], augmented[0, 5][0])
    assert not torch.equal(augmented[0, 5][0], augmented[1, 5][0])


def test_unreadable_images_are_refused_or_skipped(tmp_path):
    images = read_class_folders(write_images(tmp_path / "images", train=3, val=1) / "train")
    bad = tmp_path / "images/train/blue/01.png"
    bad.write_bytes(bad.read_bytes()[:200])
    transform = validation_transform(arguments())
    assert f"{bad} cannot be read as an image" in str(
        TrainingSamples(images, transform, False, 0)[0, 1]
    )
    image, label, skipped = TrainingSamples(images, transform, True, 0)[0, 1]
    assert torch.equal(image, transform(images.read(2))) and label == 0 and str(bad) in skipped[0]
    batches = list(
        validation_batches(ValidationSamples(images, transform, True), 2, 0, 1, 0, False)
    )
    assert [len(b["labels"]) for b in batches] == [1, 2, 2, 2, 2, 2]
    with pytest.raises(UserError, match="blue/01.png cannot be read"):
        list(validation_batches(ValidationSamples(images, transform, False), 2, 0, 1, 0, False))
