"""The optimizers of the published runs."""

import torch
from torch.optim import Optimizer

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}  # coupled L2, decoupled decay


def build_optimizer(name: str, groups: list[dict], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Optimizer:
    """Adam or AdamW over parameter groups that carry their own weight_decay.

    Fused: one kernel for many parameters, and it computes in float32, so that bfloat16 parameters do not lose the
    decay: lr * weight_decay is below bfloat16's resolution and the unfused kernels round it away.
    """
    return OPTIMIZERS[name](groups, lr=lr, betas=betas, eps=eps, fused=True)
