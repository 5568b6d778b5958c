"""Gradient clipping and the mean weight decay of an optimizer."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.parallel.fsdp import full_tensor


def clip_gradients(model: nn.Module, greatest_norm: float) -> Tensor:
    """The L2 norm of all gradients together, which is brought down to `greatest_norm` where that is not 0."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    if greatest_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), greatest_norm, norm)
    return norm


def mean_decay(optimizer: Optimizer) -> float:
    """The parameter-weighted mean of the groups' decays; 0 for AdaDecay, which applies its own."""
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return sum(
        n * group["weight_decay"] for n, group in zip(sizes, optimizer.param_groups, strict=True)
    ) / sum(sizes)
