"""Weight -> eigenvalues: the empirical spectral density (ESD) of a module, exact and cheap.

The eigenvalues of W^T W are the squared singular values of W. The Gram matrix on the smaller side and a values-only
eigensolver cost a third of a singular value decomposition, but square the condition number. So the Gram matrix is made in
float32 where that is enough, in float64 where it is not, and the singular values themselves are computed where even
that is not enough. What is enough is told from the result: `FLOAT32_RANGE` and `FLOAT64_RANGE`.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# lambda_max / lambda up to which an eigenvalue of a Gram matrix is kept. Measured on spectra that fall exponentially, as a
# power, or have outliers (n from 128 to 512): alpha is within 4e-6 of float64 singular values below a ratio of 1e3 to
# the median in float32 (2e-5 to 1e-4 at 3e4), and within 1e-8 below 1e10 in float64.
FLOAT32_RANGE = 1e3
FLOAT64_RANGE = 1e10
GRAM_DTYPES = (torch.float32, torch.float64)  # tried in turn
# METHOD: the k*k slices of a convolution are scaled by sqrt(0.5), so their eigenvalues by 0.5.
CONV_SCALE = 0.5
GRAM_BLOCKS = 4  # only the blocks on and below the diagonal are made: 5/8 of the products
NO_RESCALE_RANGE = (
    1e-12,
    1e12,
)  # entries of which the largest lies here need no scaling to keep their products in float32's range


def eigenvalues(weight: Tensor, lowest: float = 0.0) -> Tensor:
    """Eigenvalues of the correlation matrix W^T W of a weight: its squared singular values (paper, section 3).

    Args:
        weight: [out, in] of a linear layer (or its transpose, which has the same spectrum), or [out, in, kh, kw] of a
            convolution, which is read as kh*kw matrices [out, in] scaled by sqrt(0.5) whose eigenvalues are pooled.
            Any floating dtype; half precision is widened first.
        lowest: the share of the spectrum, from below, whose precision does not matter: 0.5 is enough for alpha, which reads the
            upper half, and lets most weights do with float32 products. The default does all in float64.

    Returns:
        The N eigenvalues in ascending order, float64, on the weight's device (Apple's: on the CPU); N = min(out, in), times
        kh*kw for a convolution. Where all is done in float64, what is zero to working precision is exactly 0.

    Raises:
        ValueError: the weight has another number of dimensions, is empty, or holds NaN or Inf.
        torch.linalg.LinAlgError: no solver converged.
    """
    with exact_products(weight.device.type):
        return exact_eigenvalues(weight, lowest, GRAM_DTYPES if lowest > 0 else GRAM_DTYPES[1:])


def exact_eigenvalues(
    weight: Tensor, lowest: float, dtypes: tuple[torch.dtype, ...], windows: bool = False
) -> Tensor:
    """`eigenvalues` for a caller that has seen to exact products itself. dtypes: those of the Gram matrix, tried in turn; windows: the
    pooled eigenvalues of the matrix's windows (see `square_windows`) in place of its own."""
    matrices, scale = prepare(weight, windows)
    spectra = [spectrum(matrix, scale, lowest, dtypes) for matrix in matrices]
    return finish(spectra, scale, convolution=weight.dim() == 4)


def prepare(weight: Tensor, windows: bool = False) -> tuple[list[Tensor], float]:
    """A weight as matrices [rows, columns] of its own dtype, rows >= columns, and the power of 2 that they are to be divided by."""
    if weight.dim() not in (2, 4):
        raise ValueError(
            f"a weight of {weight.dim()} dimensions has no spectrum here: give [out, in] or [out, in, kh, kw]"
        )
    if weight.numel() == 0:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is empty")
    weight = weight.detach()
    if weight.device.type == "mps":  # has no float64
        weight = weight.cpu()
    greatest = float(torch.linalg.vector_norm(weight, ord=math.inf))
    if not math.isfinite(greatest):
        raise ValueError("the weight holds NaN or Inf")
    scale = (
        1.0
        if not greatest or NO_RESCALE_RANGE[0] < greatest < NO_RESCALE_RANGE[1]
        else 2.0 ** math.floor(math.log2(greatest))
    )
    slices = [weight] if weight.dim() == 2 else weight.flatten(2).unbind(2)
    if windows:
        return [window for s in slices for window in square_windows(s)], scale
    return [s if s.shape[0] >= s.shape[1] else s.mT for s in slices], scale


