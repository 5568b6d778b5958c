"""Which rank analyses which module, and how the rows come together."""

import heapq

import torch
import torch.distributed as dist
from torch import Tensor


def assign_owners(costs: list[float], world_size: int) -> list[int]:
    """Rank of each item: greedily, the dearest item to the least loaded rank (Graham's longest-first rule)."""
    loads = [(0.0, rank) for rank in range(world_size)]
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        owners[item] = rank
        heapq.heappush(loads, (load + costs[item], rank))
    return owners


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) where torch.distributed is not in use."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gather_rows(rows: Tensor, owned: list[int], device: torch.device, group: dist.ProcessGroup | None) -> Tensor:
    """Bring together the rows that each rank computed, in one collective; every rank gets the same bytes.

    Args:
        rows: [M, columns] float64; those of `owned` are this rank's.
        device: where the group's backend wants its tensors (the model's device).
    """
    if rank_and_size(group)[1] == 1:
        return rows
    mine = torch.zeros_like(rows)
    mine[owned] = rows[owned]
    mine = mine.to(device)
    dist.all_reduce(mine, group=group)  # each row is one rank's plus zeros, so the sum is exact
    return mine.cpu()
