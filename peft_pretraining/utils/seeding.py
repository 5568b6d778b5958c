"""Seed every random generator from a key such as (seed, use, step, index)."""

from __future__ import annotations

import random

import numpy as np
import torch

# First part of the key after the seed: two uses of random numbers never share their numbers.
AUGMENTATION, TRAINING = range(2)


def seed_everything(*key: int) -> None:
    """Seed the generators that transforms, mixup and models draw from.

    Args:
        key: non-negative integers. Equal keys give equal random numbers, whatever was drawn before.
    """
    words = np.random.SeedSequence(key).generate_state(2)
    seed = int(words[0]) << 31 | int(words[1]) >> 1
    random.seed(seed)
    np.random.seed(words[0])
    # torch.manual_seed takes a hundred times as long where CUDA has not been used yet.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
