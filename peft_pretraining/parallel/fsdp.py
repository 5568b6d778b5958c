"""Fully sharded training (torch's FSDP2): each rank holds a part of every parameter, gradient and moment, as DTensors.

A block's parameters are whole on a device only while it computes; embedding, last norm and head stay whole from the forward to the
backward pass. Checkpoints hold whole tensors, so they do not tell how a run was parallel.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_pretraining.parallel.process_group import DistributedContext


def shard_model(
    model: nn.Module, ranks: DistributedContext, dtype: str, shard_size: int | None = None
) -> nn.Module:
    """Cut a LLaMA's parameters by rows over the ranks, in place, before an optimizer or anything else holds them.

    Args:
        model: on the CPU, alike on all ranks: each block is moved to the device only to be cut, so never the whole model.
        dtype: `bf16_mixed`: parameters are sent and used in bfloat16, kept and their gradients summed in float32; any other: as they are.
        shard_size: ranks, next to each other, that share one copy of the model; a divisor of their number. None: all.

    Gradients are summed over all ranks: the loss is a share of the mean over the global batch already.
    """
    size = shard_size or ranks.world_size
    shape, names = (
        ((size,), ("shard",))
        if size == ranks.world_size
        else ((ranks.world_size // size, size), ("replicate", "shard"))
    )
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    mixed = (
        {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        if dtype == "bf16_mixed"
        else {}
    )
    # What is in no block goes with the root: the loss reads the head's weight inside the model's own forward pass.
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(**mixed))
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo can sum, but not scale while it sums
    return model


def install_gradient_check(model: FSDPModule, look: Callable[[Tensor], None]) -> None:
    """Have `look` see a number for each part of this rank's own gradients before they are mixed with the others', not finite where one
    of them is not."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_reduce_scatter(_WatchedReduceScatter(look))


class _WatchedReduceScatter:
    """torch's own exchange of gradients, which are seen before."""

    def __init__(self, look: Callable[[Tensor], None]):
        self._look = look
        # torch 2.14 has another name for it, and warns of the old one.
        self._reduce_scatter = (
            getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        )

    def allocate(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op: bool = False
    ):
        self._look(torch.dot(input_tensor, input_tensor))
        return self._reduce_scatter(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )


def exchange_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Whether the backward pass of a loss that is computed inside exchanges gradients between the ranks, or keeps each rank's own.

    Sharded parameters stay whole after a backward pass without exchange, as the gradients do: the next micro-batch needs them.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        return model.no_sync()
    return contextlib.nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor whole on every rank, which all call it together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_shard_like(whole: Tensor, like: Tensor | None) -> Tensor:
    """This rank's part of a tensor that every rank has whole, cut as `like` is; all of it where that is not sharded."""
    if not isinstance(like, DTensor):
        return whole
    # A copy: what distribute_tensor gives is a view, which would keep all of `whole` in memory.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).clone()
