"""BatchNorm statistics in distributed training."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from peft_pretraining.parallel.process_group import DistributedContext


class BatchNormSync:
    """Keeps BatchNorm's running statistics, which forward passes write, in step with the weights.

    Every rank has seen other images: those of rank 0 count, as in DistributedDataParallel. An update that is left out leaves them as
    they were: what is not finite would stay in them for ever.
    """

    def __init__(self, model: nn.Module, ranks: DistributedContext):
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._ranks = ranks
        self._before = self._together()

    def settle(self, left_out: Tensor) -> None:
        """After an update's passes. left_out: 1 where the update does not count, else 0; a scalar on the device."""
        if not self._buffers:
            return
        now = self._together()
        if self._ranks.world_size > 1:
            dist.broadcast(now, 0)
        self._before = torch.where(left_out.bool(), self._before, now)
        parts = self._before.split([buffer.numel() for buffer in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def _together(self) -> Tensor:
        return (
            torch.cat([buffer.reshape(-1) for buffer in self._buffers])
            if self._buffers
            else torch.empty(0)
        )
