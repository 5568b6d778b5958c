"""Norms of gradients and tensors, also of sharded ones."""

import torch
from torch import Tensor

from alphadecay.distributed import is_sharded, local, sum_over_shards
from alphadecay.spectral.statistics import NO_GRADIENT

DOT_CHUNK_SIZE = 2**14  # numbers that a dot product adds up in one go


def gradient_norms(weights: list[Tensor]) -> list[float]:
    """L2 norms of the weights' gradients, fused, with one wait for the device; 10 where there is none yet.

    Of sharded weights (DTensor) every rank must ask together.
    """
    with_gradient = [w for w in weights if w.grad is not None]
    gradients = [w.grad.detach() for w in with_gradient]
    norms = tensor_norms(gradients)
    # One wait for the device, unless there are several.
    norms = (
        torch.stack(norms).tolist()
        if len({n.device for n in norms}) == 1
        else list(map(float, norms))
    )
    known = dict(zip(map(id, with_gradient), norms, strict=True))
    return [known.get(id(w), NO_GRADIENT) for w in weights]


def _squares(flat: Tensor) -> Tensor:
    """The sum of squares of a vector, in pieces that float32 adds up to seven digits whatever the BLAS."""
    return (
        torch.stack([torch.dot(piece, piece) for piece in flat.split(DOT_CHUNK_SIZE)])
        .double()
        .sum()
    )


def tensor_norms(tensors: list[Tensor]) -> list[Tensor]:
    """L2 norm of each tensor, fused, in float32 or, if one is wider, in float64; of sharded ones every rank must ask together."""
    if any(map(is_sharded, tensors)):
        return _norms_over_shards(tensors)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    if all(t.device.type == "cpu" for t in tensors):
        # torch's norm adds up one by one on a CPU: three times slower than BLAS, and forty times less exact.
        return [_squares(t.detach().to(wide).flatten()).sqrt() for t in tensors]
    return list(torch._foreach_norm(tensors, dtype=wide))


def _norms_over_shards(tensors: list[Tensor]) -> list[Tensor]:
    """Norms in float64; one collective for all tensors that are cut alike, not one for each."""
    # What is only a summand on each rank (tensor parallelism) has no norm of its parts.
    tensors = [
        t.full_tensor() if is_sharded(t) and any(p.is_partial() for p in t.placements) else t
        for t in tensors
    ]
    squares = [
        torch.linalg.vector_norm(local(t.detach()), dtype=torch.float64).square() for t in tensors
    ]
    cuts = [(t.device_mesh, t.placements) if is_sharded(t) else None for t in tensors]
    for cut in dict.fromkeys(c for c in cuts if c is not None):
        alike = [i for i, c in enumerate(cuts) if c == cut]
        sums = sum_over_shards(torch.stack([squares[i] for i in alike]), tensors[alike[0]])
        for i, total in zip(alike, sums, strict=True):
            squares[i] = total
    return [total.sqrt() for total in squares]


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """L2 norm of all tensors together, in float32 or better whatever their dtype."""
    return torch.linalg.vector_norm(torch.stack(tensor_norms(tensors)))
