"""Baselines with the interface of AlphaDecay: AWD and AdaDecay."""

import math

import torch.nn as nn
from torch.optim import Optimizer

from alphadecay.modules import unwrap
from alphadecay.norms import total_norm


class AWD:
    """Adaptive weight decay (Ghiasi et al. 2023, arXiv 2210.00094) over the whole network.

    At each step lambda_t = lambda_awd * ||grad||_2 / ||w||_2, averaged as
    lambda_bar = 0.1 * lambda_bar + 0.9 * lambda_t from 0, is the decay of every parameter.

    Args:
        model: any module; wrappers are seen through.
        lambda_awd: strength. The published runs use 100 * eta for LLaMA and 50 * eta for ViT.
    """

    def __init__(self, model: nn.Module, lambda_awd: float):
        if not lambda_awd >= 0:
            raise ValueError(f"lambda_awd is {lambda_awd}: it must be 0 or more")
        self.model = unwrap(model)
        self.lambda_awd = lambda_awd
        self.average = 0.0
        self.history: list[dict] = []  # no module has a decay of its own

    def param_groups(self) -> list[dict]:
        """One group of all trainable parameters."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return [{"params": parameters, "weight_decay": self.average}]

    def step(self, optimizer: Optimizer) -> bool:
        """Update the decay from the gradients (unscaled) and write it to every group. Call before `optimizer.step()`."""
        with_gradient = [p for p in self.model.parameters() if p.grad is not None]
        if with_gradient:
            weights = total_norm([p.detach() for p in self.model.parameters() if p.requires_grad])
            gradients = total_norm([p.grad for p in with_gradient])
            ratio = float(gradients / weights)  # the step's only wait for the device
            if math.isfinite(
                ratio
            ):  # a step with an infinite gradient, which a gradient scaler will skip, must not stay in the mean
                self.average = 0.1 * self.average + 0.9 * self.lambda_awd * ratio
        for group in optimizer.param_groups:
            group["weight_decay"] = self.average
        return False

    def state_dict(self) -> dict:
        """The running average, which decides the future."""
        return {"average": self.average}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict()`."""
        self.average = state["average"]
