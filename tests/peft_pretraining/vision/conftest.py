"""Fixtures of the tests of image classification."""

import pytest

from tests.end_to_end.common import write_images


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Class folders of 48 training and 12 validation images; tests must not change them."""
    return write_images(tmp_path_factory.mktemp("images"), train=12, val=3)
