"""The processes of a run: rank and device of this one, and communication between them."""

import contextlib
import faulthandler
import io
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from loguru import logger

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.launch import Launch, read_launch
from peft_pretraining.parallel.rendezvous import HungRank, new_store_namespace
from peft_pretraining.utils.child import terminate_with

SECONDS_FOR_OTHER_FAILURES = 10.0
# How often rank 0 shows that it is alive while the other ranks wait for it. A rank waits for many
# times this long before it gives up.
HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True)
class DistributedContext:
    """Rank, local rank, number of ranks and device of this process.

    Without torchrun, a run has one process: rank 0 of 1, without a process group.

    Args:
        rank, local_rank, world_size: as torchrun numbers them.
        device: of this process.
        launcher: see `Launch`.
        store: the key-value store that all ranks share; None without a process group.
        timeout: how long to wait for another rank.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    launcher: int | None = None
    store: dist.Store | None = None
    timeout: timedelta = timedelta(minutes=10)
    _turns: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

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
        """Run the block on rank 0 before the other ranks, so that they find the cache it fills.

        The block may take hours, such as the tokenization of a corpus. So the other ranks do not
        wait in a collective: they wait as long as rank 0 shows that it is alive.

        Raises:
            HungRank: rank 0 did not show it within the time-out.
        """
        if self.store is None:
            yield
            return
        turn = f"block {next(self._turns)} of rank 0"
        if not self.is_main:
            self._wait_for_rank_0(self.store, turn)
            yield
            return
        ended = threading.Event()
        heart = threading.Thread(target=self._beat, args=(self.store, turn, ended), daemon=True)
        heart.start()
        try:
            yield
        finally:
            ended.set()
            heart.join()
        self.store.set(f"{turn} ended", "")

    def _beat(self, store: dist.Store, turn: str, ended: threading.Event) -> None:
        """Show every second that this process is alive, until the event."""
        with contextlib.suppress(RuntimeError, OSError):  # the process that holds the store ended
            while not ended.wait(HEARTBEAT_SECONDS):
                store.add(f"{turn} heartbeat", 1)

    def _wait_for_rank_0(self, store: dist.Store, turn: str) -> None:
        """Wait until rank 0 has ended a block. Raises HungRank if its heartbeat stops."""
        beats, changed_at = 0, time.monotonic()
        while not store.check([f"{turn} ended"]):
            now = store.add(f"{turn} heartbeat", 0)
            if now != beats:
                beats, changed_at = now, time.monotonic()
            elif time.monotonic() - changed_at > self.timeout.total_seconds():
                raise HungRank(f"rank 0 did not show that it is alive within {self.timeout}")
            time.sleep(0.05)


@contextlib.contextmanager
def process_group(
    single_cuda: bool = False,
    device_type: str | None = None,
    launch: Launch | None = None,
    timeout_minutes: float = 10.0,
) -> Iterator[DistributedContext]:
    """Join the other processes that torchrun started, if any.

    Tensors on the CPU are exchanged by gloo, those on GPUs by nccl.

    Args:
        single_cuda: Require exactly one process and a GPU.
        device_type: `cpu` or `cuda`. By default `cuda` if there is a GPU.
        launch: The place of this process. By default as the environment variables say.
        timeout_minutes: How long to wait for another process.

    Raises:
        UserError: The required device does not exist, the variables do not fit each other, or
            another process did not answer in time. The stacks of all threads are then printed.
    """
    launch = launch or read_launch()
    if launch.launcher is not None:
        terminate_with(launch.launcher)
    local_rank, world_size = launch.local_rank, launch.world_size
    device = _choose_device(single_cuda, device_type, local_rank, world_size)
    timeout = timedelta(minutes=timeout_minutes)
    try:
        store = _init_process_group(device, world_size, timeout) if world_size > 1 else None
        yield DistributedContext(
            launch.rank, local_rank, world_size, device, launch.launcher, store, timeout
        )
    except Exception as error:
        if world_size == 1 or not is_timeout(error):
            raise
        raise _hung_process(error, timeout_minutes) from error
    finally:
        # After an error, other ranks may never reach destroy_process_group.
        if dist.is_initialized() and world_size > 1 and sys.exc_info()[0] in (None, SystemExit):
            dist.destroy_process_group()


def is_timeout(error: Exception) -> bool:
    """Return whether an error means that another rank did not answer in time."""
    text = str(error).lower()
    waited = "timed out" in text or "timeout" in text
    return isinstance(error, HungRank) or (isinstance(error, RuntimeError) and waited)


def _hung_process(error: Exception, minutes: float) -> UserError:
    """Log what this process waited for, and return the error for its user."""
    logger.opt(exception=error).error("another process does not answer")
    sys.stderr.flush()
    with contextlib.suppress(io.UnsupportedOperation, AttributeError):  # stderr is no file
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    return UserError(
        f"another process did not answer within --timeout_minutes {minutes:g}; the stacks of all "
        "threads of this one are above; look for a process that hangs, for instance in a file "
        "system, and start the same command again, which goes on from the last checkpoint"
    )


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


def _init_process_group(device: torch.device, world_size: int, timeout: timedelta) -> dist.Store:
    cuda = device.type == "cuda"
    common, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    store = new_store_namespace(common, rank, world_size, timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    return store
