"""Share an analysis among ranks: who analyses which module, and the collectives around it.

`AnalysisPlan` is what the method uses. The functions below it are its parts, and helpers for
sharded tensors (DTensor) that other modules use as well.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor

from alphadecay.modules import BalancedModule

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class AnalysisPlan:
    """Which rank analyses which module, and how weights and results travel.

    All methods but `whole_weights` of an unsharded model are collectives: every rank of the group
    must call them, in the same order.

    Args:
        modules: the balanced modules, the same on all ranks.
        group: the ranks that share the analysis. None: all of them, or this process alone if
            torch.distributed is not initialised.

    Attributes:
        modules: the balanced modules.
        owners: [M], the rank within the group that analyses each module.
        owned: indices of the modules that this rank analyses.
        rank: this process's rank within the group.
        world_size: number of ranks in the group.

    Raises:
        ValueError: this process does not belong to the group.
    """

    def __init__(
        self, modules: Sequence[BalancedModule], group: dist.ProcessGroup | None = None
    ) -> None:
        self.modules = list(modules)
        self.rank, self.world_size = rank_and_size(group)
        self.owners = assign_owners([m.cost for m in self.modules], self.world_size)
        self.owned = [i for i, owner in enumerate(self.owners) if owner == self.rank]
        self._group = group

    def check_agreement(self, settings: Sequence[str]) -> None:
        """Check that all ranks have the same modules and settings.

        Args:
            settings: what else determines the later collectives, one text for each setting.

        Raises:
            ValueError: two ranks differ. Raised on every rank.
        """
        modules = [f"{m.name} {tuple(m.weight.shape)}" for m in self.modules]
        check_agreement([*settings, *modules], self._group)

    def whole_weights(self) -> list[Tensor]:
        """Return the weights of the modules that this rank analyses, unsharded, in their order."""
        weights = [
            whole_weight(m.weight, owner, self._group)
            for m, owner in zip(self.modules, self.owners, strict=True)
        ]
        return [weight for weight in weights if weight is not None]

    def copied_whole_weights(self) -> list[Tensor]:
        """Return `whole_weights` in memory that training does not change."""
        # Unsharding has made a copy already. Any other weight is the parameter itself.
        return [
            weight if is_sharded(self.modules[i].weight) else weight.clone()
            for i, weight in zip(self.owned, self.whole_weights(), strict=True)
        ]

    def gather(self, table: Tensor) -> Tensor:
        """Return the table with the rows of all ranks, the same bytes on every rank.

        Args:
            table: [M, columns] float64 on the CPU, of which this rank computed the owned rows.
        """
        return gather_rows(table, self.owned, self.modules[0].weight.device, self._group)


def assign_owners(costs: Sequence[float], world_size: int) -> list[int]:
    """Return the rank of each item so that all ranks have about the same load.

    Longest-processing-time-first: the most expensive item that is left goes to the least loaded
    rank (Graham 1969). The slowest rank takes at most 4/3 of the shortest possible time.

    Args:
        costs: cost of each item, in any unit.
        world_size: number of ranks.
    """
    loads = [(0.0, rank) for rank in range(world_size)]
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(loads)
        owners[item] = rank
        heapq.heappush(loads, (load + costs[item], rank))
    return owners


def rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in a group and the number of ranks.

    Without an initialised torch.distributed that is (0, 1).

    Raises:
        ValueError: this process does not belong to the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if dist.get_rank(group) < 0:
        raise ValueError(
            "this rank does not belong to the process_group that was given: "
            "build AlphaDecay on the ranks of the group only"
        )
    return dist.get_rank(group), dist.get_world_size(group)


def check_agreement(facts: Sequence[str], group: dist.ProcessGroup | None) -> None:
    """Check that all ranks agree on the facts that determine later collectives.

    Ranks that differ would otherwise deadlock later, each waiting for the other.

    Args:
        facts: device, settings and modules, one text for each.
        group: the ranks to compare.

    Raises:
        ValueError: two ranks differ. Raised on every rank, with the first difference.
    """
    _, world_size = rank_and_size(group)
    if world_size == 1:
        return
    facts_by_rank: list[list[str]] = [[] for _ in range(world_size)]
    dist.all_gather_object(facts_by_rank, list(facts), group=group)
    first = facts_by_rank[0]
    for rank, theirs in enumerate(facts_by_rank):
        if theirs != first:
            differences = [(a, b) for a, b in zip(first, theirs, strict=False) if a != b]
            counts = (f"{len(first)} entries", f"{len(theirs)} entries")
            ours, other = differences[0] if differences else counts
            raise ValueError(
                f"the ranks do not agree on what to analyse: "
                f"rank 0 has {ours!r}, rank {rank} has {other!r}"
            )


def gather_rows(
    rows: Tensor, owned: Sequence[int], device: torch.device, group: dist.ProcessGroup | None
) -> Tensor:
    """Gather the rows that each rank computed, in one collective.

    Args:
        rows: [M, columns] float64 on the CPU; those of `owned` are this rank's.
        owned: indices of this rank's rows. Every row belongs to exactly one rank.
        device: the model's device, on which the group's backend communicates.
        group: the ranks that have rows.

    Returns:
        [M, columns] float64 on the CPU, the same bytes on every rank.
    """
    if rank_and_size(group)[1] == 1:
        return rows
    mine = torch.zeros_like(rows)
    mine[owned] = rows[owned]
    if dist.get_backend(group) == "nccl":  # it needs the GPU, also while the model is on the CPU
        device = torch.device("cuda", torch.cuda.current_device())
    mine = mine.to(device)
    # Each row is one rank's numbers plus zeros, so that the sum is exact.
    dist.all_reduce(mine, group=group)
    return mine.cpu()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return True for a DTensor (FSDP2's fully_shard, tensor parallelism)."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, or the tensor itself if it is not sharded.

    The part shares the tensor's memory. Call it under `torch.no_grad`.
    """
    return tensor.to_local() if is_sharded(tensor) else tensor


