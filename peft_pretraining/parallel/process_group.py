"""The processes of a run: rank and device of this one, and communication between them."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.launch import Launch, read_launch
from peft_pretraining.parallel.rendezvous import INIT_TIMEOUT, new_store_namespace

SECONDS_FOR_OTHER_FAILURES = 10.0


@dataclass(frozen=True)
class DistributedContext:
    """Rank, local rank, number of ranks and device of this process.

    Without torchrun, a run has one process: rank 0 of 1, without a process group.

    Args:
        rank, local_rank, world_size: as torchrun numbers them.
        device: of this process.
        launcher: see `Launch`.
        store: the key-value store that all ranks share; None without a process group.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    launcher: int | None = None
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, and return it.

        For a tensor on the CPU, this does not wait for work that is queued on a GPU.
        """
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather_objects(self, obj: Any) -> list[Any] | None:
        """Collect one object from each rank on rank 0; for small objects without tensors.

        Returns:
            The objects in the order of the ranks, on rank 0; None on the other ranks.
        """
        if self.world_size == 1:
            return [obj]
        objects = [None] * self.world_size if self.is_main else None
        dist.gather_object(obj, objects)
        return objects

    def broadcast_object(self, obj: Any) -> Any:
        """Return the object of rank 0 on all ranks; for small objects without tensors."""
        if self.world_size == 1:
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects)
        return objects[0]

    def raise_together(self, problem: str | None) -> None:
        """Raise UserError on every rank if any rank has a problem. All ranks must call this.

        Args:
            problem: The message of this rank, or None.

        Raises:
            UserError: With the message of the lowest rank that has a problem.
        """
        problems = self.broadcast_object(self.gather_objects(problem))
        for rank, text in enumerate(problems):
            if text:
                raise UserError(f"{text} (rank {rank})" if self.world_size > 1 else text)

    def set_timeout(self, minutes: float) -> None:
        """From now on, fail if another rank does not answer for so long. All ranks call this."""
        if self.world_size > 1:
            # torch 2.14 made the function public under a new name.
            name = "set_timeout" if hasattr(dist, "set_timeout") else "_set_pg_timeout"
            module = dist if hasattr(dist, "set_timeout") else dist.distributed_c10d
            getattr(module, name)(timedelta(minutes=minutes))

    def all_failed(self, seconds: float = SECONDS_FOR_OTHER_FAILURES) -> bool:
        """Return whether every rank has called this, within some seconds.

        A rank that has failed calls it. If all have, they can still do something together, such as
        save their state; otherwise the other ranks are in the middle of something else.
        """
        if self.store is None:
            return True
        deadline = time.monotonic() + seconds
        try:
            self.store.add("failed ranks", 1)
            while int(self.store.add("failed ranks", 0)) < self.world_size:
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
        except (RuntimeError, OSError):  # the rank that holds the store has ended
            return False
        return True

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks, so that they find the cache it fills."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


@contextlib.contextmanager
def process_group(
    single_cuda: bool = False,
    device_type: str | None = None,
    launch: Launch | None = None,
) -> Iterator[DistributedContext]:
    """Join the other processes that torchrun started, if any.

    Tensors on the CPU are exchanged by gloo, those on GPUs by nccl.

    Args:
        single_cuda: Require exactly one process and a GPU.
        device_type: `cpu` or `cuda`. By default `cuda` if there is a GPU.
        launch: The place of this process. By default as the environment variables say.

    Raises:
        UserError: The required device does not exist, or the variables do not fit each other.
    """
    launch = launch or read_launch()
    local_rank, world_size = launch.local_rank, launch.world_size
    device = _choose_device(single_cuda, device_type, local_rank, world_size)
    store = _init_process_group(device, world_size) if world_size > 1 else None
    try:
        yield DistributedContext(
            launch.rank, local_rank, world_size, device, launch.launcher, store
        )
    finally:
        # After an error, other ranks may never reach destroy_process_group.
        if world_size > 1 and sys.exc_info()[0] in (None, SystemExit):
            dist.destroy_process_group()


def _choose_device(
    single_cuda: bool, device_type: str | None, local_rank: int, world_size: int
) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if single_cuda and (world_size > 1 or not has_cuda):
        reason = (
            f"torchrun started {world_size} processes"
            if world_size > 1
            else "there is no CUDA device here"
        )
        raise UserError(
            f"--single_cuda means one process on one GPU, but {reason}: leave the flag out"
        )
    if device_type == "cuda" and not has_cuda:
        raise UserError("--device cuda, but there is no CUDA device here: leave the flag out")
    if device_type == "cpu" or not has_cuda:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this node has no GPU: "
            f"give torchrun --nproc_per_node={torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _init_process_group(device: torch.device, world_size: int) -> dist.Store:
    cuda = device.type == "cuda"
    common, rank, _ = next(dist.rendezvous("env://", timeout=INIT_TIMEOUT))
    store = new_store_namespace(common, rank, world_size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=INIT_TIMEOUT,
        device_id=device if cuda else None,
    )
    return store
