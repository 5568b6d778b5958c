"""The names of the runs of a comparison."""

import json

import pytest

from peft_pretraining.records.reader import read_run
from peft_pretraining.report.labels import label_runs
from tests.support.run_folders import metrics, write_run

LONG = "llama_60m-alphadecay-adam-lr0.001-wd1e-05-updates10000-tokens1310720000"


def labelled(tmp_path, *runs):
    """Return the labels of runs that are given as (name, arguments, method)."""
    read = []
    for i, (name, arguments, method) in enumerate(runs):
        folder = write_run(tmp_path / f"folder{i}", name, metrics(20, 10, 20), arguments=arguments)
        if method:
            info = json.loads((folder / "run.json").read_text())
            (folder / "run.json").write_text(json.dumps(info | {"method": method}))
        read.append(read_run(folder))
    label_runs(read)
    return [run.label for run in read]


@pytest.mark.parametrize(
    "runs, labels",
    [
        # Short names that differ are kept.
        ([("a", {}, ""), ("b", {}, "")], ["a", "b"]),
        # Long names, and equal ones, give way to what differs.
        (
            [(f"{LONG}-seed5", {"seed": 5}, ""), (f"{LONG}-seed6", {"seed": 6}, "")],
            ["seed 5", "seed 6"],
        ),
        (
            [("same", {"lr": 1e-3}, "alphadecay"), ("same", {"lr": 2e-3}, "uniform")],
            ["alphadecay, lr 0.001", "uniform, lr 0.002"],
        ),
        # The method stands for the flags that it consists of, and saving is not a setting.
        (
            [
                ("same", {"use_modulewise_wd": True, "save_dir": "a"}, "inverted"),
                ("same", {"use_modulewise_wd": False, "save_dir": "b"}, "none"),
            ],
            ["inverted", "none"],
        ),
        (
            [("same", {"model_config": "configs/x.json"}, ""), ("same", {}, "")],
            ["x", "llama_9m"],
        ),
        (
            [
                ("same", {"save_every_minutes": 5.0, "timeout_minutes": 10.0, "zeta": 1}, ""),
                ("same", {"save_every_minutes": 9.0, "timeout_minutes": 30.0, "zeta": 2}, ""),
            ],
            ["zeta 1", "zeta 2"],
        ),
        # Other settings are named only as far as they are needed.
        (
            [
                ("same", {"zeta": 1, "warmup": 5, "compile": True}, ""),
                ("same", {"zeta": 2, "warmup": 6, "compile": False}, ""),
            ],
            ["warmup 5", "warmup 6"],
        ),
        # Without a difference in the settings, that of the names or the folders.
        ([(f"{LONG}-one", {}, ""), (f"{LONG}-two", {}, "")], ["one", "two"]),
        ([("same", {}, ""), ("same", {}, "")], ["folder0", "folder1"]),
        ([("same", {}, "")], ["same"]),
    ],
)
def test_runs_are_named_by_what_differs(runs, labels, tmp_path):
    assert labelled(tmp_path, *runs) == labels


def test_a_run_that_is_given_twice_is_numbered(tmp_path):
    folder = write_run(tmp_path / "run", LONG, metrics(20, 10, 20))
    runs = [read_run(folder), read_run(folder)]
    label_runs(runs)
    assert len({run.label for run in runs}) == 2
    assert [run.label[-2:] for run in runs] == ["#1", "#2"]
