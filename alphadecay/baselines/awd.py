"""Adaptive weight decay (AWD, Ghiasi et al. 2023, arXiv 2210.00094)."""

import math
from typing import Any

import torch.nn as nn
from torch.optim import Optimizer

from alphadecay.modules import unwrap
from alphadecay.norms import total_norm


class AWD:
    """Adaptive weight decay (Ghiasi et al. 2023, arXiv 2210.00094) over the whole network.

    At each step lambda_t = lambda_awd * ||grad||_2 / ||w||_2. Every parameter decays with the
    running mean lambda_bar = 0.1 * lambda_bar + 0.9 * lambda_t, which starts at 0. The interface is
    that of AlphaDecay.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are unwrapped.
        lambda_awd: strength. The published runs use 100 * eta for LLaMA and 50 * eta for ViT.

    Attributes:
        average: lambda_bar, the current decay of every parameter.
        history: empty, because no module has a decay of its own.

    Raises:
        ValueError: lambda_awd is negative or NaN.
    """

    analyzes = analyzes_next = False  # as in AlphaDecay's interface

    def __init__(self, model: nn.Module, lambda_awd: float) -> None:
        if not lambda_awd >= 0:
            raise ValueError(f"lambda_awd is {lambda_awd}: it must be 0 or more")
        self.model = unwrap(model)
        self.lambda_awd = lambda_awd
        self.average = 0.0
        self.history: list[dict[str, Any]] = []

    def param_groups(self) -> list[dict[str, Any]]:
        """Return one group with all trainable parameters."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return [{"params": parameters, "weight_decay": self.average}]

    def step(self, optimizer: Optimizer) -> bool:
        """Update the decay from the gradients and write it to every group.

        Call it before `optimizer.step()`, with unscaled gradients.

        Returns:
            False: the decays of modules were not rebalanced.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients:
            weights = [p.detach() for p in self.model.parameters() if p.requires_grad]
            # The only synchronisation with the device in this step.
            ratio = float(total_norm(gradients) / total_norm(weights))
            # An infinite gradient, whose update a gradient scaler skips, must not enter the
            # running mean: it would stay there.
            if math.isfinite(ratio):
                self.average = 0.1 * self.average + 0.9 * self.lambda_awd * ratio
        for group in optimizer.param_groups:
            group["weight_decay"] = self.average
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs: the running mean."""
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self.average = state["average"]
