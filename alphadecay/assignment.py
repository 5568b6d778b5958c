"""Scores -> decays: the published maps, and one by ranks."""

import torch
from torch import Tensor

MAPS = ("tb_linear_map", "tb_sqrt", "tb_log2", "layerwise_sigmoid", "tb_quantile")


def assign_decays(
    scores: Tensor,
    weight_decay: float,
    mapping: str = "tb_linear_map",
    min_ratio: float = 0.6666,
    max_ratio: float = 3.0,
    positive: bool = True,
    blocks: list[str | None] | None = None,
) -> Tensor:
    """Weight decay of every module from its score (paper, equation 3, and its ablations).

    Args:
        scores: [M], one for each balanced module.
        weight_decay: eta.
        mapping: one of `MAPS`.
        min_ratio, max_ratio: s1 and s2 of the linear map, and of `tb_quantile`: the linear map of the scores' ranks, so that one
            outlier does not set the range for all (equal scores share their mean rank).
        positive: the decay rises with the score (the method); False reverses the order, a -> a_min + a_max - a.
        blocks: [M], the block of each module, for `layerwise_sigmoid`.

    Returns:
        [M] float64. Where all scores are equal: the middle of the range for the maps that have one, eta for the others.

    Raises:
        ValueError: an unknown map, a score that is not finite, or scores for which the map gives no decay >= 0.
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
        ratios = _share(scores, torch.sqrt if mapping == "tb_sqrt" else torch.log2)
    if not (torch.isfinite(ratios).all() and (ratios >= 0).all()):
        raise ValueError(
            f"{mapping} gives no decay >= 0 for scores from {scores.min():.4g} to {scores.max():.4g}; use tb_linear_map"
        )
    return weight_decay * ratios


def _linear(scores: Tensor, min_ratio: float, max_ratio: float) -> Tensor:
    low, high = scores.min(), scores.max()
    if low == high:
        return torch.full_like(scores, (min_ratio + max_ratio) / 2)
    return (scores - low) / (high - low) * (max_ratio - min_ratio) + min_ratio


def _quantile(scores: Tensor, min_ratio: float, max_ratio: float) -> Tensor:
    if len(scores) == 1:
        return _linear(scores, min_ratio, max_ratio)
    ordered = scores.sort().values
    below, up_to = (torch.searchsorted(ordered, scores, right=right) for right in (False, True))
    ranks = (
        below + up_to - 1
    ).double() / 2  # from 0; the mean of the places that equal scores take together
    return ranks / (len(scores) - 1) * (max_ratio - min_ratio) + min_ratio


def _share(scores: Tensor, function) -> Tensor:
    if scores.min() == scores.max():
        return torch.ones_like(scores)
    values = function(scores)
    return len(scores) * values / (values + 1e-8).sum()


def _layerwise_sigmoid(scores: Tensor, blocks: list[str | None]) -> Tensor:
    ratios = torch.empty_like(scores)
    for block in set(blocks):
        inside = torch.tensor([b == block for b in blocks])
        group = scores[inside]
        z = (group - group.mean()) / (group.std(correction=0) + 1e-8)
        ratios[inside] = 2 / (1 + torch.exp(-4 * z))
    return ratios
