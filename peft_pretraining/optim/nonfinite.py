"""Updates whose loss or gradient is not finite on any rank are applied on none, without waiting for the device."""

import torch
import torch.distributed as dist
import torch.nn as nn
from loguru import logger
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext


class NonFiniteGuard:
    """Keeps updates that are not finite from the weights, and tells which rank they came from.

    The verdict stays on the device: fused optimizers read it there (`found_inf`, as GradScaler has it) and leave weights, moments and step
    counts alone. It is read one update later, when the device has long passed it.

    Args:
        optimizer: a fused one.
        most: updates that may be left out in a row.
    """

    def __init__(self, optimizer: Optimizer, ranks: DistributedContext, most: int):
        if not optimizer.defaults.get("fused"):
            raise ValueError(
                "only fused optimizers can leave an update out on the device: give fused=True"
            )
        self.optimizer, self.ranks, self.most = optimizer, ranks, most
        self.skipped = 0  # in a row
        self._bad = torch.zeros(
            ranks.world_size, device=ranks.device
        )  # of the update under way, one for each rank
        self._pending: _AsyncFlags | None = None

    def sum_over_ranks(self, parallel: nn.parallel.DistributedDataParallel) -> None:
        """Make a DistributedDataParallel sum (not average) gradients over the ranks, and look at each rank's own before they are mixed."""
        parallel.register_comm_hook(None, self._sum_bucket)

    def _sum_bucket(self, _: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer()
        self.look(
            torch.dot(gradients, gradients)
        )  # one pass, by BLAS; not finite as soon as one of them is
        return (
            dist.all_reduce(gradients, async_op=True)
            .get_future()
            .then(lambda future: future.value()[0])
        )

    def look(self, number: Tensor) -> None:
        """Note, on the device, whether a number of this rank is not finite; before `judge`."""
        self._bad[self.ranks.rank] += ~torch.isfinite(number)

    def check_update(self, update: int, loss: Tensor, norm: Tensor) -> None:
        """Before `optimizer.step()`: loss is this rank's share, norm the gradients' over all ranks; both scalars on the device."""
        self.look(loss)
        if self.ranks.world_size == 1:
            self.look(norm)  # no bucket was looked at
        bad = self.ranks.sum(self._bad)
        found = (bad.sum() > 0) | ~torch.isfinite(norm)
        self.optimizer.found_inf = found.float()
        self._pending = _AsyncFlags(update, torch.cat([found[None], bad > 0]))
        self._bad = torch.zeros_like(bad)

    def read(self) -> bool:
        """Whether training may go on: waits until the device has passed the update judged last, and logs it if it was left out."""
        if self._pending is None:
            return self.skipped < self.most
        update, (found, *bad) = self._pending.update, self._pending.wait()
        self._pending = None
        self.skipped = self.skipped + 1 if found else 0
        if found and self.ranks.is_main:
            where = (
                ", ".join(f"rank {rank}" for rank, is_bad in enumerate(bad) if is_bad)
                or "the sum over all ranks"
            )
            logger.warning(
                f"update {update}: the loss or a gradient is not finite on {where}; no rank applies the update "
                f"({self.skipped} in a row, the run stops at {self.most})"
            )
        return self.skipped < self.most

    def failure(self, update: int, clipping: str) -> UserError | None:
        """What ends the training where too many updates in a row, up to this one, were left out. clipping: the flag that may help."""
        if self.read():
            return None
        rows = f"{self.most} updates in a row, up to update {update}"
        return UserError(
            f"the loss or a gradient was not finite in {rows}: lower --lr or set {clipping} 1.0"
        )


class _AsyncFlags:
    """Flags of an update on their way from the device."""

    def __init__(self, update: int, flags: Tensor):
        self.update, self._flags, self._event = update, flags, None
        if flags.is_cuda:
            # `flags.tolist()` would also wait for everything that was queued after it.
            self._flags = torch.empty_like(flags, device="cpu", pin_memory=True).copy_(
                flags, non_blocking=True
            )
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[bool]:
        if self._event is not None:
            self._event.synchronize()
        return self._flags.tolist()
