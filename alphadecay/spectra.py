"""Weight -> eigenvalues: the empirical spectral density (ESD) of a module."""

import torch
from torch import Tensor

# Below this ratio of the median eigenvalue to the greatest, squaring the matrix has cost too many digits (a float64
# Gram matrix resolves about 1e-16 of lambda_max) and the singular values are computed from the matrix itself.
GRAM_LIMIT = 1e-9
# METHOD: the k*k slices of a convolution are scaled by sqrt(0.5), so their eigenvalues by 0.5.
CONV_SCALE = 0.5


def eigenvalues(weight: Tensor) -> Tensor:
    """Eigenvalues of the correlation matrix W^T W of a weight: its squared singular values (paper, section 3).

    Args:
        weight: [out, in] of a linear layer (or its transpose, which has the same spectrum), or [out, in, kh, kw] of a
            convolution, which is read as kh*kw matrices [out, in] scaled by sqrt(0.5) whose eigenvalues are pooled.
            Any floating dtype; the work is done in float64.

    Returns:
        The N eigenvalues in ascending order, float64, on the weight's device (Apple's: on the CPU); N = min(out, in), times kh*kw for a
        convolution. What is zero to working precision is exactly 0.

    Raises:
        ValueError: the weight has another number of dimensions, is empty, or holds NaN or Inf.
    """
    if weight.dim() not in (2, 4):
        raise ValueError(f"a weight of {weight.dim()} dimensions has no spectrum here: give [out, in] or [out, in, kh, kw]")
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is empty")
    matrices = weight.detach()
    if matrices.device.type == "mps":  # has no float64
        matrices = matrices.cpu()
    matrices = matrices.to(torch.float64)
    if not torch.isfinite(matrices).all():
        raise ValueError("the weight holds NaN or Inf")
    if matrices.dim() == 2:
        return _squared_singular_values(matrices)
    slices = matrices.flatten(2).permute(2, 0, 1)  # [kh*kw, out, in]
    return CONV_SCALE * _squared_singular_values(slices).flatten().sort().values


def _squared_singular_values(matrices: Tensor) -> Tensor:
    """[..., rows, columns] float64 -> [..., min(rows, columns)] ascending.

    The Gram matrix of the smaller side is a few times cheaper than a singular value decomposition and exact enough
    wherever its squared condition number leaves the upper half of the spectrum, which is all that alpha reads, intact.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mT
    values = torch.linalg.eigvalsh(matrices.mT @ matrices)  # [..., n] ascending
    median, greatest = values[..., values.shape[-1] // 2], values[..., -1]
    if (median < GRAM_LIMIT * greatest).any():
        values = torch.linalg.svdvals(matrices).flip(-1) ** 2
        rounding = max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps
        values = torch.where(values > rounding**2 * values[..., -1:], values, 0.0)
    return values.clamp_min(0.0)
