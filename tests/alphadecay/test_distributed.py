"""Which rank analyses what, and whose choice of a solver all ranks adopt."""

import torch.distributed as dist

from alphadecay import distributed


def test_the_most_expensive_modules_are_assigned_first():
    costs = [1.0, 1.0, 2.0]
    owners = distributed.assign_owners(costs, 2)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in (0, 1)]
    assert loads == [2.0, 2.0]  # cheapest first would give 3 and 1


def test_the_lowest_ranks_choice_is_adopted(monkeypatch):
    choices_by_rank = [{"cuda float32 64": "batched"}, {"cuda float32 64": "one by one", "b": "c"}]

    def all_gather_object(gathered, mine, group):
        gathered[:] = choices_by_rank

    monkeypatch.setattr(distributed, "rank_and_size", lambda group: (1, 2))
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    adopted = distributed.agreed_choices(choices_by_rank[1], None)
    assert adopted == {"cuda float32 64": "batched", "b": "c"}
