"""BatchNorm statistics in distributed training and in updates that are skipped."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from peft_pretraining.parallel.process_group import DistributedContext


class BatchNormSync:
    """Keeps BatchNorm's running statistics equal on all ranks and free of skipped updates.

    Forward passes write these buffers, and each rank has seen other images. As in
    DistributedDataParallel, every rank takes the values of rank 0. An update that is skipped
    restores the values from before it: a NaN would otherwise stay in them for the rest of the run.

    Args:
        model: the model whose floating-point buffers are synchronized.
        ranks: the ranks of the run.
    """

    def __init__(self, model: nn.Module, ranks: DistributedContext):
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._ranks = ranks
        self._committed = self._flatten_buffers()

    def commit_or_roll_back(self, skipped: Tensor) -> None:
        """Keep the statistics of this update's forward passes, or restore those from before it.

        Does not synchronize the host with the device.

        Args:
            skipped: scalar on the device: 1 if the update was skipped, else 0.
        """
        if not self._buffers:
            return
        current = self._flatten_buffers()
        if self._ranks.world_size > 1:
            dist.broadcast(current, 0)
        self._committed = torch.where(skipped.bool(), self._committed, current)
        self.roll_back()

    def roll_back(self) -> None:
        """Restore the statistics from before the forward passes that were not committed."""
        if not self._buffers:
            return
        parts = self._committed.split([buffer.numel() for buffer in self._buffers])
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def _flatten_buffers(self) -> Tensor:
        """Return all buffers as one vector, so that one broadcast sends them."""
        if not self._buffers:
            return torch.empty(0)
        return torch.cat([buffer.reshape(-1) for buffer in self._buffers])
