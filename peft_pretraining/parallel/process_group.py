"""Which device this process has, which other processes there are, and how a script ends when its user erred."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.rendezvous import INIT_TIMEOUT, new_store_namespace


@dataclass(frozen=True)
class DistributedContext:
    """This process among those of the run. Without torchrun: rank 0 of 1, and no process group."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, in place. On the CPU it does not wait for what a GPU still has to do."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, thing: object) -> list | None:
        """What each rank passed, in the order of the ranks: on rank 0 only, None on the others. For small things without tensors."""
        if self.world_size == 1:
            return [thing]
        things = [None] * self.world_size if self.is_main else None
        dist.gather_object(thing, things)
        return things

    def broadcast(self, thing: object) -> object:
        """What rank 0 passed. For small things without tensors."""
        if self.world_size == 1:
            return thing
        things = [thing]
        dist.broadcast_object_list(things)
        return things[0]

    def raise_together(self, problem: str | None) -> None:
        """Raise UserError on every rank where any of them has a problem; all ranks call it."""
        problems = self.broadcast(self.gather(problem))
        for rank, text in enumerate(problems):
            if text:
                raise UserError(f"{text} (rank {rank})" if self.world_size > 1 else text)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 goes through the block before the others enter it: it fills caches that they then find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


def world_size_of_environment() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def process_group(
    single_cuda: bool = False, kind: str | None = None
) -> Iterator[DistributedContext]:
    """Join the other processes of torchrun, if any: gloo for what is on the CPU, nccl for what is on GPUs.

    single_cuda: one process on one GPU; a second process or no GPU is an error. kind: `cpu` or `cuda` (default: where there is one).
    """
    world_size, local_rank = world_size_of_environment(), int(os.environ.get("LOCAL_RANK", 0))
    if single_cuda and (world_size > 1 or not torch.cuda.is_available()):
        why = (
            f"torchrun started {world_size} processes"
            if world_size > 1
            else "there is no CUDA device here"
        )
        raise UserError(
            f"--single_cuda means one process on one GPU, but {why}: leave the flag out"
        )
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but there is no CUDA device here: leave the flag out")
    device = torch.device("cpu")
    if kind != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this node has no GPU: give torchrun --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        cuda = device.type == "cuda"
        store, rank, _ = next(dist.rendezvous("env://", timeout=INIT_TIMEOUT))
        store = new_store_namespace(store, rank, world_size)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=INIT_TIMEOUT,
            device_id=device if cuda else None,
        )
    try:
        yield DistributedContext(int(os.environ.get("RANK", 0)), local_rank, world_size, device)
    finally:
        if (
            world_size > 1 and sys.exc_info()[0] is None
        ):  # after an error the others may never come to a farewell
            dist.destroy_process_group()
