"""Fully sharded training with torch's FSDP2.

Each rank holds a shard of every parameter, gradient and optimizer moment, as DTensors. The
parameters of a block are gathered only while the block computes; embedding, last norm and head stay
gathered from the forward to the backward pass. Checkpoints hold whole tensors, so they do not
depend on how a run was parallel.

torch.distributed.fsdp and torch.distributed.tensor take about a second to import. They are imported
only where a model is sharded, so that other runs do not pay for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from peft_pretraining.parallel.process_group import DistributedContext

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_fsdp(model: nn.Module) -> TypeGuard[FSDPModule]:
    """Return True if a model is sharded. Never imports torch.distributed.fsdp."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # loaded if any model is sharded
    return fsdp is not None and isinstance(model, fsdp.FSDPModule)


def shard_model(
    model: nn.Module, ranks: DistributedContext, dtype: str, shard_size: int | None = None
) -> nn.Module:
    """Shard the parameters of a LLaMA over the ranks by rows, in place.

    Call it before an optimizer or anything else holds the parameters. Gradients are summed over all
    ranks, not averaged: each rank's loss is its share of the mean over the global batch.

    Args:
        model: The model on the CPU, the same on all ranks. Each block is moved to the device only
            to be sharded, so the whole model is never on it.
        ranks: All processes of the run.
        dtype: With `bf16_mixed`, parameters are gathered and used in bfloat16, but kept in float32,
            in which their gradients are summed. Otherwise every dtype stays as it is.
        shard_size: How many neighbouring ranks share one copy of the model; a divisor of the number
            of ranks. None: all ranks.

    Returns:
        The same model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    size = shard_size or ranks.world_size
    shape: tuple[int, ...] = (size,)
    names: tuple[str, ...] = ("shard",)
    if size != ranks.world_size:
        shape, names = (ranks.world_size // size, size), ("replicate", "shard")
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if dtype == "bf16_mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # Parameters outside the blocks belong to the root module, because the loss reads the weight of
    # the head inside the forward pass of the root.
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        # gloo can sum, but it cannot scale while it sums.
        module.set_force_sum_reduction_for_comms(True)
    return model


def install_gradient_check(model: FSDPModule, check: Callable[[Tensor], None]) -> None:
    """Pass a number for each part of this rank's own gradients to `check`, before they are summed.

    Args:
        model: A sharded model.
        check: Gets a scalar, which is not finite if one of the gradients is not finite.
    """
    for module in model.modules():
        if is_fsdp(module):
            module.set_custom_reduce_scatter(_CheckedReduceScatter(check))


class _CheckedReduceScatter:
    """torch's own reduce-scatter of gradients, after they were passed to `check`."""

    def __init__(self, check: Callable[[Tensor], None]):
        self._check = check
        # torch 2.14 renamed the function and warns about the old name.
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
        self._check(torch.dot(input_tensor, input_tensor))
        return self._reduce_scatter(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )


def exchange_gradients(model: nn.Module, now: bool) -> contextlib.AbstractContextManager:
    """Choose whether the next backward pass exchanges gradients between the ranks.

    With gradient accumulation, only the last micro-batch of an update exchanges them. Without
    exchange, a sharded model keeps whole gradients and parameters after the backward pass, which
    the next micro-batch needs.

    Args:
        model: The model, sharded, wrapped in DistributedDataParallel, or plain.
        now: True to exchange gradients, False to keep each rank's own.

    Returns:
        A context manager in which the forward pass and the loss must be computed.
    """
    if is_fsdp(model):
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not now:
        return model.no_sync()
    return contextlib.nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, on every rank; any other tensor unchanged.

    All ranks must call this together.
    """
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def local_shard_like(whole: Tensor, like: Tensor | None) -> Tensor:
    """Shard a tensor that every rank has whole in the way another one is sharded.

    Args:
        whole: The tensor, the same on all ranks.
        like: The tensor whose sharding is copied.

    Returns:
        A DTensor with this rank's shard of `whole`; `whole` itself if `like` is not sharded.
    """
    if like is None or not _is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # distribute_tensor returns a view. Copy it, because it would keep all of `whole` in memory.
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).clone()


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
