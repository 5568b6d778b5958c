"""Linear layer and cross-entropy in one call: plain, chunked, torch and Liger implementations.

All take hidden states [n, d], the output layer's weight [V, d] and targets [n], and return the sum
of the negative log-likelihoods (nats) as a float32 scalar. `plain_loss` is the definition. It keeps
the logits of all n tokens and their gradients: 2 GB each for 16,384 tokens and 32,000 words.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_pretraining.errors import UserError

# What computes losses and gradients of the logits [n, V] of a chunk, given the targets [n, 1].
SoftmaxMinusOneHot = Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]
# Size of the float32 logits of one chunk. On a GPU a chunk must be large enough to keep it busy;
# on a CPU a smaller one already is.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
# Size of the part of a chunk whose softmax is computed at a time on a CPU: it fits the cache.
SLICE_BYTES = 2 << 20


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss: the logits of all tokens, then torch's cross-entropy in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


class Chunked:
    """The loss computed for a chunk of tokens at a time, so that never all logits are in memory.

    The gradients are computed in the forward pass, while the logits of a chunk exist. On a CPU the
    logits buffer is reused between calls: allocating it takes longer than filling it. On a GPU the
    operations on the logits can be compiled.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._softmax_minus_one_hot: SoftmaxMinusOneHot = _softmax_minus_one_hot

    def compile(self) -> None:
        """Compile what happens between the matrix products, except on a CPU.

        The compiled kernel reads and writes the logits in their own type. Otherwise about ten
        operations do, most of them on a copy in float32.
        """
        self._softmax_minus_one_hot = _compiled_softmax_minus_one_hot

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss; see the module's docstring."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            return _ChunkedLoss.apply(
                hidden,
                weight,
                targets,
                self._logits_buffer(hidden, weight),
                self._softmax_minus_one_hot,
                torch.is_grad_enabled(),
            )

    def _logits_buffer(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return memory for the logits of a chunk: [tokens of a chunk, V]."""
        chunk_bytes = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
        tokens = max(1, chunk_bytes // (4 * len(weight)))
        if hidden.device.type != "cpu":
            # A batch of the validation data may have no target at all.
            return hidden.new_empty(max(1, min(tokens, len(hidden))), len(weight))
        if (
            self._buffer is None
            or self._buffer.dtype != hidden.dtype
            or self._buffer.shape != (tokens, len(weight))
        ):
            self._buffer = hidden.new_empty(tokens, len(weight))
        return self._buffer


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy whose gradients are computed in the forward pass.

    The gradient of the sum with respect to the logits is softmax - one_hot, times one factor that
    depends on what follows. So the gradients of hidden states and weight can be computed while the
    logits of a chunk exist, and the backward pass multiplies them by the factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        buffer: Tensor,
        softmax_minus_one_hot: SoftmaxMinusOneHot,
        with_gradients: bool,
    ) -> Tensor:
        loss = torch.zeros((), device=hidden.device)
        gradients = _Gradients(hidden, weight) if with_gradients else None
        for start in range(0, len(hidden), len(buffer)):
            part = hidden[start : start + len(buffer)]
            logits = torch.mm(part, weight.T, out=buffer[: len(part)])
            labels = targets[start : start + len(part), None]
            losses, sums = softmax_minus_one_hot(logits, labels, with_gradients)
            loss += losses.sum()
            if gradients:
                gradients.add(start, part, logits, sums)
        ctx.gradients = gradients
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "the chunked loss supports one backward pass only: use --loss plain for more"
            )
        return *gradients.scaled(factor), None, None, None, None


def _softmax_minus_one_hot(
    logits: Tensor, targets: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor]:
    """Compute the losses, and replace the logits, in place, by sums * (softmax - one_hot).

    The division by the sums is left to the caller: after the matrix products that follow there are
    fewer numbers to divide.

    Args:
        logits: [n, V], overwritten.
        targets: [n, 1].
        with_gradients: False if the replaced logits are not needed; they are undefined then.

    Returns:
        Losses and sums of the exponentials, both float32 [n, 1].
    """
    losses, sums = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(2))
    on_cpu = logits.device.type == "cpu"
    slice_rows = max(1, SLICE_BYTES // (4 * logits.shape[1])) if on_cpu else len(logits)
    slices = zip(*(x.split(slice_rows) for x in (logits, targets, losses, sums)), strict=True)
    for logits_slice, labels, loss, total in slices:
        part = logits_slice.float()  # the same tensor, not a copy, if it is float32 already
        part -= part.amax(1, keepdim=True)
        target_logits = part.gather(1, labels)
        torch.sum(part.exp_(), 1, keepdim=True, out=total)
        torch.sub(total.log(), target_logits, out=loss)
        if with_gradients:
            part.scatter_add_(1, labels, -total)
            if part is not logits_slice:
                logits_slice.copy_(part)
    return losses, sums


def _compiled_softmax_minus_one_hot(
    logits: Tensor, targets: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor]:
    """Compute what `_softmax_minus_one_hot` computes, by a compiled kernel except on a CPU.

    The number of tokens in a chunk depends on the data. It is a variable of the kernel, which is
    compiled once for the training and once for the evaluation.
    """
    if logits.device.type == "cpu" or len(logits) < 2:  # a single row would be compiled apart
        return _softmax_minus_one_hot(logits, targets, with_gradients)
    for tensor in (logits, targets):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _whole_rows_compiled()(logits, targets, with_gradients)


@functools.cache
def _whole_rows_compiled() -> SoftmaxMinusOneHot:
    # A reduction that is split rounds in another way, and whether it is split would depend on the
    # number of tokens in the first chunk: a resumed run begins with another one.
    return torch.compile(
        _softmax_of_whole_rows, fullgraph=True, options={"split_reductions": False}
    )


def _softmax_of_whole_rows(
    logits: Tensor, targets: Tensor, with_gradients: bool
) -> tuple[Tensor, Tensor]:
    """Compute what `_softmax_minus_one_hot` computes, written for a compiler.

    Whatever is not returned stays in registers: memory is read and written in the logits' type.
    """
    numbers = logits.float()
    shifted = numbers - numbers.amax(1, keepdim=True)
    exponentials = shifted.exp()
    sums = exponentials.sum(1, keepdim=True)
    losses = sums.log() - shifted.gather(1, targets)
    if with_gradients:
        words = torch.arange(logits.shape[1], device=logits.device)
        logits.copy_(torch.where(words == targets, exponentials - sums, exponentials))
    return losses, sums


class _Gradients:
    """Gradients of the hidden states and of the output layer's weight, filled chunk by chunk.

    The weight's gradient is a sum over chunks, so it is kept in float32: in bfloat16 the rounding
    errors would accumulate.
    """

    def __init__(self, hidden: Tensor, weight: Tensor):
        self.weight = weight
        self.of_hidden = torch.empty_like(hidden)
        self.of_weight: Tensor | None = None

    def add(self, start: int, hidden: Tensor, of_logits: Tensor, sums: Tensor) -> None:
        """Add the gradients of a chunk.

        Args:
            start: index of its first token.
            hidden: its hidden states [n, d].
            of_logits: gradients of its logits [n, V], multiplied by `sums`.
            sums: [n, 1].
        """
        torch.div(of_logits @ self.weight, sums, out=self.of_hidden[start : start + len(hidden)])
        hidden = (hidden / sums).to(hidden.dtype)
        if self.of_weight is None:
            self.of_weight = (of_logits.T @ hidden).float()
        elif of_logits.dtype == torch.float32:
            self.of_weight.addmm_(of_logits.T, hidden)
        else:
            self.of_weight += of_logits.T @ hidden

    def scaled(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return both gradients times a factor, a scalar on the device."""
        of_weight = (
            torch.zeros_like(self.weight)
            if self.of_weight is None
            else self.of_weight.mul_(factor).to(self.weight.dtype)
        )
        return self.of_hidden.mul_(factor), of_weight


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss by torch's own chunked implementation (torch 2.14 or later)."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options).float()


def liger_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed loss by LinkedIn's Triton kernel (pip install liger-kernel; CUDA only)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum").float()


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Each value makes a loss; `Chunked` keeps memory, so that every model has one of its own. The names
# are those of `constants.LOSS_NAMES`, which the command line offers.
LOSSES: dict[str, Callable[[], Loss]] = {
    "chunked": Chunked,
    "plain": lambda: plain_loss,
    "torch": lambda: torch_loss,
    "liger": lambda: liger_loss,
}


def resolve_loss(name: str, device: torch.device, loss_of_checkpoint: str | None = None) -> str:
    """Return the name of the loss that --loss asks for.

    `auto` is the loss of the run that is resumed. In a new run it is `chunked`, whose memory is
    bounded. It is not chosen by a measurement: two equal runs must compute the same numbers.

    Args:
        name: the value of --loss.
        device: where the loss is computed.
        loss_of_checkpoint: the loss of the run that is resumed.

    Raises:
        UserError: the named loss is not available here.
    """
    if name != "auto":
        if reason := _unavailable_reason(name, device):
            raise UserError(f"--loss {name}: {reason}; or leave --loss out")
        return name
    return loss_of_checkpoint or "chunked"


def _unavailable_reason(name: str, device: torch.device) -> str | None:
    """Return why a loss cannot be used on this machine; None if it can."""
    if name == "torch" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return (
            f"torch {torch.__version__} has no chunked linear_cross_entropy, "
            "install torch 2.14 or later"
        )
    if name == "liger" and device.type != "cuda":
        return "Liger's kernel needs a CUDA device"
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "Liger's kernel is not installed, pip install liger-kernel"
    return None
