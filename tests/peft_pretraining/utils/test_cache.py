"""The cache folder, and users without a home folder."""

from pathlib import Path

import pytest

from peft_pretraining.errors import UserError
from peft_pretraining.utils.cache import cache_folder, expanded


@pytest.fixture
def no_home(monkeypatch):
    """As in a container whose user has no entry in /etc/passwd."""

    def fail(*_):
        raise RuntimeError("Could not determine home directory.")

    for name in ("ALPHADECAY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", fail)


def test_without_a_home_folder_there_is_one_sentence(no_home, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="this user has no home folder: set HOME, or ALPHADECAY_"):
        cache_folder()
    with pytest.raises(UserError, match="~/corpus.jsonl cannot be found"):
        expanded("~/corpus.jsonl")
    monkeypatch.setenv("ALPHADECAY_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"


def test_a_path_without_a_tilde_needs_no_home_folder(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    assert expanded("data/train.jsonl") == Path("data/train.jsonl")
