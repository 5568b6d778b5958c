"""Tests run from the root of the repository, without a network, and leave nothing behind."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # for the scripts that tests start
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two tests run at the same time


@pytest.fixture(autouse=True)
def shared_state_is_kept():
    """A test that changes what the whole process shares would slow or break the tests after it."""
    before = shared_state()
    yield
    after = shared_state()
    changed = {k: (v, after.get(k)) for k, v in before.items() if after.get(k) != v}
    assert changed == {}  # name: (before, after)


def shared_state():
    state = {"folder": Path.cwd(), **os.environ, "PYTEST_CURRENT_TEST": None}
    torch = sys.modules.get("torch")
    if torch:
        state |= {
            "threads": torch.get_num_threads(),
            "dtype": torch.get_default_dtype(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "gradients": torch.is_grad_enabled(),
        }
    return state
