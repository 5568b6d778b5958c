"""Variants of decoupled weight decay: AdamC and cautious decay.

They change how a decay reaches the weights, independently of the method that sets the decays.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from alphadecay.distributed import local


def install_decay_hooks(
    optimizer: Optimizer, peak_lr: float | None = None, cautious: bool = False
) -> None:
    """Change how the optimizer applies its weight decays, from its next step on.

    The groups keep their `weight_decay` between steps.

    Args:
        optimizer: an optimizer with decoupled decay, such as AdamW, over the groups of
            `alphadecay.split_hidden`.
        peak_lr: AdamC (Defazio 2025, arXiv 2506.02285): the weights of all layers except the output
            layer shrink by lr^2 / peak_lr * decay instead of lr * decay. As in its paper,
            embeddings, gains and biases are not affected. None: off.
        cautious: cautious decay (arXiv 2510.12402): decay only the elements that the Adam update
            also moves towards zero. Needs memory for one copy of the largest parameter.

    Raises:
        ValueError: the optimizer's decay is not decoupled, its groups do not tell hidden weights
            apart, its update has no known sign, or the weights are narrower than float32.
    """
    if not is_decoupled(optimizer):
        raise ValueError(
            "AdamC and cautious decay need a decoupled weight decay, which "
            f"{type(optimizer).__name__} does not have: use AdamW"
        )
    if peak_lr is not None and any("hidden" not in group for group in optimizer.param_groups):
        raise ValueError(
            "AdamC needs to know which weights are followed by a normalisation: "
            "build the optimizer with split_hidden(groups, model)"
        )
    if cautious:
        if "betas" not in optimizer.defaults:
            raise ValueError(
                "cautious decay needs the sign of an Adam update, which "
                f"{type(optimizer).__name__} does not provide: use AdamW"
            )
        check_precision(
            "cautious decay", [p for group in optimizer.param_groups for p in group["params"]]
        )
    saved: list[float] = []

    def before_step(optimizer: Optimizer, *_: Any) -> None:
        saved[:] = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if peak_lr is not None and group["hidden"]:
                group["weight_decay"] *= group["lr"] / peak_lr
            if cautious:
                _decay_cautiously(optimizer, group)
                group["weight_decay"] = 0.0

    def after_step(optimizer: Optimizer, *_: Any) -> None:
        for group, decay in zip(optimizer.param_groups, saved, strict=True):
            group["weight_decay"] = decay

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def _decay_cautiously(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Shrink the elements of a group's weights whose coming Adam update has the weight's sign."""
    for parameter in group["params"]:
        if parameter.grad is None or not group["weight_decay"]:
            continue
        weight, gradient = local(parameter), local(parameter.grad)
        moment = optimizer.state[parameter].get("exp_avg")
        # The coming update has the sign of the coming first moment. Bias correction and the second
        # moment do not change it. In the first step there is no moment yet.
        if moment is None:
            same_sign = gradient.mul(weight)
        else:
            same_sign = local(moment).lerp(gradient, 1 - group["betas"][0]).mul_(weight)
        same_sign.gt_(0)
        add_unless_skipped(weight, same_sign, -group["lr"] * group["weight_decay"], optimizer)


def is_decoupled(optimizer: Optimizer) -> bool:
    """Return True if the decay shrinks the weights by lr * decay, as in AdamW.

    False means L2 regularisation: the decay is added to the gradient, as in Adam.
    """
    return bool(optimizer.defaults.get("decoupled_weight_decay"))


def add_unless_skipped(
    parameter: Tensor, share: Tensor, factor: float, optimizer: Optimizer
) -> None:
    """Compute parameter += factor * share * parameter, unless the optimizer skips this update.

    An update is skipped if the optimizer's `found_inf` (as GradScaler sets it) is above zero; then
    `share` may hold NaN. This does not synchronise with the device.

    Args:
        parameter: changed in place.
        share: of the parameter's shape. Overwritten.
        factor: a number.
        optimizer: the optimizer whose `found_inf` is read.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        share.masked_fill_(found_inf.to(share.device) > 0, 0.0)
    parameter.addcmul_(parameter, share, value=factor)


def check_precision(what: str, parameters: Iterable[Tensor]) -> None:
    """Check that no parameter is narrower than float32, in which lr * decay would be rounded away.

    Args:
        what: the method that needs the precision, for the message.
        parameters: the parameters that it changes in place.

    Raises:
        ValueError: a floating-point parameter has fewer than 32 bits.
    """
    narrow = next(
        (p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize < 4), None
    )
    if narrow:
        raise ValueError(
            f"{what} changes weights or gradients in place, and {str(narrow)[6:]} rounds such "
            "small changes away: keep the weights in float32 (--dtype bf16_mixed or float32)"
        )
