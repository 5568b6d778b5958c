"""DistributedDataParallel with the options that an exact resume needs."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.parallel.fsdp import install_gradient_check, is_fsdp
from peft_pretraining.parallel.process_group import DistributedContext


def data_parallel(
    model: nn.Module,
    check_gradients: Callable[[Tensor], None],
    ranks: DistributedContext,
    first_pass: Callable[[nn.Module], Tensor],
) -> nn.Module:
    """Wrap a model for data-parallel training, in which gradients are summed over the ranks.

    Args:
        model: The model on the device of this rank. A sharded model is returned as it is, with
            `check_gradients` installed.
        check_gradients: Called for each part of this rank's own gradients, before they are summed,
            with a scalar that is not finite if one of the gradients is not finite. It is not called
            if there is only one rank.
        ranks: All processes of the run.
        first_pass: Calls the wrapped model on any input, the same on all ranks, and returns a
            scalar for the backward pass. It must not change the model.

    Returns:
        The model to call in training.
    """
    if ranks.world_size == 1:
        return model
    if is_fsdp(model):
        install_gradient_check(model, check_gradients)
        return model
    wrapper = nn.parallel.DistributedDataParallel
    # torch 2.14 renamed the option and warns about the old name.
    names = inspect.signature(wrapper).parameters
    no_buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
    }
    parallel = wrapper(
        model,
        device_ids=[ranks.local_rank] if ranks.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # otherwise the gradients are in memory twice
        **no_buffers,
    )
    checked_sum = _CheckedSum(check_gradients)
    parallel.register_comm_hook(None, checked_sum.of_bucket)
    # After its first pass, DistributedDataParallel packs the gradients into new buckets and may
    # add them in another order from then on. A resumed run must add in the same order as the run
    # that it continues, so every run makes that pass here.
    first_pass(parallel).backward()
    model.zero_grad()
    checked_sum.overlaps = True
    return parallel


def zero_gradients(model: nn.Module, optimizer: Optimizer, micro_batches: int) -> None:
    """Forget the gradients after a step of the optimizer.

    The gradients of DistributedDataParallel are parts of its buckets. With several micro-batches
    they are set to zero in place: the backward pass of the first one exchanges nothing, and would
    otherwise put new gradients beside the buckets, so that all of them are in memory twice.

    Args:
        model: What `data_parallel` returned.
        optimizer: The optimizer of its parameters.
        micro_batches: Backward passes of an update.
    """
    buckets = isinstance(model, nn.parallel.DistributedDataParallel)
    optimizer.zero_grad(set_to_none=not buckets or micro_batches == 1)


class _CheckedSum:
    """A communication hook that checks a bucket of gradients and then sums it over the ranks.

    Args:
        check_gradients: see `data_parallel`.

    Attributes:
        overlaps: False in the first pass, whose buckets are replaced. Nothing waits for their sums,
            and NCCL would keep the memory of the buckets until a later exchange finds it unused.
    """

    def __init__(self, check_gradients: Callable[[Tensor], None]):
        self._check_gradients = check_gradients
        self.overlaps = False

    def of_bucket(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Sum a bucket over the ranks; the signature is that of torch's hooks."""
        gradients = bucket.buffer()
        # One pass by BLAS. The result is not finite as soon as one gradient is not finite.
        self._check_gradients(torch.dot(gradients, gradients))
        work = dist.all_reduce(gradients, async_op=True)
        if not self.overlaps:
            work.wait()
        return work.get_future().then(lambda future: future.value()[0])
