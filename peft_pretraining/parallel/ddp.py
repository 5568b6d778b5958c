"""DistributedDataParallel with the options that exact resume needs."""

import inspect
from collections.abc import Callable

import torch.nn as nn
from torch import Tensor

from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.parallel.fsdp import FSDPModule, install_gradient_check
from peft_pretraining.parallel.process_group import DistributedContext


def data_parallel(
    model: nn.Module,
    guard: NonFiniteGuard,
    ranks: DistributedContext,
    first_pass: Callable[[nn.Module], Tensor],
) -> nn.Module:
    """The model with gradients summed over the ranks, each rank's own seen by the guard before.

    first_pass: calls the model on any input, alike on all ranks, and returns a scalar to go backward from. It must not change the model.
    """
    if ranks.world_size == 1:
        return model
    if isinstance(model, FSDPModule):
        install_gradient_check(model, guard.look)
        return model
    wrapper = nn.parallel.DistributedDataParallel
    # torch 2.14 has another name for it, and warns of the old one.
    names = inspect.signature(wrapper).parameters
    no_buffers = {
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
    }
    parallel = wrapper(
        model, device_ids=[ranks.local_rank] if ranks.device.type == "cuda" else None, **no_buffers
    )
    guard.sum_over_ranks(parallel)
    # After its first pass DistributedDataParallel packs the gradients anew, and may then add them in another order. A resumed
    # run must add in the order of the run that it continues, so every run makes that pass here.
    first_pass(parallel).backward()
    model.zero_grad()
    return parallel
