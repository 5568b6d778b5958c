"""Random number generators of Python, NumPy and torch: seed, save, restore."""

import random
from typing import Any

import numpy as np
import torch


def seed_random_generators(seed: int) -> None:
    """Seed every random number generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the states of all random number generators of this process.

    The result holds only numbers, tuples and tensors, so that `torch.load(weights_only=True)` can
    read it.

    Args:
        device: The device of this rank. If it is a CUDA device, its generator is included.
    """
    _, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.copy()), *position),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Set all random number generators of this process to what `random_states` returned."""
    random.setstate(states["python"])
    keys, *position = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), *position))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
