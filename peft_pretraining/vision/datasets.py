"""Images with labels: class folders, CIFAR and scikit-learn's handwritten digits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import describe_left_out, is_hidden, walk_files

if TYPE_CHECKING:
    from PIL.Image import Image


EXTENSIONS = (
    ".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif",
)  # fmt: skip
DIGITS_VALIDATION_SIZE = 360  # of 1,797 images: a fifth


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder that has one sub-folder for each class.

    Args:
        folder: the folder that holds the class folders.
        classes: names of the classes.
        files: bytes [n]: paths relative to `folder`. An array, because forked worker processes
            share its memory, while reading a list of strings copies it.
        labels: int64 [n]: index of each image's class.
        left_out: (path relative to `folder`, reason) of each file that is no image.
    """

    folder: Path
    classes: tuple[str, ...]
    files: np.ndarray
    labels: np.ndarray
    left_out: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image:
        """Return the image in RGB, upright; see `to_rgb`.

        Raises:
            UserError: if the file cannot be decoded; the message names the file.
        """
        from PIL import Image

        path = self.folder / os.fsdecode(self.files[index])
        try:
            with Image.open(path) as image:
                return to_rgb(image)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # decoders raise many kinds of errors for damaged files
            raise UserError(
                f"{path} cannot be read as an image ({type(error).__name__}: {error}): "
                "repair or delete it, or give --skip_bad_images"
            ) from error

    def signature(self) -> list:
        """Return what identifies the images; it is the same on every machine."""
        names = b"\0".join(self.files.tolist())
        return [self.classes, hashlib.blake2b(names, digest_size=12).hexdigest()]


