"""Gradient clipping, and the mean weight decay of an optimizer."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.parallel.fsdp import full_tensor


def clip_gradients(model: nn.Module, max_grad_norm: float) -> Tensor:
    """Clip the gradients of a model to a maximum norm.

    Args:
        model: The model, whose gradients are scaled in place.
        max_grad_norm: The largest L2 norm of all gradients together; 0: no clipping.

    Returns:
        The norm before clipping, a scalar on the device.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
    return norm


def mean_decay(optimizer: Optimizer) -> float:
    """Return the mean weight decay over all parameters of an optimizer.

    Each group counts by its number of parameters. AdaDecay applies its decay itself, so its groups
    have a mean of 0.
    """
    sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
    return sum(
        n * group["weight_decay"] for n, group in zip(sizes, optimizer.param_groups, strict=True)
    ) / sum(sizes)
