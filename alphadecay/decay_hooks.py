"""Other ways for a decoupled decay to reach the weights, whatever method sets the decays: AdamC and cautious decay."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from alphadecay.distributed import local


def install_decay_hooks(
    optimizer: Optimizer, peak_lr: float | None = None, cautious: bool = False
) -> None:
    """Change how the optimizer's decays reach the weights in each of its steps from now on, by its step hooks.

    Args:
        optimizer: a decoupled one, AdamW say, with the groups of `split_hidden`. Its groups keep their `weight_decay` between steps.
        peak_lr: AdamC (Defazio 2025, arXiv 2506.02285): weights that a normalisation follows shrink by lr^2 / peak_lr * decay, not
            by lr * decay. As in its paper these are the weights of every layer but the output layer; embeddings, gains and biases
            are not. None: off.
        cautious: cautious decay (arXiv 2510.12402): only elements whose Adam update moves them towards zero decay, so update and
            decay agree. Needs memory for one copy of the largest parameter.

    Raises:
        ValueError: an optimizer that this does not go with.
    """
    if not is_decoupled(optimizer):
        raise ValueError(
            f"AdamC and cautious decay change a decoupled decay, which {type(optimizer).__name__} has not: use AdamW"
        )
    if peak_lr is not None and any("hidden" not in group for group in optimizer.param_groups):
        raise ValueError(
            "AdamC needs to know which weights a normalisation follows: build the optimizer with split_hidden(groups, model)"
        )
    if cautious:
        if "betas" not in optimizer.defaults:
            raise ValueError(
                f"cautious decay needs the sign of an Adam update, which {type(optimizer).__name__} does not tell: use AdamW"
            )
        check_precision(
            "cautious decay", [p for group in optimizer.param_groups for p in group["params"]]
        )
    saved: list[float] = []

    def before(optimizer: Optimizer, *_) -> None:
        saved[:] = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            if peak_lr is not None and group["hidden"]:
                group["weight_decay"] *= group["lr"] / peak_lr
            if cautious:
                _decay_cautiously(optimizer, group)
                group["weight_decay"] = 0.0

    def after(optimizer: Optimizer, *_) -> None:
        for group, decay in zip(optimizer.param_groups, saved, strict=True):
            group["weight_decay"] = decay

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


@torch.no_grad()
def _decay_cautiously(optimizer: Optimizer, group: dict) -> None:
    for parameter in group["params"]:
        if parameter.grad is None or not group["weight_decay"]:
            continue
        moment = optimizer.state[parameter].get("exp_avg")
        weight, gradient, moment = (
            t if t is None else local(t) for t in (parameter, parameter.grad, moment)
        )
        # The update to come has the sign of the first moment to come; bias correction and the second moment do not change it.
        agree = (
            gradient.mul(weight)
            if moment is None
            else moment.lerp(gradient, 1 - group["betas"][0]).mul_(weight)
        )
        agree.gt_(0)
        add_unless_skipped(weight, agree, -group["lr"] * group["weight_decay"], optimizer)


def is_decoupled(optimizer: Optimizer) -> bool:
    """Whether the optimizer's decay shrinks the weights by lr * decay (AdamW), not by way of the gradient (Adam's L2)."""
    return bool(optimizer.defaults.get("decoupled_weight_decay"))


def add_unless_skipped(
    parameter: Tensor, share: Tensor, factor: float, optimizer: Optimizer
) -> None:
    """parameter += factor * share * parameter; nothing where the optimizer's `found_inf` says that it will leave the update out.

    Of such an update `share` may hold NaN. It is overwritten; the verdict is not waited for.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    if found_inf is not None:
        share.masked_fill_(found_inf.to(share.device) > 0, 0.0)
    parameter.addcmul_(parameter, share, value=factor)


def check_precision(what: str, parameters: Iterable[Tensor]) -> None:
    """Raise ValueError where weights are narrower than float32: lr * decay is below their resolution."""
    narrow = next(
        (p.dtype for p in parameters if p.is_floating_point() and p.dtype.itemsize < 4), None
    )
    if narrow:
        raise ValueError(
            f"{what} changes weights or gradients in place, and {str(narrow)[6:]} rounds so small a change away: "
            "keep the weights in float32 (--dtype bf16_mixed or float32)"
        )
