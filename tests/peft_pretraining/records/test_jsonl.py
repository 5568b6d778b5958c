"""Appending records: JSON without NaN, and no incomplete lines."""

import math
import resource

import pytest

from peft_pretraining.records.jsonl import append_json


def test_nonfinite_numbers_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_json(path, [{"loss": math.nan, "perplexity": math.inf, "lr": 0.5, "n": 1, "s": "NaN"}])
    expected = '{"loss": null, "perplexity": null, "lr": 0.5, "n": 1, "s": "NaN"}\n'
    assert path.read_text() == expected


def test_a_full_disk_leaves_no_part_of_the_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_json(path, [{"a": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))  # bytes; the file has 9
    try:
        with pytest.raises(OSError, match="File too large"):
            append_json(path, [{"b": 2}, {"c": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == '{"a": 1}\n'
