"""One optimizer step: clip, check, learning rate, weight decays, step."""

import time
from dataclasses import dataclass
from typing import Protocol

import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.optim.gradients import clip_gradients
from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import scaled_decays
from peft_pretraining.records.run_log import RunLog
from peft_pretraining.train.throughput import ThroughputMeter


class WeightDecayScheduler(Protocol):
    """AlphaDecay, or a baseline with its face."""

    history: list[dict]

    def step(self, optimizer: Optimizer) -> bool:
        """Whether the groups have new decays."""


@dataclass(frozen=True)
class Updates:
    """What follows an update's gradients, alike in both scripts.

    Args:
        decay: sets the groups' decays; None: they stay as they are.
        greatest_norm: of all gradients together; 0: any.
    """

    model: nn.Module
    optimizer: Optimizer
    decay: WeightDecayScheduler | None
    greatest_norm: float
    guard: NonFiniteGuard
    checkpoints: Checkpoints
    clock: ThroughputMeter
    log: RunLog

    def make(self, update: int, loss: Tensor, lr: float, eta: float = 1.0) -> Tensor:
        """Clip, judge, set learning rate and decays, step. Returns the gradients' norm before it was clipped, a scalar on the device.

        loss: this rank's share, a scalar on the device. eta: multiplies all decays in this update, so that their ratios stay.
        """
        norm = clip_gradients(self.model, self.greatest_norm)
        self.guard.check_update(
            update, loss, norm
        )  # what is not finite on one rank is applied on none
        self.checkpoints.before_update()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Every `unbalancedWD_every` updates the weights are analysed and each group gets a new decay.
        before = time.perf_counter()
        rebalanced = self.decay is not None and self.decay.step(self.optimizer)
        self.clock.analysis_took(time.perf_counter() - before, rebalanced)
        if rebalanced:
            self.log.modules([row for row in self.decay.history if row["step"] == update])
        with scaled_decays(self.optimizer, eta):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.log.advance()
        return norm
