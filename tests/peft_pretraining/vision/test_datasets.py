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


# ---------------------------------------------------------------------------------- kinds of images


def image_in(folder, name, image, **options):
    """Save an image in each class folder of a data set, and return the data set."""
    for part in ("train", "val"):
        for kind in ("a", "b"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            image.save(folder / part / kind / name, **options)
    return load_images("IMNET", str(folder), None, 2)


def ramp(dtype, highest):
    """Grey values from 0 to the highest, [4, 8]."""
    return np.linspace(0, highest, 32).astype(dtype).reshape(4, 8)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_grey_images_of_16_bits_are_scaled(tmp_path, name):
    """Pillow's conversion would make everything above 255 white."""
    values = ramp(np.uint16, 65_535)
    image = image_in(tmp_path, name, Image.fromarray(values)).train.read(0)
    np.testing.assert_array_equal(np.asarray(image)[..., 1], values >> 8)


@pytest.mark.parametrize("dtype, words", [(np.int32, "32-bit integers"), (np.float32, "32-bit fl")])
def test_pixels_without_a_fixed_range_are_refused(tmp_path, dtype, words):
    data = image_in(tmp_path, "x.tif", Image.fromarray(ramp(dtype, 100_000)))
    with pytest.raises(UserError, match=rf"train/a/x.tif: its pixels are {words}.*convert it"):
        data.train.read(0)


@pytest.mark.parametrize("name", ["x.jpg", "x.jfif", "x.png", "x.webp"])
def test_images_are_turned_upright(tmp_path, name):
    """Orientation 6: the camera was turned by 90 degrees."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 250
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"format": "JPEG"} if name.endswith("jfif") else {}
    image = image_in(tmp_path, name, Image.fromarray(pixels), exif=exif, **options).train.read(0)
    assert image.size == (16, 32)
    assert np.asarray(image)[4, 8, 0] > 200 and np.asarray(image)[28, 8, 0] < 50


@pytest.mark.parametrize(
    "mode, name", [("P", "x.gif"), ("CMYK", "x.jpg"), ("RGBA", "x.png"), ("LA", "x.png"),
                   ("1", "x.png"), ("L", "x.bmp")],
)  # fmt: skip
def test_other_modes_become_rgb(tmp_path, mode, name):
    red = Image.new("RGB", (8, 8), (200, 0, 0)).convert(mode)
    image = image_in(tmp_path, name, red).train.read(0)
    assert image.mode == "RGB" and image.size == (8, 8)
    if mode in ("P", "CMYK", "RGBA"):
        assert np.abs(np.asarray(image)[4, 4].astype(int) - (200, 0, 0)).max() < 12


def test_hidden_names_are_neither_classes_nor_images(tmp_path):
    folder = write_images(tmp_path / "images", train=2, val=1)
    names = (".ipynb_checkpoints/00.png", "__MACOSX/00.png", "red/._00.png", "red/.thumbs/a.png")
    for name in names:
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_bytes((folder / "train/red/00.png").read_bytes())
    (folder / "train/red/notes.txt").touch()
    (folder / "val/green/a.heic").touch()
    data = load_images("IMNET", str(folder), None, 4)
    assert data.train.classes == ("blue", "green", "red", "white") and len(data.train) == 8
    assert data.description.endswith(
        "; left out: 2 hidden (train/red/._00.png, train/red/.thumbs/a.png); 2 of another kind "
        "(train/red/notes.txt, val/green/a.heic)"
    )


def test_linked_class_folders_are_read(tmp_path):
    folder = write_images(tmp_path / "images", train=2, val=1)
    (folder / "train/red").rename(tmp_path / "red")
    (folder / "train/red").symlink_to(tmp_path / "red")
    (tmp_path / "red/loop").symlink_to(tmp_path / "red")
    assert len(load_images("IMNET", str(folder), None, 4).train) == 8
