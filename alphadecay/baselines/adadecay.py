"""AdaDecay (Nakamura & Hong 2019, arXiv 1907.08931): a weight decay for each element."""

import math

import torch
import torch.nn as nn
from torch.optim import Optimizer

from alphadecay.decay_hooks import add_unless_skipped, check_precision, is_decoupled
from alphadecay.distributed import local, sum_over_shards
from alphadecay.modules import unwrap


class AdaDecay:
    """AdaDecay (Nakamura & Hong 2019, arXiv 1907.08931): a decay for each element, by its gradient's place among those of its tensor.

    At each step element j of parameter l decays with eta * theta_j, theta_j = 2 / (1 + exp(-4 z_j)), where z_j = (|g_j| - mean_l) / std_l
    over the parameter (population std). With a decoupled optimizer (AdamW) the weights shrink by lr * eta * theta before its step,
    with any other (Adam's L2) eta * theta * w joins the gradient; the optimizer's own decay is 0. Needs memory for one float32 copy
    of the largest parameter.

    Args:
        model: any module; wrappers are seen through. Its weights must be float32: narrower ones round so small a change away.
        weight_decay: eta.
    """

    def __init__(self, model: nn.Module, weight_decay: float):
        if not (weight_decay >= 0 and math.isfinite(weight_decay)):
            raise ValueError(
                f"weight_decay is {weight_decay}: it must be a finite number, 0 or more"
            )
        self.model = unwrap(model)
        check_precision("AdaDecay", self.model.parameters())
        self.weight_decay = weight_decay
        self.history: list[dict] = []  # no module has a decay of its own

    def param_groups(self) -> list[dict]:
        """One group of all trainable parameters, with no decay that the optimizer would apply."""
        return [
            {"params": [p for p in self.model.parameters() if p.requires_grad], "weight_decay": 0.0}
        ]

    @torch.no_grad()
    def step(self, optimizer: Optimizer) -> bool:
        """Decay every parameter that has a gradient (unscaled) at its group's `lr` of now. Call before `optimizer.step()`.

        Does nothing to the weights in an update that the optimizer's `found_inf` (as GradScaler sets it) leaves out.
        """
        for group in optimizer.param_groups:
            if group["weight_decay"]:
                raise ValueError(
                    "the optimizer decays the weights as well: build it with decay.param_groups()"
                )
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._decay(parameter, group["lr"], optimizer)
        return False

    def _decay(self, parameter: torch.Tensor, lr: float, optimizer: Optimizer) -> None:
        theta = _half_theta(parameter.grad)
        if is_decoupled(optimizer):
            add_unless_skipped(local(parameter), theta, -2 * self.weight_decay * lr, optimizer)
        else:
            local(parameter.grad).addcmul_(local(parameter), theta, value=2 * self.weight_decay)

    def state_dict(self) -> dict:
        """Empty: each step's decays follow from its gradients alone."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing to continue from. Raises ValueError for the state of another method."""
        if state:
            raise ValueError(f"AdaDecay has no state, but the saved one holds {', '.join(state)}")


def _half_theta(gradient: torch.Tensor) -> torch.Tensor:
    """theta / 2 of each element, in one new tensor; of a sharded gradient of this rank's elements."""
    theta = local(gradient).abs()
    flat = theta.flatten()
    total, squares = sum_over_shards(torch.stack([flat.sum(), torch.dot(flat, flat)]), gradient)
    mean = total / gradient.numel()
    variance = squares / gradient.numel() - mean * mean
    scale = torch.where(variance > 0, 4 * variance.rsqrt(), 0.0)  # all alike: theta is 1
    return torch.addcmul(-mean * scale, theta, scale, out=theta).sigmoid_()
