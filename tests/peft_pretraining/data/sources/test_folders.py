"""Which files of a folder are read, for which split, and which are left out with a reason."""

import contextlib
import gzip
import json

import pytest
from datasets.data_files import get_data_patterns, resolve_pattern

from peft_pretraining.data.dataset import load_data
from peft_pretraining.data.sources.files import open_files
from peft_pretraining.data.sources.folders import list_folder, split_of
from peft_pretraining.data.sources.registry import open_source
from peft_pretraining.data.sources.split import split_documents
from peft_pretraining.errors import UserError


def fill(folder, *names):
    """Write files that contain their own name as their one document."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": name}) + "\n"
        path.write_bytes(gzip.compress(line.encode()) if name.endswith(".gz") else line.encode())
    return folder


def names_of(folder):
    """Return the names of the training and the validation files."""
    found = list_folder(folder)
    return tuple(
        [path.relative_to(folder).as_posix() for path in part]
        for part in (found.train, found.validation)
    )


LAYOUTS = {
    "parquet of the Hub": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["data/validation-00000-of-00001.parquet"],
        ["data/test-00000-of-00001.parquet"],
    ),
    "files named after splits": (["train.jsonl"], ["validation.jsonl"], ["test.jsonl"]),
    "folders": (["train/a.jsonl", "train/b.jsonl"], ["validation/a.jsonl"], ["test/a.jsonl"]),
    "val": (["train/a.jsonl"], ["val/a.jsonl"], []),
    "valid": (["train/a.jsonl"], ["valid/a.jsonl"], ["eval/a.jsonl"]),
    "dev": (["train.txt"], ["dev.txt"], ["testing.txt"]),
    "folder beside file": (["train/a.jsonl"], ["val.jsonl"], ["test.jsonl"]),
    "words in names": (["wiki_train.jsonl"], ["wiki_valid.jsonl"], ["wiki_test.jsonl"]),
    "nested": (["en/train/a.jsonl", "fr/train/a.jsonl"], ["en/dev/a.jsonl"], ["fr/test/a.jsonl"]),
    "without validation": (["training/a.jsonl"], [], ["evaluation/a.jsonl"]),
    "no split": (["a.jsonl", "b/c.jsonl"], [], []),
    "words inside words": (["contest.jsonl", "latest.jsonl", "trainer.jsonl"], [], []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_told_by_names(tmp_path, layout):
    train, validation, test = LAYOUTS[layout]
    fill(tmp_path, *train, *validation, *test)
    assert names_of(tmp_path) == (train, validation)
    left_out = list_folder(tmp_path).left_out
    assert left_out == tuple((name, "of the test split") for name in test)


@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if name not in ("folder beside file", "no split")]
)
def test_splits_are_those_of_the_library_datasets(tmp_path, layout):
    """It reads no file beside a folder that is named after a split, and calls no split `train`."""
    train, validation, test = LAYOUTS[layout]
    fill(tmp_path, *train, *validation, *test)
    patterns = get_data_patterns(str(tmp_path))
    if layout == "words inside words":
        assert list(patterns) == ["train"] and patterns["train"] == ["**"]
        return
    wanted = {"train": train, "validation": validation, "test": test}
    for split, names in wanted.items():
        found = set()
        for pattern in patterns.get(split, ()):
            with contextlib.suppress(FileNotFoundError):  # one of several patterns
                found |= set(resolve_pattern(pattern, str(tmp_path)))
        found = {str(path).removeprefix(f"{tmp_path.resolve()}/") for path in found}
        assert found == set(names)


@pytest.mark.parametrize(
    "names, message",
    [
        (["test.jsonl"], "it holds files of the test split only, such as test.jsonl"),
        (["val/a.jsonl"], "it holds files of the validation split only"),
        (["a.jsonl", "test.jsonl"], "test.jsonl belongs to the test split, but a.jsonl to none"),
        (["a.jsonl", "val.jsonl"], "val.jsonl belongs to the validation split, but a.jsonl to"),
        (["train/a.jsonl", "b.jsonl"], "train/a.jsonl belongs to the train split, but b.jsonl to"),
        (["train-test.jsonl"], "train-test.jsonl is named after two splits, train and test"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(tmp_path, names, message):
    fill(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        open_files(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "--validation_file" in str(caught.value) or "rename it" in str(caught.value)
    found = open_files(tmp_path, "--validation_file")  # read whole, whatever the names
    assert len(found.train.files) == len(names)


def test_nobody_trains_on_test_files(tmp_path):
    fill(tmp_path, "train.jsonl", "validation.jsonl", "test.jsonl")
    split = split_documents(open_source(str(tmp_path), 0))
    assert list(split.train) == ["train.jsonl"] and list(split.validation) == ["validation.jsonl"]


def test_files_that_are_left_out_have_a_reason(tmp_path):
    fill(tmp_path, "a.jsonl", "a.jsonl.gz", "b.jsonl.gz", "README.txt", "LICENSE.txt", "c.csv")
    fill(tmp_path, "dataset_info.json", ".cache/x.jsonl", "__MACOSX/y.jsonl", "LICENSE-MIT.txt")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert names_of(tmp_path) == (["a.jsonl", "b.jsonl.gz"], [])
    reasons = dict(list_folder(tmp_path).left_out)
    assert reasons == {
        "a.jsonl.gz": "also there uncompressed",
        "README.txt": "descriptions of the data",
        "LICENSE.txt": "descriptions of the data",
        "LICENSE-MIT.txt": "descriptions of the data",
        "dataset_info.json": "descriptions of the data",
        "c.csv": "of another kind",
        ".cache/x.jsonl": "hidden",
        "__MACOSX/y.jsonl": "hidden",
        "gone.jsonl": "broken links",
    }
    assert list_folder(tmp_path).description == (
        "2 files read for training; left out: 2 hidden (.cache/x.jsonl, __MACOSX/y.jsonl); 4 "
        "descriptions of the data (LICENSE-MIT.txt, LICENSE.txt, README.txt, ...); 1 of another "
        "kind (c.csv); 1 broken links (gone.jsonl); 1 also there uncompressed (a.jsonl.gz)"
    )


def test_linked_folders_are_read_once(tmp_path):
    fill(tmp_path / "elsewhere", "b.jsonl")
    folder = fill(tmp_path / "data", "a.jsonl")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "same").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    assert names_of(folder) == (["a.jsonl", "link/b.jsonl"], [])


def test_endings_in_upper_case_and_ndjson(tmp_path):
    fill(tmp_path, "A.JSONL", "b.ndjson", "c.Ndjson.gz")
    assert list(open_files(tmp_path).train) == ["A.JSONL", "b.ndjson", "c.Ndjson.gz"]


@pytest.mark.parametrize(
    "name, splits",
    [
        ("train.jsonl", ["train"]),
        ("TRAIN.jsonl", ["train"]),
        ("restrain.jsonl", []),
        ("data/train/test.jsonl", ["train"]),  # the folder decides
        ("a-val-b.txt", ["validation"]),
        ("value.txt", []),
        ("shard.train2.txt", ["train"]),
    ],
)
def test_split_of_a_name(name, splits):
    assert split_of(name) == splits


def test_the_log_line_says_what_is_read(tmp_path):
    folder = tmp_path / "data"
    fill(folder, *(f"train/{i}.jsonl" for i in range(9)), "val/x.jsonl", "test/y.jsonl", "LICENSE")
    data = load_data(str(folder), "bpe", 262, 8, 0, None, cache_dir=tmp_path / "cache")
    assert (
        "; 9 files read for training, 1 file for validation; left out: 1 descriptions of the data "
        "(LICENSE); 1 of the test split (test/y.jsonl); validation: " in data.description
    )