def sum_over_shards(sums: Tensor, of: Tensor) -> Tensor:
    """Add up sums over each rank's part of a sharded tensor, in one collective.

    Args:
        sums: sums over the elements of this rank's part of `of`.
        of: the tensor. If it is not sharded, `sums` is returned unchanged.

    Returns:
        The sums over all elements of `of`, the same on every rank.
    """
    if not is_sharded(of):
        return sums
    # Imported here because builds of torch without distributed do not have it.
    from torch.distributed.tensor import DTensor, Partial

    placements = [Partial() if placement.is_shard() else placement for placement in of.placements]
    return DTensor.from_local(sums, of.device_mesh, placements).full_tensor()


def whole_weight(weight: Tensor, owner: int, group: dist.ProcessGroup | None) -> Tensor | None:
    """Return an unsharded weight on its owner, None on all other ranks.

    For a sharded weight this is a collective. Weights sharded by rows, as fully_shard does, are
    sent to the owner only, in their own dtype, from the ranks that share the owner's copy of the
    model (all ranks, or some of them with a two-dimensional mesh). For any other placement every
    rank holds the whole weight for a moment.

    Args:
        weight: [out, in] or [out, in, kh, kw], sharded or not.
        owner: rank within the group that needs the weight.
        group: the ranks that share the analysis.
    """
    rank, _ = rank_and_size(group)
    if not is_sharded(weight):
        return weight.detach() if rank == owner else None
    mesh, placements = weight.device_mesh, weight.placements
    *copies, rows = placements
    group_ranks = dist.get_process_group_ranks(group)
    if (
        rows.is_shard(0)
        and all(p.is_replicate() for p in copies)
        and mesh.mesh.flatten().tolist() == group_ranks
    ):
        return _gather_rows_of(weight, group_ranks[owner], mesh.get_group(mesh.ndim - 1))
    values = cast("DTensor", weight.detach())
    full: Tensor = values.full_tensor()
    if rank != owner:
        return None
    # A replicated weight comes back in the parameter's own memory, which training changes.
    return full.clone() if full.data_ptr() == values.to_local().data_ptr() else full


def _gather_rows_of(weight: DTensor, owner: int, group: dist.ProcessGroup) -> Tensor | None:
    """Gather a weight that is sharded by rows on one rank.

    Args:
        weight: sharded along its first dimension.
        owner: global rank of the receiver.
        group: the ranks that hold the rows of one copy of the weight, this rank among them.

    Returns:
        The whole weight on the owner, None on all other ranks.
    """
    ranks = dist.get_process_group_ranks(group)
    if owner not in ranks:
        return None
    part, rows = cast("DTensor", weight.detach()).to_local(), weight.shape[0]
    max_rows = -(-rows // len(ranks))  # the last ranks may hold fewer rows than the first ones
    padded = part.new_zeros(max_rows, *weight.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in ranks] if dist.get_rank() == owner else None
    dist.gather(padded, parts, group=group, group_dst=ranks.index(owner))
    return torch.cat(parts)[:rows] if parts is not None else None
