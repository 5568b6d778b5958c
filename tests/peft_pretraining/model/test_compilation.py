"""--compile is tried once, and what does not work is said in one sentence."""

import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.model import compilation
from peft_pretraining.model.compilation import resolve_compile
from peft_pretraining.parallel.process_group import DistributedContext

CPU = DistributedContext(0, 0, 1, torch.device("cpu"))
GPU = DistributedContext(0, 0, 1, torch.device("cuda:0"))


class TwoRanks(DistributedContext):
    """Another rank, on which compilation fails."""

    def gather_objects(self, obj):
        return [obj, "InductorError: Python.h: No such file"]


def works(monkeypatch, problem=None):
    monkeypatch.setattr(compilation, "_compilation_problem", lambda *_: problem)


@pytest.mark.parametrize("choice, ranks, expected", [
    ("auto", CPU, "off"), ("off", GPU, "off"), ("on", CPU, "on"), ("auto", GPU, "on"),
])  # fmt: skip
def test_where_compilation_works(monkeypatch, choice, ranks, expected):
    works(monkeypatch)
    assert resolve_compile(choice, ranks) == expected


def test_where_it_does_not(monkeypatch):
    works(monkeypatch, "Failed to find C compiler: install g++")
    messages = []
    monkeypatch.setattr(compilation.logger, "warning", messages.append)
    assert resolve_compile("auto", GPU) == "off"
    (message,) = messages
    assert message == (
        "nothing is compiled, so training is slower: Failed to find C compiler: install g++"
    )
    with pytest.raises(UserError, match="--compile on: Failed to find .*; or give --compile off"):
        resolve_compile("on", CPU)


def test_all_ranks_do_the_same(monkeypatch):
    works(monkeypatch)
    ranks = TwoRanks(0, 0, 1, torch.device("cuda:0"))
    assert resolve_compile("auto", ranks) == "off"


def test_a_compiler_that_is_missing(monkeypatch):
    def missing(function):
        raise OSError("Python.h: No such file\nand more")

    monkeypatch.setattr(torch, "compile", missing)
    problem = compilation._compilation_problem(torch.device("cpu"), False)
    assert problem == (
        "torch.compile does not work here (OSError: Python.h: No such file): install a C++ "
        "compiler and Python's headers (apt install g++ python3-dev)"
    )
