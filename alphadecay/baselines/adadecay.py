"""AdaDecay (Nakamura and Hong 2019, arXiv 1907.08931): a weight decay for each element."""

import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from alphadecay.decay_hooks import add_unless_skipped, check_precision, is_decoupled
from alphadecay.distributed import local, sum_over_shards
from alphadecay.modules import unwrap


class AdaDecay:
    """AdaDecay (Nakamura and Hong 2019, arXiv 1907.08931): a weight decay for each element.

    At each step element j of parameter l decays with eta * theta_j, where theta_j = 2 /
    (1 + exp(-4 z_j)) and z_j = (|g_j| - mean_l) / std_l over the parameter (population std). With
    a decoupled optimizer (AdamW) the weights shrink by lr * eta * theta before its step. With any
    other (Adam's L2) eta * theta * w is added to the gradient. The optimizer's own decay is 0.

    Needs memory for one float32 copy of the largest parameter. The interface is that of AlphaDecay.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are unwrapped. Its
            weights must be in float32, because narrower ones round such small changes away.
        weight_decay: eta.

    Attributes:
        history: empty, because no module has a decay of its own.

    Raises:
        ValueError: eta is negative or not finite, or a weight is narrower than float32.
    """

    analyzes = analyzes_next = False  # as in AlphaDecay's interface

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise ValueError(
                f"weight_decay is {weight_decay}: it must be a finite number, 0 or more"
            )
        self.model = unwrap(model)
        check_precision("AdaDecay", self.model.parameters())
        self.weight_decay = weight_decay
        self.history: list[dict[str, Any]] = []

    def param_groups(self) -> list[dict[str, Any]]:
        """Return one group with all trainable parameters, without the optimizer's own decay."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return [{"params": parameters, "weight_decay": 0.0}]

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> bool:
        """Decay every parameter that has a gradient, at its group's current `lr`.

        Call it before `optimizer.step()`, with unscaled gradients. If the optimizer's `found_inf`
        (as GradScaler sets it) says that the update is skipped, the weights do not change.

        Returns:
            False: the decays of modules were not rebalanced.

        Raises:
            ValueError: a group has a weight decay of its own, which would come on top.
        """
        for group in optimizer.param_groups:
            if group["weight_decay"]:
                raise ValueError(
                    "the optimizer also decays the weights: build it with decay.param_groups()"
                )
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._decay(parameter, parameter.grad, group["lr"], optimizer)
        return False

    def _decay(self, weight: Tensor, gradient: Tensor, lr: float, optimizer: Optimizer) -> None:
        """Apply the decay of one parameter, to the weight or to its gradient."""
        half_theta = _half_theta(gradient)
        if is_decoupled(optimizer):
            add_unless_skipped(local(weight), half_theta, -2 * self.weight_decay * lr, optimizer)
        else:
            local(gradient).addcmul_(local(weight), half_theta, value=2 * self.weight_decay)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state: each step's decays depend on its gradients alone."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the state is empty.

        Raises:
            ValueError: it is the state of another method.
        """
        if state:
            raise ValueError(f"AdaDecay has no state, but the saved one holds {', '.join(state)}")


def _half_theta(gradient: Tensor) -> Tensor:
    """Return theta / 2 of each element in a new tensor.

    For a sharded gradient these are the elements of this rank's part, standardised over the whole
    gradient.
    """
    theta = local(gradient).abs()
    flat = theta.flatten()
    total, squares = sum_over_shards(torch.stack([flat.sum(), torch.dot(flat, flat)]), gradient)
    mean = total / gradient.numel()
    variance = squares / gradient.numel() - mean * mean
    # If all gradients are equal, z is 0 and theta 1.
    scale = torch.where(variance > 0, 4 * variance.rsqrt(), 0.0)
    return torch.addcmul(-mean * scale, theta, scale, out=theta).sigmoid_()
