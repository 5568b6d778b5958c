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

if TYPE_CHECKING:
    from PIL.Image import Image


DATA_SETS = ("IMNET", "image_folder", "CIFAR", "digits")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
DIGITS_HELD_OUT = 360  # of 1,797: a fifth


@dataclass(frozen=True)
class FolderImages:
    """The images of a folder that has a folder for each class. files: paths from `folder` on, bytes [n]; labels: int64 [n]."""

    folder: Path
    classes: tuple[str, ...]
    files: np.ndarray  # bytes: forked workers share an array, but copy a list of a million strings by counting references
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image:
        """The image in RGB. Raises UserError naming the file where it cannot be decoded."""
        from PIL import Image

        path = self.folder / os.fsdecode(self.files[index])
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except Exception as error:  # decoders raise whatever broken bytes lead them to
            raise UserError(
                f"{path} cannot be read as an image ({type(error).__name__}: {error}): repair or delete it, or give --skip_bad_images"
            ) from error

    def signature(self) -> list:
        """What identifies the images, on any machine."""
        return [
            self.classes,
            hashlib.blake2b(b"\0".join(self.files.tolist()), digest_size=12).hexdigest(),
        ]


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory. pixels: uint8 [n, height, width] (grey) or [n, height, width, 3]; labels: int64 [n]."""

    classes: tuple[str, ...]
    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image:
        """The image in RGB."""
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB")

    def signature(self) -> list:
        """What identifies the images, on any machine."""
        return [self.classes, hashlib.blake2b(self.pixels.tobytes(), digest_size=12).hexdigest()]


@dataclass(frozen=True)
class ImageData:
    """What a run trains and is evaluated on.

    mirrors: whether a mirrored image is of the same class, so that augmentation may flip it. fingerprint: equal for equal data, kept in
    checkpoints. description: one line for the log.
    """

    train: FolderImages | ArrayImages
    validation: FolderImages | ArrayImages
    mirrors: bool
    fingerprint: str
    description: str


def load_images(
    data_set: str,
    data_path: str | None,
    eval_data_path: str | None,
    n_classes: int,
    first: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> ImageData:
    """Open the training and the validation images.

    Args:
        data_set: IMNET: class folders in `data_path`/train and `data_path`/val; image_folder: class folders in `data_path` and in
            `eval_data_path`; CIFAR: torchvision's CIFAR-10 or CIFAR-100, as `n_classes` says, downloaded to `data_path` if need be;
            digits: scikit-learn's 1,797 handwritten digits, a fifth of them held out.
        eval_data_path: validation class folders, of IMNET instead of `data_path`/val.
        first: gives a context in which rank 0 downloads before the other ranks look.

    Raises UserError for a missing split, an empty class, classes that are not the same in both, and another number of them.
    """
    if data_set == "digits":
        train, validation = _digits()
    elif data_path is None:
        raise UserError(
            f"--data_set {data_set} needs --data_path FOLDER; --data_set digits needs no data"
        )
    elif data_set == "CIFAR":
        with first():
            train, validation = (
                _cifar(Path(data_path), n_classes, is_train) for is_train in (True, False)
            )
    else:
        train, validation = (
            read_class_folders(folder)
            for folder in _split_folders(data_set, data_path, eval_data_path)
        )
    _check_classes(train, validation, data_path, n_classes)
    fingerprint = hashlib.blake2b(
        json.dumps([train.signature(), validation.signature()]).encode(), digest_size=12
    ).hexdigest()
    origin = data_set if data_path is None else data_path
    description = f"{origin}, {len(train):,} images of {len(train.classes):,} classes; validation: {len(validation):,} images"
    return ImageData(train, validation, data_set != "digits", fingerprint, description)


def read_class_folders(folder: Path) -> FolderImages:
    """The images in the folders of `folder`: each is a class, in alphabetical order. UserError where there is none, or an empty one."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not classes:
        raise UserError(
            f"{folder} holds no class folders: it must hold a folder of images for each class"
        )
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            os.path.relpath(os.path.join(parent, file), folder)
            for parent, _, children in os.walk(folder / name, followlinks=True)
            for file in children
            if file.lower().endswith(EXTENSIONS)
        )
        if not found:
            raise UserError(
                f"the class folder {folder / name} holds no image ({', '.join(EXTENSIONS[:3])} ...): fill it or delete it"
            )
        files += map(os.fsencode, found)
        labels += [label] * len(found)
    return FolderImages(folder, tuple(classes), np.array(files), np.array(labels, np.int64))


def _split_folders(data_set: str, data_path: str, eval_data_path: str | None) -> tuple[Path, Path]:
    if data_set == "IMNET":
        folders = Path(data_path) / "train", Path(eval_data_path or Path(data_path) / "val")
        layout = "IMNET has class folders in --data_path FOLDER/train and FOLDER/val; --eval_data_path names another val"
    else:
        if eval_data_path is None:
            raise UserError(
                "--data_set image_folder needs --eval_data_path FOLDER, the class folders to validate on"
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
    # The file goes through the ten digits again and again: only a shuffled split has all of them on both sides.
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(pixels))
    classes = tuple(str(digit) for digit in digits.target_names)
    parts = order[DIGITS_HELD_OUT:], order[:DIGITS_HELD_OUT]
    train, validation = (
        ArrayImages(classes, pixels[part], digits.target[part].astype(np.int64)) for part in parts
    )
    return train, validation


def _cifar(folder: Path, n_classes: int, train: bool) -> ArrayImages:
    import torchvision.datasets

    kinds = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}
    if n_classes not in kinds:
        raise UserError(
            f"--data_set CIFAR has 10 or 100 classes, not {n_classes}: give --nb_classes 10 or --nb_classes 100"
        )
    try:
        found = kinds[n_classes](str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-{n_classes} is neither in {folder} nor can it be downloaded ({error}): "
            f"unpack cifar-{n_classes}-python.tar.gz there, or give --data_set image_folder"
        ) from error
    return ArrayImages(tuple(found.classes), found.data, np.array(found.targets, np.int64))


def _check_classes(
    train: FolderImages | ArrayImages,
    validation: FolderImages | ArrayImages,
    data_path: str | None,
    n_classes: int,
) -> None:
    odd = sorted(set(train.classes) ^ set(validation.classes))
    if odd:
        where, missing = (train, validation) if odd[0] in train.classes else (validation, train)
        raise UserError(
            f"the classes differ: {odd[0]} is in {where.folder} but not in {missing.folder}"
            f"{f', and {len(odd) - 1} more' if len(odd) > 1 else ''}; both must have the same class folders"
        )
    if len(train.classes) != n_classes:
        found = len(train.classes)
        raise UserError(
            f"--nb_classes {n_classes}, but {data_path or 'the data'} has {found} classes: give --nb_classes {found}"
        )
