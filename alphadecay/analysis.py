"""Looking at a model: statistics of every module, without training."""

import math

import torch
import torch.nn as nn

from alphadecay.modules import spectral_modules
from alphadecay.statistics import FAILURES, module_row


def analyze(model: nn.Module, method: str = "median", xmin_pos: float = 2.0, filter_zeros: bool = False) -> list[dict]:
    """One dictionary for each Linear, Conv2d and Conv1D of a model: module, type, block, shape, the statistics
    (None where undefined) and the reason why alpha is undefined, else None. The fit is as in `fit_power_law`."""
    rows = []
    for module in spectral_modules(model):
        with torch.no_grad():
            row, failure = module_row(module.weight, module.weight.grad, method=method, xmin_pos=xmin_pos, filter_zeros=filter_zeros)
        numbers = {name: None if math.isnan(value) else value for name, value in row.items()}
        place = {"module": module.name, "type": module.type, "block": module.block, "shape": tuple(module.weight.shape)}
        rows.append(place | numbers | {"reason": FAILURES[failure]})
    return rows
