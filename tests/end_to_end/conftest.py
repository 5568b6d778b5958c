"""Inputs and the run that was never disturbed, made once for all end-to-end tests."""

import os

import pytest

from tests.end_to_end.common import (
    FAULTY,
    exact,
    run,
    traced,
    vit,
    write_config,
    write_images,
    write_text,
)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with a small config and a corpus, and a cache of its own."""
    folder = tmp_path_factory.mktemp("inputs")
    write_config(folder)
    write_text(folder)
    write_images(folder / "images")
    os.environ["ALPHADECAY_CACHE"] = str(folder / "cache")
    yield folder
    del os.environ["ALPHADECAY_CACHE"]


@pytest.fixture(scope="session")
def straight_run(inputs):
    """40 updates on 2 processes, nothing in their way."""
    run(
        exact(inputs, "straight"), script=FAULTY, environment=traced(inputs / "straight"), cold=True
    )
    return inputs / "straight"


@pytest.fixture(scope="session")
def straight_vit(inputs):
    """The same of main_vit.py."""
    run(
        vit(inputs, "vit"),
        script=FAULTY,
        environment=traced(inputs / "vit", SCRIPT="main_vit"),
        cold=True,
    )
    return inputs / "vit"
