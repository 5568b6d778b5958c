"""Old names work for one more release, and `import alphadecay` is quick."""

import importlib
import subprocess
import sys

import pytest
import torch.nn as nn

import alphadecay
from alphadecay import AlphaDecay
from alphadecay.deprecated import MOVED_MODULES, RENAMED
from tests.end_to_end.common import ROOT


def test_import_alphadecay_loads_no_torch():
    """A command line lists the accepted names without it; the first use of a class loads it."""
    code = (
        "import sys, alphadecay; alphadecay.METRICS, alphadecay.MAPS; "
        "print('torch' in sys.modules); alphadecay.AlphaDecay; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize("old", MOVED_MODULES)
def test_a_module_that_moved_is_found(old):
    sys.modules.pop(f"alphadecay.{old}", None)
    new = importlib.import_module(f"alphadecay.{MOVED_MODULES[old][0]}")
    public = next(name for name in vars(new) if not name.startswith("_") and name.islower())
    with pytest.warns(DeprecationWarning, match=rf"alphadecay\.{old} will be removed"):
        moved = importlib.import_module(f"alphadecay.{old}")
        assert getattr(moved, public) is getattr(new, public)


@pytest.mark.parametrize("old", RENAMED)
def test_a_name_that_changed_is_found(old):
    path, _, name = old.rpartition(".")
    if path in MOVED_MODULES:  # importing the old module gives the warning
        sys.modules.pop(f"alphadecay.{path}", None)
    with pytest.warns(DeprecationWarning, match="will be removed in the next release: use "):
        module = importlib.import_module(f"alphadecay.{path}" if path else "alphadecay")
        assert getattr(module, name) is not None


def test_old_keywords_of_the_controls():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    with pytest.warns(DeprecationWarning, match="Controls"):
        old = AlphaDecay(model, 0.1, shuffle_seed=3)
    new = AlphaDecay(model, 0.1, controls=alphadecay.Controls(shuffle_seed=3))
    assert old.weight_decays == new.weight_decays
    with pytest.raises(AttributeError, match="no_such_name"):
        alphadecay.no_such_name  # noqa: B018


def test_old_keywords_of_the_fit():
    weight = nn.Linear(64, 64).weight
    with pytest.warns(DeprecationWarning, match=r"lowest.*ignored_fraction"):
        old = alphadecay.eigenvalues(weight, lowest=0.5)
    assert old.equal(alphadecay.eigenvalues(weight, ignored_fraction=0.5))
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    with pytest.warns(DeprecationWarning, match=r"\bmethod\b.*fit_method"):
        old = AlphaDecay(model, 0.1, method="fix-finger")
    assert old.weight_decays == AlphaDecay(model, 0.1, fit_method="fix-finger").weight_decays
    assert old.weight_decays != AlphaDecay(model, 0.1).weight_decays


@pytest.mark.parametrize("name", ["AWD", "AdaDecay"])
def test_baselines_in_their_old_package(name):
    package = importlib.import_module("alphadecay.baselines")
    with pytest.warns(
        DeprecationWarning, match=rf"alphadecay\.baselines\.{name}.*alphadecay\.{name}"
    ):
        assert getattr(package, name) is getattr(alphadecay, name)
    with pytest.raises(AttributeError, match="'alphadecay.baselines' has no attribute 'AdamDecay'"):
        package.AdamDecay  # noqa: B018
