"""Which files of a folder are read, which split each belongs to, and which are left out and why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import describe_left_out, is_hidden, walk_files

COMPRESSIONS = (".gz", ".xz", ".zst")
KINDS = (".jsonl", ".ndjson", ".json", ".txt")
ENDINGS = (
    *(kind + compression for kind in KINDS for compression in ("", *COMPRESSIONS)),
    ".parquet",
)
# The keywords of `datasets.load_dataset`. A keyword counts where it is bounded by the end of the
# name or by one of these characters: `train-00000-of-00002.parquet`, `my_val.jsonl`, `test/a.txt`.
SPLIT_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BOUNDARY = r"[-._ 0-9]"
_SPLIT_NAMES = {
    split: re.compile(rf"(?:^|{_BOUNDARY})(?:{'|'.join(keywords)})(?:{_BOUNDARY}|$)", re.I)
    for split, keywords in SPLIT_KEYWORDS.items()
}
# Files that describe a data set, or belong to the tools that fetched it.
_DESCRIPTION = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|citation|authors|requirements)([-._].*)?", re.I
)
_DESCRIPTION_NAMES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Folder:
    """The files of a folder.

    Args:
        train: The files to train on, sorted by their path below the folder.
        validation: The files of its validation split; empty if it has none.
        left_out: (path below the folder, reason) of each other file.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def description(self) -> str:
        """A part of a log line: how many files are read, and which are not."""
        text = f"{_count(len(self.train))} read for training"
        if self.validation:
            text += f", {_count(len(self.validation))} for validation"
        left_out = describe_left_out(self.left_out)
        return text + (f"; left out: {left_out}" if left_out else "")


def list_folder(folder: Path, option: str = "--dataset", splits: bool = True) -> Folder:
    """Find the files of a folder and of its sub-folders, and which split each belongs to.

    Splits are told by names, as `datasets.load_dataset(folder)` does: by the names of folders, or
    else by the name of the file. Files of a test split are never read.

    Args:
        folder: The folder. Links to other folders are followed.
        option: The flag that error messages name.
        splits: False: read all files, whatever they are called.

    Raises:
        UserError: There is no readable file, or it is not clear which files are to be trained on.
    """
    names, left_out = _readable_names(folder)
    if not names:
        found = f", only {', '.join(name for name, _ in left_out[:3])}"
        raise UserError(
            f"{option} {folder}: the folder holds no readable file{found * bool(left_out)}; put "
            f"files ending in {', '.join(ENDINGS)} there."
        )
    if not splits:
        return Folder(_paths(folder, names), (), tuple(left_out))
    by_split = _by_split(folder, names, option)
    train, validation = by_split["train"], by_split["validation"]
    left_out += [(name, "of the test split") for name in by_split["test"]]
    unnamed = by_split["none"]
    if not (train or validation or by_split["test"]):
        train = unnamed  # no file belongs to a split
    elif not train:
        raise _unclear(folder, option, validation or by_split["test"], unnamed)
    elif unnamed and not validation:
        raise _unclear(folder, option, train, unnamed)
    else:
        left_out += [(name, "of no split") for name in unnamed]
    return Folder(_paths(folder, train), _paths(folder, validation), tuple(left_out))


def split_of(name: str) -> list[str]:
    """Return the splits that a file belongs to by its name; usually one, or none.

    Args:
        name: Its path below the data set's folder, with `/`.
    """
    *folders, file = name.split("/")
    for part in folders:
        found = [split for split, pattern in _SPLIT_NAMES.items() if pattern.search(part)]
        if found:
            return found
    return [split for split, pattern in _SPLIT_NAMES.items() if pattern.search(file)]


def _by_split(folder: Path, names: list[str], option: str) -> dict[str, list[str]]:
    """Return the names by their split, `none` for those that belong to none."""
    by_split: dict[str, list[str]] = {name: [] for name in (*SPLIT_KEYWORDS, "none")}
    for name in names:
        found = split_of(name)
        if len(found) > 1:
            raise UserError(
                f"{option} {folder}: {name} is named after two splits, {' and '.join(found)}; "
                "rename it, or give the file itself."
            )
        by_split[found[0] if found else "none"].append(name)
    return by_split


def _readable_names(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the sorted names of files that can be read, and (name, reason) of the others."""
    names: list[str] = []
    left_out: list[tuple[str, str]] = []
    for name in walk_files(folder):
        last = name.rsplit("/", 1)[-1]
        if is_hidden(name):
            left_out.append((name, "hidden"))
        elif not (folder / name).is_file():
            left_out.append((name, "broken links"))
        elif _DESCRIPTION.fullmatch(last) or last in _DESCRIPTION_NAMES:
            left_out.append((name, "descriptions of the data"))
        elif not name.lower().endswith(ENDINGS):
            left_out.append((name, "of another kind"))
        else:
            names.append(name)
    known = set(names)
    for name in sorted(names):
        plain = without_compression(name)
        if plain != name and plain in known:
            left_out.append((name, "also there uncompressed"))
            names.remove(name)
    return sorted(names), left_out


def without_compression(name: str) -> str:
    """Return a file name without the ending of a compression."""
    for ending in COMPRESSIONS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _paths(folder: Path, names: list[str]) -> tuple[Path, ...]:
    return tuple(folder / name for name in names)


def _count(number: int) -> str:
    return f"{number:,} file{'s' if number != 1 else ''}"


def _unclear(folder: Path, option: str, named: list[str], unnamed: list[str]) -> UserError:
    """Return the error for a folder whose training files cannot be told apart."""
    split = split_of(named[0])[0]
    if unnamed:
        problem = (
            f"{named[0]} belongs to the {split} split, but {unnamed[0]} to none, so it is not "
            "clear what to train on"
        )
    else:
        problem = f"it holds files of the {split} split only, such as {named[0]}"
    return UserError(
        f"{option} {folder}: {problem}; give the training files with --dataset and the validation "
        "files with --validation_file."
    )
