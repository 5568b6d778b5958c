"""The optimizers of the published runs."""

import contextlib
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}  # coupled L2, decoupled decay


def build_optimizer(name: str, groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Optimizer:
    """Adam or AdamW over parameter groups that carry their own weight_decay.

    Fused: one kernel for many parameters, and it computes in float32, so that bfloat16 parameters do not lose the
    decay: lr * weight_decay is below bfloat16's resolution and the unfused kernels round it away.
    """
    return OPTIMIZERS[name](groups, lr=lr, betas=betas, eps=eps, fused=True)


@contextlib.contextmanager
def scaled_decays(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Inside, every group's weight decay is `factor` times its own, so that ratios between groups stay; afterwards it is its own again."""
    own = [group["weight_decay"] for group in optimizer.param_groups]
    for group, decay in zip(optimizer.param_groups, own, strict=True):
        group["weight_decay"] = decay * factor
    try:
        yield
    finally:
        for group, decay in zip(optimizer.param_groups, own, strict=True):
            group["weight_decay"] = decay
