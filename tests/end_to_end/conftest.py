"""Inputs and the run that was never disturbed, made once for all end-to-end tests."""

import os

import pytest

from end_to_end.common import exact, run, traced, write_config, write_text


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with a small config and a corpus, and a cache of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    write_config(folder)
    write_text(folder)
    os.environ["ALPHADECAY_CACHE"] = str(folder / "cache")
    yield folder
    del os.environ["ALPHADECAY_CACHE"]


@pytest.fixture(scope="session")
def straight_run(inputs):
    """40 updates on 2 processes, nothing in their way."""
    run(exact(inputs, "straight"), script="tests/end_to_end/faulty_main.py", environment=traced(inputs / "straight"))
    return inputs / "straight"
