"""The optimizers of the published runs, and Muon."""

import contextlib
from collections.abc import Iterator

import torch
from torch.optim import Optimizer

from peft_pretraining.errors import UserError

OPTIMIZERS = ("adam", "adamw", "muon")


def build_optimizer(
    name: str,
    groups: list[dict],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Optimizer:
    """Adam (coupled L2), AdamW (decoupled decay) or Muon over parameter groups that carry their own weight_decay.

    Fused: one kernel for many parameters, and it computes in float32, so that bfloat16 parameters do not lose the
    decay: lr * weight_decay is below bfloat16's resolution and the unfused kernels round it away. Muon is for the matrices of groups
    with `hidden` True, AdamW for all else.
    """
    if name == "muon":
        return MuonWithAdamW(groups, lr, betas, eps)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](
        groups, lr=lr, betas=betas, eps=eps, fused=True
    )


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


class MuonWithAdamW(Optimizer):
    """torch's Muon for hidden matrices and its fused AdamW for the rest, as one optimizer with one state.

    Muon's step is scaled to the size of AdamW's (`match_rms_adamw`), so that both take the same learning rate and decays.

    Args:
        groups: those with `hidden` True hold hidden weights; of these Muon takes the matrices.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"torch {torch.__version__} has no Muon: install torch 2.9 or later, or use --optimizer adamw"
            )
        if any(p.dtype == torch.bfloat16 for group in groups for p in group["params"]):
            raise UserError(
                "Muon's decays are rounded away in bfloat16 weights: use --dtype bf16_mixed or float32"
            )
        matrices, others = [], []
        for group in groups:
            for kind, home in ((True, matrices), (False, others)):
                parameters = [
                    p for p in group["params"] if (group["hidden"] and p.ndim == 2) == kind
                ]
                if parameters:
                    home.append(group | {"params": parameters})
        self.muon = torch.optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=True)
        # The groups are the parts' own, so whoever sets a learning rate or a decay here sets it there.
        defaults = {"lr": lr, "weight_decay": 0.0, "fused": True, "decoupled_weight_decay": True}
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], defaults)
        self.muon.state = self.adamw.state = self.state
        self.found_inf: torch.Tensor | None = None  # above 0: leave the update out

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of both. Where a verdict `found_inf` was given the host waits for it: Muon cannot read it on the device."""
        if self.found_inf is None or not self.found_inf.item():
            self.muon.step()
            self.adamw.step()
