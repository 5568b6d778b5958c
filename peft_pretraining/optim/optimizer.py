"""The optimizers of the published runs, and Muon."""

import contextlib
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from peft_pretraining.errors import UserError


def build_optimizer(
    name: str,
    groups: list[dict],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """Build an optimizer over parameter groups that have their own weight decays.

    Adam and AdamW are fused: one kernel for many parameters, which computes in float32. In bfloat16
    the other kernels round the weight decay away, because lr * weight_decay is below the resolution
    of bfloat16.

    Args:
        name: `adam` (the decay is an L2 term of the gradient), `adamw` (the decay shrinks the
            weight directly), or `muon` (Muon for the matrices of groups with `hidden` True, AdamW
            for all other parameters).
        groups: Parameter groups with `params`, `weight_decay` and, for Muon, `hidden`.
        lr: Learning rate.
        betas: Decay rates of the moments of Adam and AdamW.
        eps: Added to the denominator of Adam and AdamW.

    Raises:
        UserError: Muon is not available, or the parameters are in bfloat16, which it cannot train.
    """
    if name == "muon":
        return MuonWithAdamW(groups, lr, betas, eps)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
        groups, lr=lr, betas=betas, eps=eps, fused=True
    )


@contextlib.contextmanager
def scaled_decays(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Context manager that multiplies the weight decay of every group by `factor`.

    Ratios between the groups stay. The original decays are restored at the end, also after an
    exception.
    """
    original = [group["weight_decay"] for group in optimizer.param_groups]
    for group, decay in zip(optimizer.param_groups, original, strict=True):
        group["weight_decay"] = decay * factor
    try:
        yield
    finally:
        for group, decay in zip(optimizer.param_groups, original, strict=True):
            group["weight_decay"] = decay


class MuonWithAdamW(Optimizer):
    """torch's Muon for hidden matrices and its fused AdamW for the rest, as one optimizer.

    The step of Muon is scaled to the size of AdamW's step (`match_rms_adamw`), so that both use the
    same learning rate and decays. Muon cannot read `found_inf` on the device, so `step` waits for
    it.

    Args:
        groups: Parameter groups. Muon trains the matrices of those with `hidden` True.
        lr: Learning rate of both.
        betas: Decay rates of the moments of AdamW.
        eps: Added to the denominator of AdamW.

    Raises:
        UserError: torch has no Muon, or there are parameters in bfloat16.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"torch {torch.__version__} has no Muon: "
                "install torch 2.9 or later, or use --optimizer adamw"
            )
        if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
            raise UserError(
                "Muon's decays are rounded away in bfloat16 weights: "
                "use --dtype bf16_mixed or float32"
            )
        muon_groups: list[dict] = []
        adamw_groups: list[dict] = []
        for group in groups:
            for is_muon, chosen in ((True, muon_groups), (False, adamw_groups)):
                parameters = [
                    p for p in group["params"] if (group["hidden"] and p.ndim == 2) == is_muon
                ]
                if parameters:
                    chosen.append(group | {"params": parameters})
        self.muon = torch.optim.Muon(muon_groups, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(adamw_groups, lr=lr, betas=betas, eps=eps, fused=True)
        # Share the group dictionaries: a learning rate or decay that is set here is set there too.
        defaults = {"lr": lr, "weight_decay": 0.0, "fused": True, "decoupled_weight_decay": True}
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], defaults)
        self.muon.state = self.adamw.state = self.state
        self.found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Make one update of both, unless `found_inf` is above 0."""
        if self.found_inf is None or not self.found_inf.item():
            self.muon.step()
            self.adamw.step()
