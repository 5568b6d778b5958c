"""The guard against non-finite updates, compared with a loop that skips them itself.

The guard in whole runs of two ranks: end_to_end/test_faults.py.
"""

import math

import pytest
import torch
from loguru import logger

from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.process_group import DistributedContext

SINGLE_PROCESS = DistributedContext(0, 0, 1, torch.device("cpu"))


@pytest.fixture
def messages():
    found = []
    handler = logger.add(lambda message: found.append(message.record["message"]), level="WARNING")
    yield found
    logger.remove(handler)


def train(optimizer_name, bad, guarded):
    """Make eight updates, of which `bad` have a gradient or a loss that is not finite.

    Returns the weights, the step count of the optimizer, and how many updates were skipped last.
    """
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(40, 30))
    optimizer = build_optimizer(optimizer_name, [{"params": [weight], "weight_decay": 0.1}], lr=0.1)
    guard = NonFiniteGuard(optimizer, SINGLE_PROCESS, max_consecutive_skips=3)
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
            assert guard.resolve_pending()
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
def test_nonfinite_updates_are_skipped(optimizer, bad):
    guarded, steps, skipped = train(optimizer, bad, guarded=True)
    plain, expected_steps, _ = train(optimizer, bad, guarded=False)
    assert torch.equal(guarded, plain) and steps == expected_steps == 8 - len(bad)
    assert skipped == (2 if 8 in bad else 0)


def guard_of_a_weight(ranks=SINGLE_PROCESS, max_consecutive_skips=2):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = build_optimizer("adam", [{"params": [weight]}], lr=0.1)
    return weight, optimizer, NonFiniteGuard(optimizer, ranks, max_consecutive_skips)


def test_skips_are_logged_and_too_many_in_a_row_end_the_run(messages):
    *_, guard = guard_of_a_weight()
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    answers = []
    for update, norm in enumerate([good, bad, good, bad, bad], 1):
        guard.check_update(update, good, norm)
        answers.append(guard.resolve_pending())
    assert answers == [True, True, True, True, False] and not guard.resolve_pending()
    assert [m.split(":")[0] for m in messages] == ["update 2", "update 4", "update 5"]
    assert all("rank 0" in m for m in messages)
    assert "(2 in a row, the run stops at 2)" in messages[-1]
    assert "2 updates in a row, up to update 5" in str(guard.failure(5, "--grad_clipping"))
    guard.check_update(6, good, good)
    assert guard.failure(6, "--grad_clipping") is None and guard.skipped == 0


class TwoRanks(DistributedContext):
    """Rank 0 of two, whose other rank records `others` non-finite values in each update."""

    others = 0.0

    def sum(self, values):
        values[1] += TwoRanks.others
        return values


def test_an_overflow_of_the_summed_gradient_is_skipped(messages):
    """Every rank's own gradients and losses are finite, and only their sum over ranks is not."""
    ranks = TwoRanks(0, 0, 2, torch.device("cpu"))
    weight, optimizer, guard = guard_of_a_weight(ranks)
    for update, norm in enumerate((math.inf, 1.0), 1):
        weight.grad = torch.ones(2)
        guard.record_nonfinite(torch.tensor(2.0))
        guard.check_update(update, torch.tensor(1.0), torch.tensor(norm))
        optimizer.step()
        assert weight.tolist() == ([0.0, 0.0] if update == 1 else pytest.approx([-0.1, -0.1]))
        assert guard.resolve_pending()
    assert len(messages) == 1 and "update 1: " in messages[0]
    assert "not finite on the sum over all ranks;" in messages[0]


def test_another_rank_with_a_nonfinite_gradient(messages, monkeypatch):
    """The rank is named, and values recorded for one update do not count for the next."""
    weight, optimizer, guard = guard_of_a_weight(TwoRanks(0, 0, 2, torch.device("cpu")))
    for update, others in enumerate((3.0, 0.0), 1):
        monkeypatch.setattr(TwoRanks, "others", others)
        weight.grad = torch.ones(2)
        guard.check_update(update, torch.tensor(1.0), torch.tensor(1.0))
        optimizer.step()
        assert (weight.tolist() == [0.0, 0.0]) == (update == 1)
        assert guard.resolve_pending()
    assert len(messages) == 1 and "update 1: " in messages[0]
    assert "not finite on rank 1; no rank" in messages[0]


def test_an_optimizer_that_is_not_fused_is_refused():
    """It would apply the update, because it does not read `found_inf`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="fused"):
        NonFiniteGuard(optimizer, SINGLE_PROCESS, max_consecutive_skips=1)
