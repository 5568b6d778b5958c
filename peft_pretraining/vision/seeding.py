"""Seed all random generators from (seed, use, step, index)."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    pass


# ------------------------------------------------------------------------------------------------------------ random numbers


AUGMENTATION, TRAINING = range(2)  # what random numbers are for, so that no two uses share theirs


def seed_everything(*key: int) -> None:
    """Start every random number generator that transforms, mixup and models draw from, at a state that depends on `key` alone."""
    words = np.random.SeedSequence(key).generate_state(2)
    seed = int(words[0]) << 31 | int(words[1]) >> 1
    random.seed(seed)
    np.random.seed(words[0])
    torch.default_generator.manual_seed(
        seed
    )  # torch.manual_seed takes a hundred times as long where CUDA has not been used yet
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