def to_rgb(image: Image) -> Image:
    """Return an image in RGB, 8 bits a channel, turned as its EXIF orientation says.

    Grey images of 16 bits are scaled. Of an animation the first picture is used, and transparency
    is dropped.

    Raises:
        UserError: the pixels are numbers without a fixed range, such as 32-bit integers or floats.
    """
    from PIL import Image, ImageOps

    is_grey16 = image.mode.startswith("I;16")
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        is_grey16 = True  # what these formats hold has 16 bits
    if image.mode in ("I", "F") and not is_grey16:
        raise UserError(
            f"its pixels are 32-bit {'floats' if image.mode == 'F' else 'integers'}, which have "
            "no fixed range: convert it to 8 or 16 bits, or give --skip_bad_images true"
        )
    if is_grey16:
        # Pillow's own conversion would cut off everything above 255, to white.
        pixels = np.asarray(image).astype(np.uint32) >> 8
        grey = Image.fromarray(pixels.astype(np.uint8))
        grey.info["exif"] = image.info.get("exif", b"")
        image = grey
    return ImageOps.exif_transpose(image).convert("RGB")


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory.

    Args:
        classes: names of the classes.
        pixels: uint8 [n, height, width] (grey) or [n, height, width, 3] (RGB).
        labels: int64 [n]: index of each image's class.
    """

    classes: tuple[str, ...]
    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image:
        """Return the image in RGB."""
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB")

    def signature(self) -> list:
        """Return what identifies the images; it is the same on every machine."""
        return [self.classes, hashlib.blake2b(self.pixels.tobytes(), digest_size=12).hexdigest()]


@dataclass(frozen=True)
class ImageData:
    """The images that a run is trained and evaluated on.

    Args:
        train: training images.
        validation: validation images.
        allow_flip: a mirrored image belongs to the same class, so augmentation may flip it.
        fingerprint: equal for equal data; kept in checkpoints.
        description: one line for the log.
    """

    train: FolderImages | ArrayImages
    validation: FolderImages | ArrayImages
    allow_flip: bool
    fingerprint: str
    description: str


def load_images(
    data_set: str,
    data_path: str | None,
    eval_data_path: str | None,
    n_classes: int,
    rank_zero_first: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> ImageData:
    """Open the training and the validation images.

    Args:
        data_set: IMNET: class folders in `data_path`/train and `data_path`/val. image_folder: class
            folders in `data_path` and in `eval_data_path`. CIFAR, CIFAR10, CIFAR100: torchvision's
            CIFAR-10 or CIFAR-100, depending on `n_classes`; downloaded to `data_path` if it is not
            there. digits: scikit-learn's 1,797 handwritten digits, a fifth of them for validation.
        data_path: folder of the data; digits need none.
        eval_data_path: class folders for validation; for IMNET they replace `data_path`/val.
        n_classes: number of classes that the data must have.
        rank_zero_first: returns a context in which rank 0 downloads before the other ranks look
            for the files.

    Raises:
        UserError: if a split is missing, a class is empty, training and validation have different
            classes, or their number is not `n_classes`.
    """
    train: FolderImages | ArrayImages
    validation: FolderImages | ArrayImages
    if data_set == "digits":
        train, validation = _digits()
    elif data_path is None:
        raise UserError(
            f"--data_set {data_set} needs --data_path FOLDER; --data_set digits needs no data"
        )
    elif data_set.startswith("CIFAR"):
        with rank_zero_first():
            train, validation = (
                _cifar(Path(data_path), n_classes, is_train) for is_train in (True, False)
            )
    else:
        folders = _split_folders(data_set, data_path, eval_data_path)
        train, validation = (read_class_folders(folder) for folder in folders)
    _check_classes(train, validation, data_path, n_classes)
    signatures = json.dumps([train.signature(), validation.signature()]).encode()
    origin = data_set if data_path is None else data_path
    return ImageData(
        train,
        validation,
        allow_flip=data_set != "digits",
        fingerprint=hashlib.blake2b(signatures, digest_size=12).hexdigest(),
        description=f"{origin}, {len(train):,} images of {len(train.classes):,} classes; "
        f"validation: {len(validation):,} images{_left_out(train, validation)}",
    )


def _left_out(*parts: FolderImages | ArrayImages) -> str:
    """Return a part of the log line: which files of the class folders are no images."""
    text = describe_left_out(
        (f"{part.folder.name}/{name}", reason)
        for part in parts
        if isinstance(part, FolderImages)
        for name, reason in part.left_out
    )
    return f"; left out: {text}" if text else ""


def read_class_folders(folder: Path) -> FolderImages:
    """List the images of a folder that has one sub-folder for each class.

    Classes are in alphabetical order, the images of a class in the order of their paths. Hidden
    folders, such as .ipynb_checkpoints, are no classes, and hidden files are no images.

    Args:
        folder: the folder that holds the class folders.

    Raises:
        UserError: if there is no class folder, or one without an image.
    """
    classes = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name)
    )
    if not classes:
        raise UserError(
            f"{folder} holds no class folders: it must hold a folder of images for each class"
        )
    files: list[bytes] = []
    labels: list[int] = []
    left_out: list[tuple[str, str]] = []
    for label, name in enumerate(classes):
        found = []
        for file in walk_files(folder / name):
            if is_hidden(file):
                left_out.append((f"{name}/{file}", "hidden"))
            elif not file.lower().endswith(EXTENSIONS):
                left_out.append((f"{name}/{file}", "of another kind"))
            else:
                found.append(f"{name}/{file}")
        if not found:
            raise UserError(
                f"the class folder {folder / name} holds no image "
                f"({', '.join(EXTENSIONS[:3])} ...): fill it or delete it"
            )
        files += map(os.fsencode, found)
        labels += [label] * len(found)
    return FolderImages(
        folder, tuple(classes), np.array(files), np.array(labels, np.int64), tuple(left_out)
    )


def _split_folders(data_set: str, data_path: str, eval_data_path: str | None) -> tuple[Path, Path]:
    if data_set == "IMNET":
        folders = Path(data_path) / "train", Path(eval_data_path or Path(data_path) / "val")
        layout = (
            "IMNET has class folders in --data_path FOLDER/train and FOLDER/val; "
            "--eval_data_path names another val"
        )
    else:
        if eval_data_path is None:
            raise UserError(
                "--data_set image_folder needs --eval_data_path FOLDER, "
                "the class folders to validate on"
            )
        folders = Path(data_path), Path(eval_data_path)
        layout = "image_folder has class folders in --data_path and in --eval_data_path"
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"the folder {folder} is missing: {layout}")
    return folders


def _digits() -> tuple[ArrayImages, ArrayImages]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("--data_set digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    # scikit-learn's file repeats the ten digits in order. It is shuffled before the split, so that
    # both parts hold all digits in similar numbers.
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(pixels))
    classes = tuple(str(digit) for digit in digits.target_names)
    parts = order[DIGITS_VALIDATION_SIZE:], order[:DIGITS_VALIDATION_SIZE]
    train, validation = (
        ArrayImages(classes, pixels[part], digits.target[part].astype(np.int64)) for part in parts
    )
    return train, validation


def _cifar(folder: Path, n_classes: int, train: bool) -> ArrayImages:
    import torchvision.datasets

    kinds = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}
    if n_classes not in kinds:
        raise UserError(
            f"--data_set CIFAR has 10 or 100 classes, not {n_classes}: "
            "give --nb_classes 10 or --nb_classes 100"
        )
    try:
        found = kinds[n_classes](str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-{n_classes} is neither in {folder} nor can it be downloaded ({error}): unpack "
            f"cifar-{n_classes}-python.tar.gz there, or give --data_set image_folder"
        ) from error
    return ArrayImages(tuple(found.classes), found.data, np.array(found.targets, np.int64))


def _check_classes(
    train: FolderImages | ArrayImages,
    validation: FolderImages | ArrayImages,
    data_path: str | None,
    n_classes: int,
) -> None:
    """Raise UserError unless both parts have the same `n_classes` classes."""
    if isinstance(train, FolderImages) and isinstance(validation, FolderImages):
        unmatched = sorted(set(train.classes) ^ set(validation.classes))
        if unmatched:
            name = unmatched[0]
            has_it, lacks_it = train.folder, validation.folder
            if name in validation.classes:
                has_it, lacks_it = lacks_it, has_it
            more = f", and {len(unmatched) - 1} more" if len(unmatched) > 1 else ""
            raise UserError(
                f"the classes differ: {name} is in {has_it} but not in {lacks_it}{more}; "
                "both must have the same class folders"
            )
    found = len(train.classes)
    if found != n_classes:
        raise UserError(
            f"--nb_classes {n_classes}, but {data_path or 'the data'} has {found} classes: "
            f"give --nb_classes {found}"
        )
