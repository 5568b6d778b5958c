"""Learning rate and weight decays of an update."""

import types

import pytest
import torch

from peft_pretraining.train.step import set_learning_rate, update_weight_decays


class Scheduler:
    """Assigns new decays in every second update."""

    analyzes = analyzes_next = True

    def __init__(self):
        self.updates, self.history = 0, []

    def step(self, optimizer):
        self.updates += 1
        assigned = self.updates % 2 == 0
        if assigned:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.1 * self.updates
            self.history += [{"step": self.updates, "module": name} for name in "ab"]
        return assigned


class Log:
    def __init__(self):
        self.rows = []

    def modules(self, rows):
        self.rows.append(rows)


def optimizer_of_two_groups():
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "weight_decay": 0.5}] * 2
    return torch.optim.SGD([dict(group, params=[torch.zeros(2)]) for group in groups], lr=1.0)


def test_all_groups_get_the_learning_rate():
    optimizer = optimizer_of_two_groups()
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_decays_are_assigned_timed_and_recorded():
    optimizer, decay, log, analyses = optimizer_of_two_groups(), Scheduler(), Log(), []
    meter = types.SimpleNamespace(add_analysis=lambda *given: analyses.append(given))
    decays = []
    for update in (1, 2, 3, 4):
        update_weight_decays(decay, optimizer, update, meter, log)
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
    assert decays == [[0.5, 0.5], [0.2, 0.2], [0.2, 0.2], [0.4, 0.4]]
    # Only the records of this analysis, not those of earlier ones.
    assert log.rows == [[{"step": n, "module": m} for m in "ab"] for n in (2, 4)]
    assert [bool(is_analysis) for _, is_analysis in analyses] == [False, True, False, True]
    assert all(0 <= seconds < 1 for seconds, _ in analyses)


def test_without_a_scheduler_the_decays_stay():
    optimizer, log, analyses = optimizer_of_two_groups(), Log(), []
    meter = types.SimpleNamespace(add_analysis=lambda *given: analyses.append(given))
    update_weight_decays(None, optimizer, 1, meter, log)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5]
    assert log.rows == [] and analyses == []


def test_the_time_of_a_baseline_is_not_that_of_an_analysis():
    """AWD sets a decay in every update and analyses nothing."""
    optimizer, decay, log, analyses = optimizer_of_two_groups(), Scheduler(), Log(), []
    decay.analyzes = decay.analyzes_next = False
    meter = types.SimpleNamespace(add_analysis=lambda *given: analyses.append(given))
    for update in (1, 2):
        update_weight_decays(decay, optimizer, update, meter, log)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2]
    assert log.rows == [] and analyses == []


@pytest.mark.parametrize("analyzes_next", [True, False])
def test_what_the_device_has_queued_is_not_counted(monkeypatch, analyzes_next):
    """The host waits for it before the time of an analysis begins, and at no other time."""
    waits = []
    stream = types.SimpleNamespace(synchronize=lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    decay = Scheduler()
    decay.analyzes_next = analyzes_next
    meter = types.SimpleNamespace(add_analysis=lambda *given: None)
    update_weight_decays(decay, optimizer_of_two_groups(), 1, meter, Log())
    assert len(waits) == analyzes_next
