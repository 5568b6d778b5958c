"""Parts of an update that both training loops call: learning rate and weight decays."""

import time
from typing import Protocol

import torch
from torch.optim import Optimizer

from peft_pretraining.records.run_log import RunLog
from peft_pretraining.train.throughput import ThroughputMeter


class WeightDecayScheduler(Protocol):
    """The interface that AlphaDecay and the baselines share.

    Attributes:
        history: one record for each module and analysis, in the order of the analyses.
        analyzes: whether it analyses weights; a baseline does not.
        analyzes_next: whether the next `step` does so and waits for the result.
    """

    history: list[dict]
    analyzes: bool

    @property
    def analyzes_next(self) -> bool: ...

    def step(self, optimizer: Optimizer) -> bool:
        """Count an update and set the decays of the groups. Return True if they were assigned."""

    def state_dict(self) -> dict:
        """Return everything that a resumed run needs."""

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def update_weight_decays(
    decay: WeightDecayScheduler | None,
    optimizer: Optimizer,
    update: int,
    meter: ThroughputMeter,
    log: RunLog,
) -> None:
    """Let the weight-decay scheduler set the decays of the parameter groups, and record them.

    Args:
        decay: the scheduler; None leaves the decays as they are.
        optimizer: its groups are changed.
        update: number of the update.
        meter: the seconds of AlphaDecay are counted as analysis.
        log: receives the statistics of each module after an analysis.
    """
    if decay is None:
        return
    if not decay.analyzes:
        decay.step(optimizer)
        return
    if decay.analyzes_next and torch.cuda.is_initialized():
        # Otherwise the time of the analysis would contain that of all that is still queued.
        torch.cuda.current_stream().synchronize()
    start = time.perf_counter()
    assigned = decay.step(optimizer)
    meter.add_analysis(time.perf_counter() - start, assigned)
    if assigned:
        log.modules([row for row in decay.history if row["step"] == update])
