"""The guard against updates that are not finite, against a plain loop that leaves them out. On two ranks: end_to_end/test_faults.py."""

import math

import pytest
import torch
from loguru import logger

from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.process_group import DistributedContext

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def messages():
    found = []
    handler = logger.add(lambda message: found.append(message.record["message"]), level="WARNING")
    yield found
    logger.remove(handler)


def updates(optimizer_name, bad, guarded):
    """Weights and step count after eight updates, some of them with a gradient or a loss that is not finite."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, 30))
    optimizer = build_optimizer(optimizer_name, [{"params": [weight], "weight_decay": 0.1}], lr=0.1)
    guard = NonFiniteGuard(optimizer, ALONE, most=3)
    for update in range(1, 9):
        weight.grad = torch.randn(40, 30)
        loss = torch.tensor(1.0)
        if update in bad:
            if bad[update] == "loss":
                loss = torch.tensor(math.nan)
            else:
                weight.grad[3, 4] = bad[update]
        if guarded:
            guard.check_update(update, loss, weight.grad.norm())
            optimizer.step()
            assert guard.read()
        elif update not in bad:
            optimizer.step()
    return weight.detach(), float(optimizer.state[weight]["step"]), guard.skipped


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize(
    "bad",
    [
        {},
        {1: math.nan},
        {3: math.inf, 4: "loss"},
        {2: -math.inf, 5: math.nan, 7: "loss", 8: "loss"},
    ],
)
def test_updates_that_are_not_finite_are_left_out(optimizer, bad):
    guarded, steps, skipped = updates(optimizer, bad, guarded=True)
    plain, wanted, _ = updates(optimizer, bad, guarded=False)
    assert torch.equal(guarded, plain) and steps == wanted == 8 - len(bad)
    assert skipped == (2 if 8 in bad else 0)


def test_it_says_which_update_and_stops_after_so_many_in_a_row(messages):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer("adam", [{"params": [weight]}], lr=0.1)
    guard = NonFiniteGuard(optimizer, ALONE, most=2)
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    answers = []
    for update, norm in enumerate([good, bad, good, bad, bad], 1):
        guard.check_update(update, good, norm)
        answers.append(guard.read())
    assert answers == [True, True, True, True, False] and not guard.read()
    assert [m.split(":")[0] for m in messages] == ["update 2", "update 4", "update 5"]
    assert (
        all("rank 0" in m for m in messages) and "(2 in a row, the run stops at 2)" in messages[-1]
    )


def test_an_optimizer_that_would_not_heed_it_is_refused():
    with pytest.raises(ValueError, match="fused"):
        NonFiniteGuard(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]), ALONE, most=1)
