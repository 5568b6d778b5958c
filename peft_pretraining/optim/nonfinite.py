"""Skip updates whose loss or gradient is not finite, without waiting for the device."""

import torch
from loguru import logger
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext


class NonFiniteGuard:
    """Skips updates that are not finite on any rank, and logs which rank they came from.

    The check is done on the device. Fused optimizers read its result there, from `found_inf`, as
    they do for torch's GradScaler, and leave weights, moments and step counts unchanged. The host
    reads the result one update later, when the device has finished the update, so the check causes
    no synchronization.

    Args:
        optimizer: A fused optimizer.
        ranks: All processes of the run.
        max_consecutive_skips: The run ends when this many updates in a row were skipped.

    Attributes:
        skipped: How many updates in a row were skipped, up to the one that was read last.

    Raises:
        ValueError: The optimizer is not fused.
    """

    def __init__(self, optimizer: Optimizer, ranks: DistributedContext, max_consecutive_skips: int):
        if not optimizer.defaults.get("fused"):
            raise ValueError(
                "only fused optimizers can skip an update on the device: give fused=True"
            )
        self.optimizer, self.ranks = optimizer, ranks
        self.max_consecutive_skips = max_consecutive_skips
        self.skipped = 0
        # One flag for each rank: how many values of the current update were not finite.
        self._nonfinite = torch.zeros(ranks.world_size, device=ranks.device)
        self._pending: _AsyncFlags | None = None

    def record_nonfinite(self, value: Tensor) -> None:
        """Record, on the device, if a value of this rank is not finite.

        With several ranks it is called for the rank's own gradients before they are summed, so that
        the log can name the rank.

        Args:
            value: A scalar on the device.
        """
        self._nonfinite[self.ranks.rank] += ~torch.isfinite(value)

    def check_update(self, update: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Decide, on the device, whether `optimizer.step()` applies this update.

        All ranks must call this together, before `optimizer.step()`.

        Args:
            update: The number of the update.
            loss: This rank's share of the loss, a scalar on the device.
            grad_norm: The norm of the gradients summed over all ranks, a scalar on the device.
        """
        self.record_nonfinite(loss)
        if self.ranks.world_size == 1:
            # Gradients are not exchanged, so nothing has recorded them yet.
            self.record_nonfinite(grad_norm)
        by_rank = self.ranks.sum(self._nonfinite)
        # Gradients that are finite on every rank can still overflow in their sum.
        found = (by_rank.sum() > 0) | ~torch.isfinite(grad_norm)
        self.optimizer.found_inf = found.float()
        self._pending = _AsyncFlags(update, torch.cat([found[None], by_rank > 0]))
        self._nonfinite = torch.zeros_like(by_rank)

    def resolve_pending(self) -> bool:
        """Wait for the result of the last checked update, and log it if the update was skipped.

        Returns:
            True if training may go on; False once too many updates in a row were skipped.
        """
        if self._pending is not None:
            update, (found, *by_rank) = self._pending.update, self._pending.wait()
            self._pending = None
            self.skipped = self.skipped + 1 if found else 0
            if found and self.ranks.is_main:
                self._log_skip(update, by_rank)
        return self.skipped < self.max_consecutive_skips

    def _log_skip(self, update: int, by_rank: list[bool]) -> None:
        ranks = [f"rank {rank}" for rank, nonfinite in enumerate(by_rank) if nonfinite]
        logger.warning(
            f"update {update}: the loss or a gradient is not finite on "
            f"{', '.join(ranks) or 'the sum over all ranks'}; no rank applies the update "
            f"({self.skipped} in a row, the run stops at {self.max_consecutive_skips})"
        )

    def failure(self, update: int, clipping_flag: str) -> UserError | None:
        """Return the error that ends the run, if too many updates in a row were skipped.

        Args:
            update: The number of the last update.
            clipping_flag: The flag of the script that clips gradients, for the message.
        """
        if self.resolve_pending():
            return None
        return UserError(
            f"the loss or a gradient was not finite in {self.max_consecutive_skips} updates in a "
            f"row, up to update {update}: lower --lr or set {clipping_flag} 1.0"
        )


class _AsyncFlags:
    """Flags of an update, which are copied to the host asynchronously."""

    def __init__(self, update: int, flags: Tensor):
        self.update, self._flags = update, flags
        self._event: torch.cuda.Event | None = None
        if flags.is_cuda:
            # `flags.tolist()` would wait for everything that is queued on the device by then.
            self._flags = torch.empty_like(flags, device="cpu", pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[bool]:
        """Wait until the flags are on the host, and return them."""
        if self._event is not None:
            self._event.synchronize()
        return self._flags.tolist()
