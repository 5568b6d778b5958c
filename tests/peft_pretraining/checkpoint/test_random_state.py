"""Random generators: the same seed or state gives the same numbers, on every generator."""

import random

import numpy as np
import torch

from peft_pretraining.checkpoint.random_state import (
    random_states,
    restore_random_states,
    seed_random_generators,
)

CPU = torch.device("cpu")


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds():
    draws = []
    for seed in (3, 4, 3, 2**63):  # NumPy takes 32 bits only
        seed_random_generators(seed)
        draws.append(draw())
    assert draws[0] == draws[2]
    for numbers in zip(draws[0], draws[1], draws[3], strict=True):
        assert len(set(numbers)) == 3


def test_states_are_restored(tmp_path):
    """Also after a draw that leaves a generator in the middle of its buffer, and from a file."""
    seed_random_generators(0)
    np.random.standard_normal()  # NumPy keeps a second normal number for the next call
    random.gauss(0, 1)
    torch.save(random_states(CPU), tmp_path / "random.pt")
    expected = draw(), np.random.standard_normal(), random.gauss(0, 1)
    restore_random_states(torch.load(tmp_path / "random.pt", weights_only=True), CPU)
    assert (draw(), np.random.standard_normal(), random.gauss(0, 1)) == expected
