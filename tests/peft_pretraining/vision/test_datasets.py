"""Class folders, digits and CIFAR; folders that are wrong."""

import numpy as np
import pytest
from PIL import Image

from peft_pretraining.errors import UserError
from peft_pretraining.vision.datasets import load_images
from tests.end_to_end.common import write_images


def test_class_folders(folder):
    data = load_images("IMNET", str(folder), None, 4)
    assert data.train.classes == ("blue", "green", "red", "white")
    assert (len(data.train), len(data.validation)) == (48, 12)
    for i in (0, 13, 47):
        name = f"{data.train.classes[data.train.labels[i]]}/{i % 12:02}.png"
        assert data.train.files[i].decode() == name
        assert data.train.read(i).tobytes() == Image.open(folder / "train" / name).tobytes()
    again = load_images("image_folder", str(folder / "train"), str(folder / "val"), 4)
    assert again.fingerprint == data.fingerprint


def test_digits():
    data = load_images("digits", None, None, 10)
    assert (len(data.train), len(data.validation), data.allow_flip) == (1437, 360, False)
    assert np.bincount(data.validation.labels, minlength=10).min() > 20  # it holds every digit
    image = np.asarray(data.train.read(0))
    assert image.shape == (8, 8, 3) and image.max() == 255


def test_cifar(tmp_path, monkeypatch):
    """A stand-in for torchvision's class, because tests have no network."""
    import torchvision

    class Fake:
        classes = [str(i) for i in range(10)]

        def __init__(self, root, train, download):
            repeats = 2 if train else 1
            self.data = np.zeros((10 * repeats, 32, 32, 3), np.uint8)
            self.targets = list(range(10)) * repeats

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_images("CIFAR", str(tmp_path), None, 10)
    assert (len(data.train), len(data.validation)) == (20, 10)
    assert data.train.read(3).size == (32, 32)


def remove_validation(folder):
    (folder / "val").rename(folder / "test")


def empty_one_class(folder):
    for file in (folder / "train/red").iterdir():
        file.unlink()


def rename_one_class(folder):
    (folder / "val/green").rename(folder / "val/lime")


@pytest.mark.parametrize(
    "damage, n_classes, expected",
    [
        (remove_validation, 4, "/val is missing: IMNET has class folders"),
        (empty_one_class, 4, "train/red holds no image"),
        (rename_one_class, 4, r"green is in .*/train but not in .*/val, and 1 more"),
        (
            lambda folder: None,
            1000,
            r"--nb_classes 1000, but .* has 4 classes: give --nb_classes 4",
        ),
    ],
)
def test_wrong_folders_are_refused(tmp_path, damage, n_classes, expected):
    damage(write_images(tmp_path / "images", train=2, val=1))
    with pytest.raises(UserError, match=expected):
        load_images("IMNET", str(tmp_path / "images"), None, n_classes)
