"""Ranks and devices: one process without a group, and two processes started as torchrun does."""

import multiprocessing
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore

from peft_pretraining.errors import UserError
from peft_pretraining.parallel import process_group as module
from peft_pretraining.parallel.launch import Launch
from peft_pretraining.parallel.process_group import DistributedContext, process_group
from peft_pretraining.parallel.rendezvous import HungRank
from tests.support.launch import set_launch

CPU = torch.device("cpu")


def test_one_process_needs_no_group():
    ranks = DistributedContext(0, 0, 1, CPU)
    values = torch.tensor([1.0, 2.0])
    ranks.barrier()
    assert ranks.is_main and ranks.sum(values) is values and values.tolist() == [1.0, 2.0]
    assert ranks.gather_objects("a") == ["a"] and ranks.broadcast_object("a") == "a"
    with ranks.rank_zero_first():
        pass
    ranks.raise_together(None)
    with pytest.raises(UserError, match="^a problem$"):
        ranks.raise_together("a problem")


def test_without_torchrun_there_is_one_rank(monkeypatch):
    set_launch(monkeypatch, 1)
    with process_group(device_type="cpu") as ranks:
        assert ranks == DistributedContext(0, 0, 1, CPU)
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("cuda_devices", [0, 1])
@pytest.mark.parametrize(
    "world_size, options, without_gpu, with_gpu",
    [
        (1, {}, "cpu", "cuda:1"),
        (1, {"device_type": "cpu"}, "cpu", "cpu"),
        (1, {"device_type": "cuda"}, "--device cuda, but there is no CUDA device", "cuda:1"),
        (1, {"single_cuda": True}, "there is no CUDA device here: leave the flag out", "cuda:1"),
        (2, {"single_cuda": True}, "started 2 processes", "started 2 processes"),
    ],
)
def test_the_device(monkeypatch, cuda_devices, world_size, options, without_gpu, with_gpu):
    """Of local rank 1, on machines without a GPU and with one GPU too few or enough."""
    expected = with_gpu if cuda_devices else without_gpu
    launch = Launch(rank=0, local_rank=1, world_size=world_size)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda_devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * cuda_devices)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    if expected in ("cpu", "cuda:1"):
        with process_group(**options, launch=launch) as ranks:
            assert str(ranks.device) == expected
        assert chosen == ([expected] if expected != "cpu" else [])
    else:
        with pytest.raises(UserError, match=expected), process_group(**options, launch=launch):
            pass


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 2 of this node .* --nproc_per_node=2"):
        with process_group(launch=Launch(2, 2, 4)):
            pass


def in_group(store, rank, seconds=0.4):
    return DistributedContext(rank, rank, 2, CPU, store=store, timeout=timedelta(seconds=seconds))


def test_rank_0_may_work_for_longer_than_the_timeout(monkeypatch):
    """It shows that it is alive; a rank that hangs does not."""
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    store, order = HashStore(), []

    def wait():
        with in_group(store, 1).rank_zero_first():
            order.append("rank 1")

    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(wait)
        with in_group(store, 0).rank_zero_first():
            time.sleep(1.0)
            order.append("rank 0")
        waiting.result(timeout=10)
    assert order == ["rank 0", "rank 1"]
    with pytest.raises(HungRank, match="rank 0 did not show that it is alive"):
        with in_group(HashStore(), 1).rank_zero_first():
            pass


def test_every_block_of_rank_0_is_waited_for():
    store = HashStore()
    first, second = in_group(store, 0), in_group(store, 1)
    with first.rank_zero_first():
        pass
    with second.rank_zero_first():
        pass
    with pytest.raises(HungRank), second.rank_zero_first():
        pass


def test_a_process_that_does_not_arrive_is_one_sentence(monkeypatch, capfd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="did not answer within --timeout_minutes 0.01; the stacks"):
        with process_group(device_type="cpu", launch=Launch(0, 0, 2), timeout_minutes=0.01):
            pass
    assert "most recent call first" in capfd.readouterr().err


def run_rank(rank, port, results):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    order = []
    with process_group(device_type="cpu") as ranks:
        summed = ranks.sum(torch.tensor([1.0 + rank])).item()
        gathered = ranks.gather_objects({"rank": rank})
        broadcast = ranks.broadcast_object(f"from {rank}")
        try:
            ranks.raise_together("no data" if rank == 1 else None)
        except UserError as error:
            order.append(str(error))
        with ranks.rank_zero_first():
            time.sleep(0.5 * (1 - rank))  # rank 1 would be first if it did not wait
            entered = time.monotonic_ns()  # the clock of the machine, equal in both processes
        ranks.raise_together(None)
    results.put((rank, (summed, gathered, broadcast, order), entered))


@pytest.mark.slow
def test_two_ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=run_rank, args=(r, port, results)) for r in (0, 1)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    by_rank = {rank: values for rank, values, _ in found}
    entered = {rank: at for rank, _, at in found}
    assert entered[0] < entered[1]
    problem = ["no data (rank 1)"]
    assert by_rank[0] == (3.0, [{"rank": 0}, {"rank": 1}], "from 0", problem)
    assert by_rank[1] == (3.0, None, "from 0", problem)
