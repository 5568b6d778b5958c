"""Analyse a model without training it."""

import math
from typing import Any

import torch.nn as nn
from torch import Tensor

from alphadecay.deprecated import renamed_keyword
from alphadecay.modules import spectral_modules
from alphadecay.norms import gradient_norms
from alphadecay.spectral.engine import SpectralEngine
from alphadecay.spectral.statistics import FAILURES


def analyze(
    model: nn.Module,
    fit_method: str | None = None,
    xmin_pos: float = 2.0,
    filter_zeros: bool = False,
    *,
    method: str | None = None,
) -> list[dict[str, Any]]:
    """Compute the statistics of every Linear, Conv2d and Conv1D of a model.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are unwrapped.
        fit_method: the power-law fit (`alphadecay.FIT_METHODS`), by default `median`.
        xmin_pos: see `alphadecay.fit_power_law`.
        filter_zeros: see `alphadecay.fit_power_law`.
        method: old name of `fit_method`.

    Returns:
        One dictionary for each module, in `named_modules()` order: module (its name), type, block,
        shape, the statistics (None if undefined; gradient norms are None without a gradient), and
        reason: why alpha is undefined, else None.

    Raises:
        ValueError: an argument of the fit is unknown or out of range.
    """
    fit_method = renamed_keyword("analyze", ("method", "fit_method"), method, fit_method)
    modules = spectral_modules(model)
    weights: list[Tensor] = [m.weight for m in modules]
    rows = SpectralEngine().rows(
        weights,
        gradient_norms(weights),
        "alpha",
        whole=True,
        method=fit_method or "median",
        xmin_pos=xmin_pos,
        filter_zeros=filter_zeros,
    )
    table = []
    for module, (row, failure) in zip(modules, rows, strict=True):
        numbers = {name: None if math.isnan(value) else value for name, value in row.items()}
        if module.weight.grad is None:  # AlphaDecay scores it 10, which is not a measurement
            numbers |= {"gradnorm": None, "gradnorm_d_weightnorm": None}
        place = {
            "module": module.name,
            "type": module.type,
            "block": module.block,
            "shape": tuple(module.weight.shape),
        }
        table.append(place | numbers | {"reason": FAILURES[failure]})
    return table
