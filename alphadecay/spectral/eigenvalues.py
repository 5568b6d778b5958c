"""From a weight to its eigenvalues: the empirical spectral density (ESD) of a module.

The eigenvalues of W^T W are the squared singular values of W. The Gram matrix of the smaller side
and an eigensolver without eigenvectors cost a third of a singular value decomposition, but square
the condition number. So the Gram matrix is computed in float32 if that is precise enough, in
float64 if float32 is not, and the singular values themselves are computed if float64 is not. The
result shows whether it is precise enough, see `FLOAT32_RANGE` and `FLOAT64_RANGE`.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from alphadecay.deprecated import renamed_keyword

# Eigenvalues of a Gram matrix are precise down to lambda_max / RANGE. Measured on spectra that fall
# exponentially, fall as a power, or have outliers (n from 128 to 512): in float32, alpha is within
# 4e-6 of that of float64 singular values if lambda_max / median is below 1e3 (2e-5 to 1e-4 at 3e4);
# in float64, within 1e-8 below 1e10.
FLOAT32_RANGE = 1e3
FLOAT64_RANGE = 1e10
GRAM_DTYPES = (torch.float32, torch.float64)  # tried in this order
# The k*k slices of a convolution are scaled by sqrt(0.5), as published. So their eigenvalues are
# scaled by 0.5.
CONV_SCALE = 0.5
GRAM_BLOCKS = 4  # only blocks on and below the diagonal are computed: 5/8 of the products
NOT_FINITE_WEIGHT = "the weight holds NaN or Inf"
# Why a weight has no spectrum here.
NOT_FLOATING, EMPTY, WITHOUT_VALUES, WRONG_SHAPE = NO_SPECTRUM = (
    "the weight is not of a floating-point dtype",
    "the weight is empty",
    "the weight is on the meta device, without values",
    "the weight is neither [out, in] nor [out, in, kh, kw]",
)
# If the largest entry lies within this range, products stay within float32's without scaling.
NO_RESCALE_RANGE = (1e-12, 1e12)


class NoSpectrum(ValueError):
    """A weight has no eigenvalues here. The text is NOT_FINITE_WEIGHT or one of `NO_SPECTRUM`."""


def dense_values(weight: Tensor) -> Tensor:
    """Check that a weight has a spectrum, and return it as a dense tensor that torch can multiply.

    Sparse weights are made dense, and float8, which has no products, is widened to float32.

    Raises:
        NoSpectrum: its dtype, device, size or number of dimensions does not allow a spectrum.
    """
    if not weight.is_floating_point() or weight.is_quantized:
        raise NoSpectrum(NOT_FLOATING)
    if weight.dim() not in (2, 4):
        raise NoSpectrum(WRONG_SHAPE)
    if 0 in weight.shape:
        raise NoSpectrum(EMPTY)
    if weight.is_meta:
        raise NoSpectrum(WITHOUT_VALUES)
    weight = weight.detach()
    if weight.layout != torch.strided:
        weight = weight.to_dense()
    return weight.float() if weight.itemsize == 1 else weight


def rounding_of(weight: Tensor) -> float:
    """Return the relative difference up to which eigenvalues of a weight are equal to rounding.

    Rounding the entries of an orthogonal matrix to a dtype spreads its eigenvalues over 1.2 epsilon
    of that dtype, and float32 products over up to 3 sqrt(n) epsilon of float32 (measured for n from
    8 to 2048). The spectra of trained weights are far from that: in bfloat16 the bound is 0.016.

    Args:
        weight: [out, in] or [out, in, kh, kw], of a floating dtype.
    """
    n = min(weight.shape[:2])
    return 2 * torch.finfo(weight.dtype).eps + 4 * math.sqrt(n) * torch.finfo(torch.float32).eps


def eigenvalues(
    weight: Tensor, ignored_fraction: float | None = None, *, lowest: float | None = None
) -> Tensor:
    """Return the eigenvalues of the correlation matrix W^T W of a weight (He et al. 2025, sec. 3).

    These are its squared singular values, without any normalisation.

    Args:
        weight: [out, in] of a linear layer (or its transpose, which has the same spectrum), or
            [out, in, kh, kw] of a convolution. A convolution counts as kh*kw matrices [out, in],
            scaled by sqrt(0.5), whose eigenvalues are pooled. Any floating dtype, dense or sparse;
            narrower ones are converted to float32 or float64 first.
        ignored_fraction: fraction of the smallest eigenvalues whose precision does not matter.
            0.5 is enough for alpha, which uses the upper half, and lets most weights be analysed
            with float32 products. The default, 0, computes everything in float64.
        lowest: old name of `ignored_fraction`.

    Returns:
        [N] float64, ascending, on the weight's device (for Apple's GPUs on the CPU);
        N = min(out, in), times kh*kw for a convolution. If everything is computed in float64,
        eigenvalues that are zero to working precision are exactly 0.

    Raises:
        ValueError: the weight is not of a floating dtype, has another number of dimensions, is
            empty, has no values (meta device), or holds NaN or Inf.
        torch.linalg.LinAlgError: no solver converged.
    """
    fraction = renamed_keyword(
        "eigenvalues", ("lowest", "ignored_fraction"), lowest, ignored_fraction
    )
    fraction = 0.0 if fraction is None else fraction
    with exact_products(weight.device.type):
        return exact_eigenvalues(weight, fraction, GRAM_DTYPES if fraction > 0 else GRAM_DTYPES[1:])


def exact_eigenvalues(
    weight: Tensor,
    ignored_fraction: float,
    dtypes: Sequence[torch.dtype],
    windows: bool = False,
) -> Tensor:
    """Return `eigenvalues`, for callers that are already inside `exact_products`.

    Args:
        weight: see `eigenvalues`.
        ignored_fraction: see `eigenvalues`.
        dtypes: dtypes of the Gram matrix, tried in this order.
        windows: return the pooled eigenvalues of the matrix's `square_windows` instead.
    """
    matrices, scale = to_matrices(weight, windows)
    spectra = [spectrum(matrix, scale, ignored_fraction, dtypes) for matrix in matrices]
    return pool_eigenvalues(spectra, scale, convolution=weight.dim() == 4)


def largest_entries(weights: Sequence[Tensor]) -> list[float]:
    """Return the largest absolute value of each weight, after one wait for the device.

    Args:
        weights: dense tensors that are not empty, on one device.
    """
    if not weights:
        return []
    wide = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
    norms: list[float] = torch.stack(
        list(torch._foreach_norm(list(weights), math.inf, dtype=wide))
    ).tolist()
    return norms


def to_matrices(
    weight: Tensor, windows: bool = False, largest: float | None = None
) -> tuple[list[Tensor], float]:
    """Split a weight into the matrices whose eigenvalues are pooled.

    Args:
        weight: [out, in] or [out, in, kh, kw].
        windows: split each matrix further, into its `square_windows`.
        largest: the largest absolute value of the weight, if it is known; see `largest_entries`.

    Returns:
        Matrices [rows, columns] in the weight's dtype, with rows >= columns, and the power of 2
        that they must be divided by so that their products neither overflow nor vanish.

    Raises:
        NoSpectrum: see `dense_values`, or the weight holds NaN or Inf.
    """
    weight = dense_values(weight)
    if largest is None:
        (largest,) = largest_entries([weight])
    if weight.device.type == "mps":  # Apple's GPUs have no float64
        weight = weight.cpu()
    if not math.isfinite(largest):
        raise NoSpectrum(NOT_FINITE_WEIGHT)
    if not largest or NO_RESCALE_RANGE[0] < largest < NO_RESCALE_RANGE[1]:
        scale = 1.0
    else:
        scale = 2.0 ** math.floor(math.log2(largest))
    slices = [weight] if weight.dim() == 2 else list(weight.flatten(2).unbind(2))
    if windows:
        return [window for s in slices for window in square_windows(s)], scale
    return [s if s.shape[0] >= s.shape[1] else s.mT for s in slices], scale


def square_windows(matrix: Tensor) -> list[Tensor]:
    """Cover a matrix with square windows of half its smaller side (FARMS, Hu et al., ICML 2025).

    The spectrum of a Gaussian matrix, and so its alpha, depends on the aspect ratio: alpha is 2.12
    for a square, 2.99 for LLaMA's MLPs, 3.41 for 1:4. Windows of one aspect ratio make modules of
    different shapes comparable.

    A window has the side w = floor(min(rows, columns) / 2). Along each side of the matrix lie
    ceil(side / w) windows at even distances, so the stride is w if w divides the side, and smaller
    otherwise. The solver of a whole n x m matrix (n <= m) takes n^3 operations, that of its
    windows 2 * ceil(2 m / n) * (n / 2)^3: half of it for a square, 3/2 for 1:3.

    Args:
        matrix: [rows, columns].

    Returns:
        Views [w, w] of the matrix.
    """
    w = max(1, min(matrix.shape) // 2)
    starts = []
    for side in matrix.shape:
        count = -(-side // w)
        starts.append([round(i * (side - w) / max(1, count - 1)) for i in range(count)])
    return [matrix[row : row + w, column : column + w] for row in starts[0] for column in starts[1]]


def pool_eigenvalues(spectra: Sequence[Tensor], scale: float, convolution: bool) -> Tensor:
    """Undo the scaling of `to_matrices` and merge the spectra of its matrices.

    Args:
        spectra: ascending eigenvalues of each matrix.
        scale: the power of 2 that the matrices were divided by.
        convolution: True for a convolution's slices, whose eigenvalues are halved.

    Returns:
        All eigenvalues, ascending; negative ones, which are rounding errors, become 0.
    """
    values = torch.cat(list(spectra)) if len(spectra) > 1 else spectra[0]
    values = values.clamp_min(0.0) * (scale * scale * (CONV_SCALE if convolution else 1.0))
    return values.sort().values if len(spectra) > 1 else values


def is_precise_enough(values: Tensor, ignored_fraction: float, dtype: torch.dtype) -> Tensor:
    """Return True for each spectrum that is precise where it matters.

    Args:
        values: [..., n], ascending eigenvalues of Gram matrices.
        ignored_fraction: fraction of the smallest eigenvalues whose precision does not matter.
        dtype: dtype in which the Gram matrices were computed.

    Returns:
        Booleans [...].
    """
    limit = FLOAT32_RANGE if dtype == torch.float32 else FLOAT64_RANGE
    # One below the median, because the paper's convention takes the threshold from there.
    index = max(0, int(values.shape[-1] * ignored_fraction) - 1)
    precise: Tensor = values[..., index] * limit >= values[..., -1]
    return precise


def gram(matrix: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the lower triangle of the Gram matrix (W / scale)^T (W / scale).

    Above its diagonal blocks the result is zero: the eigensolvers read the lower triangle only.

    Args:
        matrix: [..., rows, n].
        scale: a power of 2.
        dtype: dtype of the products.

    Returns:
        [..., n, n] in `dtype`.
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
    matrix: Tensor, scale: float, ignored_fraction: float, dtypes: Sequence[torch.dtype]
) -> Tensor:
    """Return the eigenvalues of one matrix, with as much precision as it needs.

    Args:
        matrix: [rows, n].
        scale: a power of 2 that the matrix is divided by.
        ignored_fraction: fraction of the smallest eigenvalues whose precision does not matter.
        dtypes: dtypes of the Gram matrix, tried in this order before singular values.

    Returns:
        [n] float64, ascending.
    """
    for dtype in dtypes:
        if matrix.dtype == torch.float64 != dtype:
            continue  # float32 products would throw the matrix's digits away
        try:
            values: Tensor = torch.linalg.eigvalsh(gram(matrix, scale, dtype)).double()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if torch.isfinite(values).all() and is_precise_enough(values, ignored_fraction, dtype):
            return values
    return squared_singular_values(matrix, scale)


def squared_singular_values(matrix: Tensor, scale: float) -> Tensor:
    """Return the squared singular values of matrix / scale, computed in float64.

    This is slow, and precise where squaring the matrix is not. Values that are zero to working
    precision become 0.

    Args:
        matrix: [..., rows, n].
        scale: a power of 2.

    Returns:
        [..., n] float64, ascending.
    """
    wide = matrix.double() / scale
    values = torch.linalg.svdvals(wide).flip(-1) ** 2
    rounding = max(wide.shape[-2:]) * torch.finfo(torch.float64).eps
    return torch.where(values > rounding**2 * values[..., -1:], values, 0.0)


@contextlib.contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Compute matrix products in full float32 or float64 inside this context.

    Autocast, TF32 and the CPU's reduced-precision products are off; the caller's settings are
    restored afterwards. (A Gram matrix rounded to bfloat16 changes alpha by 4 to 5 %.)

    Args:
        device_type: `cpu` or `cuda`, for autocast.
    """
    backends = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    )
    before = [backend.fp32_precision for backend in backends]
    if not torch.amp.is_autocast_available(device_type):  # such as meta
        device_type = "cpu"
    with torch.autocast(device_type, enabled=False), torch.no_grad():
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
