"""From scores to weight decays: the published maps, and one that uses ranks."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from alphadecay.constants import MAPS

SQUEEZED = 0.05  # a part of the range in which decays are practically equal
MIN_SQUEEZED = 5  # of fewer decays, all but one are often close together


class MapSettings(TypedDict):
    """Keyword arguments of `assign_decays`, for classes that keep them."""

    mapping: str
    min_ratio: float
    max_ratio: float
    positive: bool


def squeezing_module(decays: Tensor, share: float = SQUEEZED) -> int | None:
    """Return the index of the one decay that leaves all others a small part of the range.

    An odd spectrum can have a score so far from the others that a linear map gives it one end of
    the range, and all others nearly the same decay at the other end.

    Args:
        decays: [M], the decays.
        share: how small the part is, as a fraction of the range.

    Returns:
        The index; None if there is no such decay, or if there are fewer than `MIN_SQUEEZED` decays.
    """
    if len(decays) < MIN_SQUEEZED:
        return None
    values, order = decays.sort()
    allowed = share * float(values[-1] - values[0])
    if not allowed:
        return None
    if float(values[-2] - values[0]) <= allowed:
        return int(order[-1])
    if float(values[-1] - values[1]) <= allowed:
        return int(order[0])
    return None


def assign_decays(
    scores: Tensor,
    weight_decay: float,
    mapping: str = "tb_linear_map",
    min_ratio: float = 0.6666,
    max_ratio: float = 3.0,
    positive: bool = True,
    blocks: Sequence[str | None] | None = None,
) -> Tensor:
    """Return the weight decay of every module, computed from its score.

    The maps are equation 3 of He et al. 2025 (arXiv 2506.14562) and those of its ablations:

    * `tb_linear_map`: the lowest score gets s1 * eta, the highest s2 * eta, linear in between.
    * `tb_sqrt`, `tb_log2`: proportional to the square root or log2 of the score, with mean eta.
    * `layerwise_sigmoid`: 2 eta / (1 + exp(-4 z)), with z the score standardised within its block.
    * `tb_quantile`: the linear map of the scores' ranks, so that one outlier does not set the
      range of all modules. Equal scores share their mean rank. (Not in the paper.)

    Args:
        scores: [M], one score for each balanced module.
        weight_decay: eta.
        mapping: one of `alphadecay.MAPS`.
        min_ratio: s1, used by `tb_linear_map` and `tb_quantile`.
        max_ratio: s2, likewise.
        positive: True: the decay rises with the score, as published. False: the order is reversed,
            a -> a_min + a_max - a.
        blocks: [M], the name of each module's block, for `layerwise_sigmoid`. None: one block.

    Returns:
        [M] float64, on the CPU. If all scores are equal: the middle of the range for the maps that
        have one, eta for the others.

    Raises:
        ValueError: the map is unknown, a score is not finite, or the map gives a decay that is
            negative or not finite.
    """
    if mapping not in MAPS:
        raise ValueError(f"unknown map {mapping!r}: choose one of {', '.join(MAPS)}")
    scores = scores.detach().to("cpu", torch.float64)
    if not torch.isfinite(scores).all():
        raise ValueError("a score is not finite")
    if not len(scores):
        return scores
    if not positive:
        scores = scores.min() + scores.max() - scores
    if mapping == "tb_linear_map":
        ratios = _linear(scores, min_ratio, max_ratio)
    elif mapping == "tb_quantile":
        ratios = _quantile(scores, min_ratio, max_ratio)
    elif mapping == "layerwise_sigmoid":
        ratios = _layerwise_sigmoid(scores, blocks if blocks is not None else [None] * len(scores))
    else:
        ratios = _normalized_by_mean(scores, torch.sqrt if mapping == "tb_sqrt" else torch.log2)
    if not (torch.isfinite(ratios).all() and (ratios >= 0).all()):
        raise ValueError(
            f"{mapping} gives no decay >= 0 for scores from {scores.min():.4g} to "
            f"{scores.max():.4g}; use tb_linear_map"
        )
    return weight_decay * ratios


def _linear(scores: Tensor, min_ratio: float, max_ratio: float) -> Tensor:
    """Map [M] scores linearly to [min_ratio, max_ratio]."""
    low, high = scores.min(), scores.max()
    if low == high:
        return torch.full_like(scores, (min_ratio + max_ratio) / 2)
    return (scores - low) / (high - low) * (max_ratio - min_ratio) + min_ratio


def _quantile(scores: Tensor, min_ratio: float, max_ratio: float) -> Tensor:
    """Map the ranks of [M] scores linearly to [min_ratio, max_ratio]."""
    if len(scores) == 1:
        return _linear(scores, min_ratio, max_ratio)
    ordered = scores.sort().values
    n_below = torch.searchsorted(ordered, scores)
    n_up_to = torch.searchsorted(ordered, scores, right=True)
    # Equal scores take the positions n_below to n_up_to - 1, counted from 0: their mean.
    ranks = (n_below + n_up_to - 1).double() / 2
    return ranks / (len(scores) - 1) * (max_ratio - min_ratio) + min_ratio


def _normalized_by_mean(scores: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return function(score) / mean of function over [M] scores; 1 if all scores are equal."""
    if scores.min() == scores.max():
        return torch.ones_like(scores)
    values = function(scores)
    return len(scores) * values / (values + 1e-8).sum()


def _layerwise_sigmoid(scores: Tensor, blocks: Sequence[str | None]) -> Tensor:
    """Return 2 / (1 + exp(-4 z)), z being the [M] scores standardised within each block."""
    ratios = torch.empty_like(scores)
    for block in set(blocks):
        in_block = torch.tensor([b == block for b in blocks])
        group = scores[in_block]
        z = (group - group.mean()) / (group.std(correction=0) + 1e-8)
        ratios[in_block] = 2 / (1 + torch.exp(-4 * z))
    return ratios
