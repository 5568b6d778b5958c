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
        raise ValueError(
            "this rank is not in the process_group it was given: make AlphaDecay on the group's ranks only"
        )
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
            raise ValueError(
                f"the ranks do not agree on what to analyse: rank 0 has {odd[0]!r}, rank {rank} has {odd[1]!r}"
            )


def agreed_choices(choices: dict[str, str], group: dist.ProcessGroup | None) -> dict[str, str]:
    """The ranks' choices together, the same on all of them: where two chose differently, the lowest rank's."""
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return choices
    everyones: list[dict[str, str]] = [{} for _ in range(world_size)]
    dist.all_gather_object(everyones, choices, group=group)
    return {name: choice for theirs in reversed(everyones) for name, choice in theirs.items()}


def gather_rows(
    rows: Tensor, owned: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> Tensor:
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


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor itself. Call it under `torch.no_grad`."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sum_over_shards(sums: Tensor, of: Tensor) -> Tensor:
    """Sums over the elements of a sharded tensor `of`, from those over each rank's part, in one collective; of any other as they are."""
    if not is_sharded(of):
        return sums
    from torch.distributed.tensor import (  # here: builds of torch without distributed have none
        DTensor,
        Partial,
    )

    placements = [Partial() if placement.is_shard() else placement for placement in of.placements]
    return DTensor.from_local(sums, of.device_mesh, placements).full_tensor()


def whole_weight(weight: Tensor, owner: int, group: dist.ProcessGroup | None) -> Tensor | None:
    """A weight whole on its owner, None on the other ranks; of a sharded weight all ranks must ask together.

    A weight cut by rows, as fully_shard does, goes to its owner alone, in its own dtype, from the ranks that share the owner's copy of
    the model (all ranks, or with a two-dimensional mesh some); any other placement is made whole on every rank for a moment.
    """
    rank, _ = rank_and_size(group)
    if not is_sharded(weight):
        return weight.detach() if rank == owner else None
    mesh, placements = weight.device_mesh, weight.placements
    *copies, rows = placements
    everyone = dist.get_process_group_ranks(group)
    if (
        rows.is_shard(0)
        and all(p.is_replicate() for p in copies)
        and mesh.mesh.flatten().tolist() == everyone
    ):
        return _gather_rows_of(weight, everyone[owner], mesh.get_group(mesh.ndim - 1))
    full = weight.detach().full_tensor()
    if rank != owner:
        return None
    # Of a replicated weight it is the parameter's own memory, which training goes on to change.
    return full.clone() if full.data_ptr() == weight.to_local().data_ptr() else full


def _gather_rows_of(weight: Tensor, owner: int, group: dist.ProcessGroup) -> Tensor | None:
    """owner: its global rank. group: the ranks that hold the rows of one copy, this rank among them."""
    ranks = dist.get_process_group_ranks(group)
    if owner not in ranks:
        return None
    part, rows = weight.detach().to_local(), weight.shape[0]
    most = -(-rows // len(ranks))  # the first ranks hold so many rows, the last ones fewer
    padded = part.new_zeros(most, *weight.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in ranks] if dist.get_rank() == owner else None
    dist.gather(padded, parts, group=group, group_dst=ranks.index(owner))
    return torch.cat(parts)[:rows] if parts is not None else None
