"""Which rank analyses what."""

from alphadecay import distributed


def test_the_most_expensive_modules_are_assigned_first():
    costs = [1.0, 1.0, 2.0]
    owners = distributed.assign_owners(costs, 2)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in (0, 1)]
    assert loads == [2.0, 2.0]  # cheapest first would give 3 and 1
