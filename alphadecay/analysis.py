"""Looking at a model: statistics of every module, without training."""

import math

import torch.nn as nn

from alphadecay.modules import spectral_modules
from alphadecay.norms import gradient_norms
from alphadecay.spectral.engine import SpectralEngine
from alphadecay.spectral.statistics import FAILURES


def analyze(
    model: nn.Module, method: str = "median", xmin_pos: float = 2.0, filter_zeros: bool = False
) -> list[dict]:
    """One dictionary for each Linear, Conv2d and Conv1D of a model: module, type, block, shape, the statistics
    (None where undefined) and the reason why alpha is undefined, else None. The fit is as in `fit_power_law`."""
    modules = spectral_modules(model)
    weights = [m.weight for m in modules]
    fit = {"method": method, "xmin_pos": xmin_pos, "filter_zeros": filter_zeros}
    rows = SpectralEngine().rows(weights, gradient_norms(weights), "alpha", whole=True, **fit)
    table = []
    for module, (row, failure) in zip(modules, rows, strict=True):
        numbers = {name: None if math.isnan(value) else value for name, value in row.items()}
        if module.weight.grad is None:  # the balancer scores it 10, but there is nothing to look at
            numbers |= {"gradnorm": None, "gradnorm_d_weightnorm": None}
        place = {
            "module": module.name,
            "type": module.type,
            "block": module.block,
            "shape": tuple(module.weight.shape),
        }
        table.append(place | numbers | {"reason": FAILURES[failure]})
    return table
