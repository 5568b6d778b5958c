"""Random generators: seed, save, restore."""

import random

import numpy as np
import torch

# ----------------------------------------------------------------------------------------------------------- random states


def seed_random_generators(seed: int) -> None:
    """Start every random number generator of this process at a known state."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict:
    """States of every random number generator of this process."""
    _, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (
            torch.from_numpy(keys.copy()),
            *position,
        ),  # a tensor, so that the file loads without unpickling code
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: dict, device: torch.device) -> None:
    """The inverse of `random_states`."""
    random.setstate(states["python"])
    keys, *position = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), *position))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
