"""Controls: decays of the same size that read no spectrum, or that stand in the wrong place."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from alphadecay.assignment import assign_decays
from alphadecay.modules import BalancedModule

GRID = 1 << 14  # points of the Marchenko-Pastur law: alpha to 1e-4


def permutation(count: int, seed: int) -> list[int]:
    """A fixed random order of `count` modules, the same for a seed on every rank and machine."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def rescale_to_mean(
    decays: Mapping[int, float], sizes: list[int], weight_decay: float
) -> dict[int, float]:
    """Decays rescaled so that their mean, weighted by `sizes` (parameters of each module), is `weight_decay`; all zero stays so."""
    total = sum(sizes[i] * decay for i, decay in decays.items())
    factor = weight_decay * sum(sizes[i] for i in decays) / total if total else 1.0
    return {i: factor * decay for i, decay in decays.items()}


def gaussian_alpha(out: int, fan_in: int) -> float:
    """The median fit's alpha of a large matrix [out, in] of independent Gaussian entries: its shape decides alone.

    2.12 for a square, 3.00 for LLaMA-60M's MLPs, 3.46 for 1:4.
    """
    ratio = min(out, fan_in) / max(out, fan_in)
    angle = (torch.arange(GRID, dtype=torch.float64) + 0.5) * math.pi / GRID
    values = (
        1 + ratio - 2 * math.sqrt(ratio) * torch.cos(angle)
    )  # the law's support, ascending; its density in the angle:
    weights = torch.sin(angle) ** 2 / values
    shares = weights.cumsum(0) / weights.sum()
    median = int(torch.searchsorted(shares, 0.5))
    tail, share = values[median:], weights[median:]
    return 1 + float(share.sum() / (share * torch.log(tail / values[median])).sum())


def shape_multipliers(
    modules: list[BalancedModule], min_ratio: float, max_ratio: float
) -> dict[str, float]:
    """Module type -> decay / eta: the linear map of what alpha would be if all weights were Gaussian, the mean over a type's shapes.

    For LLaMA: attention `min_ratio`, MLP `max_ratio`, which is where AlphaDecay begins, before training has moved any spectrum.
    """
    alphas: dict[str, list[float]] = {}
    for module in modules:
        alphas.setdefault(module.type, []).append(gaussian_alpha(*module.weight.shape[:2]))
    means = torch.tensor(
        [sum(values) / len(values) for values in alphas.values()], dtype=torch.float64
    )
    ratios = assign_decays(means, 1.0, min_ratio=min_ratio, max_ratio=max_ratio)
    return dict(zip(alphas, ratios.tolist(), strict=True))


def constant_ratios(modules: list[BalancedModule], multipliers: Mapping[str, float]) -> Tensor:
    """[M] decay / eta of each module, by its type; 1 for types that are not named. Raises ValueError for a type that no module has."""
    types = list(dict.fromkeys(m.type for m in modules))
    for name, value in multipliers.items():
        if name not in types:
            raise ValueError(
                f"no balanced module is of type {name!r}: the types are {', '.join(types)}"
            )
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(
                f"the multiplier of {name} is {value}: it must be a finite number, 0 or more"
            )
    return torch.tensor([multipliers.get(m.type, 1.0) for m in modules], dtype=torch.float64)