def square_windows(matrix: Tensor) -> list[Tensor]:
    """Square windows of half the smaller side, which cover a matrix [rows, columns] (FARMS, Hu et al., ICML 2025).

    The spectrum of a Gaussian matrix, and with it alpha, depends on its aspect ratio: 2.12 for a square, 2.99 for LLaMA's MLPs, 3.41
    for 1:4. Windows of one aspect ratio make modules of different shapes comparable. Window: w = floor(min / 2); along each side
    ceil(side / w) windows at even distances, so the stride is w where w divides the side and less elsewhere. Cost beside the whole
    matrix n x m (n <= m), whose solver takes n^3: 2 ceil(2 m / n) windows of (n / 2)^3, a half for a square, 3/2 for 1:3.
    """
    w = max(1, min(matrix.shape) // 2)
    starts = []
    for side in matrix.shape:
        count = -(-side // w)
        starts.append([round(i * (side - w) / max(1, count - 1)) for i in range(count)])
    return [matrix[row : row + w, column : column + w] for row in starts[0] for column in starts[1]]


def finish(spectra: list[Tensor], scale: float, convolution: bool) -> Tensor:
    """Undo the scaling of `prepare` and pool the slices."""
    values = torch.cat(spectra) if len(spectra) > 1 else spectra[0]
    values = values.clamp_min(0.0) * (scale * scale * (CONV_SCALE if convolution else 1.0))
    return values.sort().values if len(spectra) > 1 else values


def is_precise_enough(values: Tensor, lowest: float, dtype: torch.dtype) -> Tensor:
    """Whether spectra [..., n] (ascending) of Gram matrices in `dtype` are precise from the share `lowest` on: a boolean [...]."""
    limit = FLOAT32_RANGE if dtype == torch.float32 else FLOAT64_RANGE
    # One below the median: the paper's convention takes the threshold from there.
    index = max(0, int(values.shape[-1] * lowest) - 1)
    return values[..., index] * limit >= values[..., -1]


def gram(matrix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The lower blocks of (W / scale)^T (W / scale): [..., rows, n] -> [..., n, n], in `dtype`; what is above them is zero.

    The eigensolvers read the lower triangle alone.
    """
    wide = matrix.to(dtype)
    wide = wide / scale if scale != 1.0 else wide
    n = wide.shape[-1]
    if n < 64 * GRAM_BLOCKS:
        return wide.mT @ wide
    out = wide.new_zeros(*wide.shape[:-2], n, n)
    edges = [n * i // GRAM_BLOCKS for i in range(GRAM_BLOCKS + 1)]
    for start, stop in zip(edges, edges[1:], strict=False):
        out[..., start:, start:stop] = wide[..., start:].mT @ wide[..., start:stop]
    return out


def spectrum(
    matrix: Tensor, scale: float, lowest: float, dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    """Ascending eigenvalues, float64, of one matrix [rows, n] divided by `scale`; see `exact_eigenvalues`."""
    for dtype in dtypes:
        if matrix.dtype == torch.float64 != dtype:
            continue
        try:
            values = torch.linalg.eigvalsh(gram(matrix, scale, dtype)).double()
        except torch.linalg.LinAlgError:
            continue
        if torch.isfinite(values).all() and is_precise_enough(values, lowest, dtype):
            return values
    return squared_singular_values(matrix, scale)


def squared_singular_values(matrix: Tensor, scale: float) -> Tensor:
    """The same from the matrix itself, in float64: slow, and exact where squaring it is not."""
    wide = matrix.double() / scale
    values = torch.linalg.svdvals(wide).flip(-1) ** 2
    rounding = max(wide.shape[-2:]) * torch.finfo(torch.float64).eps
    return torch.where(values > rounding**2 * values[..., -1:], values, 0.0)


@contextlib.contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Matrix products in full float32 or float64: without autocast, and without TF32 or its CPU kin, whatever the caller's
    settings, which are back afterwards. (A Gram product rounded to bfloat16 puts alpha off by 4 to 5 %.)"""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    with torch.autocast(device_type, enabled=False), torch.no_grad():
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
