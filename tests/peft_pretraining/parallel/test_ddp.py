"""DistributedDataParallel: gradients are summed over ranks, and checked before."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from peft_pretraining.parallel.ddp import data_parallel, zero_gradients
from peft_pretraining.parallel.fsdp import exchange_gradients
from peft_pretraining.parallel.process_group import DistributedContext

CPU = torch.device("cpu")


@pytest.fixture
def group_of_one():
    """A process group with one process, in which a model can be wrapped."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def first_pass(model):
    return model(torch.zeros(1, 3)).sum()


def test_one_rank_needs_no_wrapper():
    model = nn.Linear(3, 2)
    ranks = DistributedContext(0, 0, 1, CPU)
    assert data_parallel(model, pytest.fail, ranks, first_pass) is model


def test_gradients_are_checked_and_not_averaged(group_of_one):
    """The number that is passed to the check is finite only if all gradients are finite."""
    torch.manual_seed(0)
    model, checked = nn.Linear(3, 2), []
    ranks = DistributedContext(0, 0, 2, CPU)  # two ranks would halve an average
    parallel = data_parallel(model, lambda value: checked.append(value.item()), ranks, first_pass)
    assert isinstance(parallel, nn.parallel.DistributedDataParallel)
    assert len(checked) == 1 and all(p.grad is None for p in model.parameters())
    inputs = torch.tensor([[1.0, 2.0, 3.0]])
    parallel(inputs).sum().backward()
    assert model.weight.grad.tolist() == [[1.0, 2.0, 3.0]] * 2
    assert model.bias.grad.tolist() == [1.0, 1.0]
    assert checked[1] == pytest.approx(2 * (1 + 4 + 9) + 2)
    inputs[0, 1] = math.nan
    parallel(inputs).sum().backward()
    assert math.isnan(checked[2])


def test_gradients_stay_in_their_buckets(group_of_one):
    """Also where a micro-batch exchanges nothing: new ones beside the buckets double the memory."""
    model = nn.Linear(3, 2)
    ranks = DistributedContext(0, 0, 2, CPU)
    parallel = data_parallel(model, lambda value: None, ranks, first_pass)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs = torch.tensor([[1.0, 2.0, 3.0]])
    parallel(inputs).sum().backward()
    zero_gradients(parallel, optimizer, 2)
    places = [p.grad.data_ptr() for p in model.parameters()]
    for _ in range(2):
        for exchanges in (False, True):
            with exchange_gradients(parallel, exchanges):
                parallel(inputs).sum().backward()
            assert [p.grad.data_ptr() for p in model.parameters()] == places
        assert model.weight.grad.tolist() == [[2.0, 4.0, 6.0]] * 2
        zero_gradients(parallel, optimizer, 2)
        assert not model.weight.grad.any()
    zero_gradients(parallel, optimizer, 1)
    assert model.weight.grad is None
