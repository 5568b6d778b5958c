"""The loss of a language model's head, from hidden states to the summed cross-entropy, in several ways that give the same numbers.

All take hidden [n, d], the head's weight [V, d] and targets [n], and return the sum of the negative log-likelihoods (nats) as a float32
scalar. `plain` is the definition; it keeps logits, and their gradients, of all n tokens (2 GB each for 16,384 tokens and 32,000 words).
"""

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext

CHUNK_BYTES = {
    "cpu": 64 << 20,
    "cuda": 512 << 20,
}  # of float32 logits whose gradients are made together
SLICE_BYTES = 2 << 20  # of those whose softmax a CPU makes at a time: what its cache holds


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits of all tokens, then torch's cross-entropy in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


class Chunked:
    """Logits of some tokens at a time, whose gradients are made at once, in the forward pass; neither is kept.

    On a CPU the memory for the logits is held from call to call: the system takes longer to hand it out than a product to fill it.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            return _ChunkedLoss.apply(
                hidden, weight, targets, self._space(hidden, weight), torch.is_grad_enabled()
            )

    def _space(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Memory for the logits of a chunk: [rows, V]."""
        rows = max(1, CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"]) // (4 * len(weight)))
        if hidden.device.type != "cpu":
            return hidden.new_empty(min(rows, len(hidden)), len(weight))
        if (
            self._buffer is None
            or self._buffer.dtype != hidden.dtype
            or self._buffer.shape != (rows, len(weight))
        ):
            self._buffer = hidden.new_empty(rows, len(weight))
        return self._buffer


class _ChunkedLoss(torch.autograd.Function):
    """The gradient of a sum with respect to the logits is softmax - one-hot whatever comes after, but for one factor, so that the
    gradients of both inputs can be made while the logits are there; the backward pass scales them."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, space: Tensor, with_gradients: bool
    ) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        gradients = _Gradients(hidden, weight) if with_gradients else None
        for start in range(0, len(hidden), len(space)):
            part = hidden[start : start + len(space)]
            logits = torch.mm(part, weight.T, out=space[: len(part)])
            losses, sums = _exponentials(logits, targets[start : start + len(part), None])
            loss += losses.sum()
            if gradients:
                gradients.add(start, part, logits, sums)
        ctx.gradients = gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, factor: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the chunked loss goes backward once: use --loss plain to do it again"
            )
        return *gradients.scaled(factor), None, None, None


def _exponentials(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Turns logits [n, V], in place, into sums * (softmax - one-hot) for targets [n, 1].

    Returns losses and sums, float32 [n, 1]. Divided by the sums the products that are to come are smaller than the logits.
    """
    losses, sums = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(2))
    rows = (
        max(1, SLICE_BYTES // (4 * logits.shape[1])) if logits.device.type == "cpu" else len(logits)
    )
    for whole, labels, loss, total in zip(
        *(x.split(rows) for x in (logits, targets, losses, sums)), strict=True
    ):
        part = whole.float()  # no copy of float32
        part -= part.amax(1, keepdim=True)
        chosen = part.gather(1, labels)
        torch.sum(part.exp_(), 1, keepdim=True, out=total)
        torch.sub(total.log(), chosen, out=loss)
        part.scatter_add_(1, labels, -total)
        if part is not whole:
            whole.copy_(part)
    return losses, sums


class _Gradients:
    """Gradients of the hidden states and of the head, which the chunks add to: the head's in float32, where rounding would add up."""

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.weight = weight
        self.of_hidden = torch.empty_like(hidden)
        self.of_weight: Tensor | None = None

    def add(self, start: int, hidden: Tensor, of_logits: Tensor, sums: Tensor) -> None:
        """Those of the tokens from `start` on; of_logits: times `sums` [n, 1]."""
        torch.div(of_logits @ self.weight, sums, out=self.of_hidden[start : start + len(hidden)])
        hidden = (hidden / sums).to(hidden.dtype)
        if self.of_weight is None:
            self.of_weight = (of_logits.T @ hidden).float()
        elif of_logits.dtype == torch.float32:
            self.of_weight.addmm_(of_logits.T, hidden)
        else:
            self.of_weight += of_logits.T @ hidden

    def scaled(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        of_weight = (
            torch.zeros_like(self.weight)
            if self.of_weight is None
            else self.of_weight.mul_(factor).to(self.weight.dtype)
        )
        return self.of_hidden.mul_(factor), of_weight


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own, in chunks, where this torch has it (2.14)."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options).float()


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """LinkedIn's Triton kernel (pip install liger-kernel; CUDA only)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum").float()


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Callable[[], Loss]] = {
    "chunked": Chunked, "plain": lambda: plain, "torch": lambda: torch_loss, "liger": lambda: liger_loss,
}  # fmt: skip


def choose(
    name: str, tokens: int, shape: tuple[int, int], dtype: torch.dtype, autocast: contextlib.AbstractContextManager, ranks: DistributedContext,
    before: str | None = None,
) -> str:  # fmt: skip
    """The loss that `--loss` means, the same on all ranks; `auto` is the one of the run that is continued (`before`), else on a CPU
    `chunked`, on a GPU the fastest for so many tokens and a head of this shape [V, d] and dtype.

    Raises UserError where the one that was named cannot be used here.
    """
    if name != "auto":
        if why := _missing(name, ranks.device):
            raise UserError(f"--loss {name}: {why}; or leave --loss out")
        return name
    if before:
        return before
    candidates = [name for name in LOSSES if _missing(name, ranks.device) is None]
    on_gpu = ranks.device.type == "cuda" and ranks.is_main
    return ranks.broadcast(
        fastest(candidates, tokens, shape, dtype, autocast, ranks.device) if on_gpu else "chunked"
    )


def _missing(name: str, device: torch.device) -> str | None:
    """Why a loss cannot be used here; None where it can."""
    if name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy, install torch 2.14 or later"
    if name == "liger" and device.type != "cuda":
        return "Liger's kernel needs a CUDA device"
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "Liger's kernel is not installed, pip install liger-kernel"
    return None


def fastest(
    names: list[str], tokens: int, shape: tuple[int, int], dtype: torch.dtype, autocast: contextlib.AbstractContextManager,
    device: torch.device,
) -> str:  # fmt: skip
    """The loss that takes the least time, forward and backward: measured once, on random numbers."""
    generator = torch.Generator(device).manual_seed(
        0
    )  # not the run's own, whose draws a resumed run must repeat
    weight, hidden = (
        torch.randn(n, shape[1], generator=generator, dtype=dtype, device=device).requires_grad_()
        for n in (shape[0], tokens)
    )
    targets = torch.randint(shape[0], (tokens,), generator=generator, device=device)
    return min(names, key=lambda name: _seconds(LOSSES[name](), hidden, weight, targets, autocast))


def _seconds(
    loss: Loss,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    autocast: contextlib.AbstractContextManager,
) -> float:
    """Of the second of two calls: the first one compiles kernels. Infinite where memory does not suffice."""
    try:
        for _ in range(2):
            start = time.perf_counter()
            with autocast:
                value = loss(hidden, weight, targets)
            gradients = torch.autograd.grad(value, (hidden, weight))
            float(gradients[0].sum() + gradients[1].sum())  # waits for the device
            elapsed = time.perf_counter() - start
    except RuntimeError:
        return math.inf
    return elapsed
