"""Control experiments for module-wise decays.

A control keeps part of the method and takes another part away: decays with the same mean, decays
that use no spectral information, or decays that are assigned to shuffled modules.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphadecay.assignment import assign_decays
from alphadecay.modules import BalancedModule

GRID = 1 << 14  # points at which the Marchenko-Pastur law is summed: alpha is exact to 1e-4


@dataclass(frozen=True)
class Controls:
    """Settings of the control experiments. The default is the method itself, without a control.

    Attributes:
        shuffle_seed: permute the decays over the modules, in a fixed random order of this seed.
            None: do not shuffle.
        iso_budget: rescale the decays so that their mean over the balanced modules, weighted by
            parameters, is eta. (The linear map otherwise raises it, to about 1.5 eta for the ratios
            0.67 and 3.)
        type_constant: use one constant decay for each module type and no spectrum.
        type_multipliers: module type -> decay / eta for `type_constant`; 1 for types not named.
            None: the linear map of the alphas that the modules' shapes alone would give, see
            `shape_multipliers`.
        one_shot: freeze the decays after the first analysis during training, that of update
            `every`.

    Raises:
        ValueError: two settings contradict each other, or one has no effect without another.
    """

    shuffle_seed: int | None = None
    iso_budget: bool = False
    type_constant: bool = False
    type_multipliers: Mapping[str, float] | None = None
    one_shot: bool = False

    def __post_init__(self) -> None:
        if self.type_multipliers is not None and not self.type_constant:
            raise ValueError(
                "type_multipliers has no effect without type_constant=True: give both, or neither"
            )
        if self.type_constant and self.one_shot:
            raise ValueError("type_constant analyses no weights: leave one_shot out")


def permutation(count: int, seed: int) -> list[int]:
    """Return a random order of `count` modules, the same for a seed on every rank and machine."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def rescale_to_mean(
    decays: Mapping[int, float], sizes: Sequence[int], weight_decay: float
) -> dict[int, float]:
    """Rescale decays so that their mean, weighted by parameters, is `weight_decay`.

    Args:
        decays: module index -> decay.
        sizes: number of parameters that each module's decay applies to, for all modules.
        weight_decay: eta, the mean to reach.

    Returns:
        Module index -> rescaled decay. Decays that are all zero stay zero.
    """
    total = sum(sizes[i] * decay for i, decay in decays.items())
    factor = weight_decay * sum(sizes[i] for i in decays) / total if total else 1.0
    return {i: factor * decay for i, decay in decays.items()}


def gaussian_alpha(out: int, fan_in: int) -> float:
    """Return the median fit's alpha of a large matrix with independent Gaussian entries.

    It depends on the aspect ratio alone: 2.12 for a square matrix, 3.00 for LLaMA-60M's MLPs, 3.46
    for 1:4. Computed from the Marchenko-Pastur law, the limit of such a matrix's spectrum.

    Args:
        out: rows of the matrix.
        fan_in: columns of the matrix.
    """
    ratio = min(out, fan_in) / max(out, fan_in)
    # The law's support is parametrised by an angle, so that its density has no singularity.
    angle = (torch.arange(GRID, dtype=torch.float64) + 0.5) * math.pi / GRID
    values = 1 + ratio - 2 * math.sqrt(ratio) * torch.cos(angle)  # ascending
    density = torch.sin(angle) ** 2 / values
    cumulative = density.cumsum(0) / density.sum()
    median = int(torch.searchsorted(cumulative, 0.5))
    tail, weights = values[median:], density[median:]
    return 1 + float(weights.sum() / (weights * torch.log(tail / values[median])).sum())


def shape_multipliers(
    modules: Sequence[BalancedModule], min_ratio: float, max_ratio: float
) -> dict[str, float]:
    """Return decay / eta of each module type, computed from the modules' shapes alone.

    It is the linear map of the alphas that Gaussian weights of these shapes have, averaged over the
    modules of a type. For LLaMA attention gets `min_ratio` and the MLP `max_ratio`. AlphaDecay
    starts from the same decays, because the initial weights are Gaussian.

    Args:
        modules: the balanced modules.
        min_ratio: s1 of the linear map.
        max_ratio: s2 of the linear map.
    """
    alphas: dict[str, list[float]] = {}
    for module in modules:
        alphas.setdefault(module.type, []).append(gaussian_alpha(*module.weight.shape[:2]))
    means = torch.tensor(
        [sum(values) / len(values) for values in alphas.values()], dtype=torch.float64
    )
    ratios = assign_decays(means, 1.0, min_ratio=min_ratio, max_ratio=max_ratio)
    return dict(zip(alphas, ratios.tolist(), strict=True))


def constant_ratios(modules: Sequence[BalancedModule], multipliers: Mapping[str, float]) -> Tensor:
    """Return decay / eta of each module according to its type.

    Args:
        modules: the M balanced modules.
        multipliers: module type -> decay / eta.

    Returns:
        [M] float64; 1 for modules whose type is not named.

    Raises:
        ValueError: no module has a type that is named, or a multiplier is negative or not finite.
    """
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
