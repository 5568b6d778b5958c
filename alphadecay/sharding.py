"""Which rank analyses which module, how a sharded weight gets to that rank, and how the rows come together."""

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
    if dist.get_rank(group) < 0:
        raise ValueError("this rank is not in the process_group it was given: make AlphaDecay on the group's ranks only")
    return dist.get_rank(group), dist.get_world_size(group)


def check_agreement(facts: list[str], group: dist.ProcessGroup | None) -> None:
    """Compare what decides the collectives to come (device, settings, each module) over the ranks, so that ranks which would wait for
    each other for ever find out now. Raises ValueError on every rank where one differs."""
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return
    everyones: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(everyones, facts, group=group)
    for rank, theirs in enumerate(everyones):
        if theirs != everyones[0]:
            pairs = [(a, b) for a, b in zip(everyones[0], theirs, strict=False) if a != b]
            odd = pairs[0] if pairs else (f"{len(everyones[0])} entries", f"{len(theirs)} entries")
            raise ValueError(f"the ranks do not agree on what to analyse: rank 0 has {odd[0]!r}, rank {rank} has {odd[1]!r}")


def agreed_choices(choices: dict[str, str], group: dist.ProcessGroup | None) -> dict[str, str]:
    """The ranks' choices together, the same on all of them: where two chose differently, the lowest rank's."""
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return choices
    everyones: list[dict[str, str]] = [{} for _ in range(world_size)]
    dist.all_gather_object(everyones, choices, group=group)
    return {name: choice for theirs in reversed(everyones) for name, choice in theirs.items()}


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
    if dist.get_backend(group) == "nccl":  # the model may still be on the CPU
        device = torch.device("cuda", torch.cuda.current_device())
    mine = mine.to(device)
    dist.all_reduce(mine, group=group)  # each row is one rank's plus zeros, so the sum is exact
    return mine.cpu()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor (FSDP2's fully_shard, tensor parallelism)."""
    return hasattr(tensor, "placements")


def whole_weight(weight: Tensor, owner: int, group: dist.ProcessGroup | None) -> Tensor | None:
    """A weight whole on its owner, None on the other ranks; of a sharded weight all ranks must ask together.

    A weight cut by rows over one dimension of all ranks, as fully_shard does, goes to its owner alone, in its own dtype; any other
    placement is made whole on every rank for a moment.
    """
    rank, world_size = rank_and_size(group)
    if not is_sharded(weight):
        return weight.detach() if rank == owner else None
    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim == 1 and placements[0].is_shard(0) and mesh.mesh.flatten().tolist() == dist.get_process_group_ranks(group):
        return _gather_rows_of(weight, owner, rank, world_size, mesh.get_group())
    full = weight.detach().full_tensor()
    if rank != owner:
        return None
    # Of a replicated weight it is the parameter's own memory, which training goes on to change.
    return full.clone() if full.data_ptr() == weight.to_local().data_ptr() else full


def _gather_rows_of(weight: Tensor, owner: int, rank: int, world_size: int, group: dist.ProcessGroup) -> Tensor | None:
    local, rows = weight.detach().to_local(), weight.shape[0]
    most = -(-rows // world_size)  # the first ranks hold so many rows, the last ones fewer
    padded = local.new_zeros(most, *weight.shape[1:])
    padded[: len(local)] = local
    parts = [torch.empty_like(padded) for _ in range(world_size)] if rank == owner else None
    dist.gather(padded, parts, group=group, group_dst=owner)
    return torch.cat(parts)[:rows] if parts is not None else None
