"""Eigenvalues -> alpha and D: the power law that fits the tail of a spectrum."""

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

METHODS = ("median", "median-paper", "goodness-of-fit", "fix-finger", "fix-finger-reference")
HISTOGRAM_BINS = 100  # of log10 lambda, for fix-finger
EDGES = torch.tensor(
    [*range(HISTOGRAM_BINS), math.inf], dtype=torch.float64
)  # in widths of a bin, from the first
ZERO = 1e-5  # filter_zeros leaves out eigenvalues up to here (the reference's threshold)
BLOCK_ROWS = 16  # thresholds whose D is computed at a time: they take 16 N numbers of memory, twice
ROUNDING = 1e-9  # far above that of a D, far below the differences of two
ONE_THREAD = (
    2**15
)  # numbers that torch leaves to one thread: waking a second one for a few more costs more than it spares

ZERO_THRESHOLD = "the median eigenvalue is zero"
EQUAL_TAIL = "all eigenvalues of the tail are equal"
NO_THRESHOLD = "no threshold gives a tail with alpha above 1"
TOO_FEW = "a power law needs at least two eigenvalues"
UNDEFINED = (ZERO_THRESHOLD, EQUAL_TAIL, NO_THRESHOLD, TOO_FEW)


class UndefinedPowerLaw(ValueError):
    """The spectrum has no tail to fit. The text is one of `UNDEFINED`."""


class PowerLaw(NamedTuple):
    """A fitted tail: density proportional to lambda^-alpha for lambda >= xmin.

    alpha: the exponent. D: Kolmogorov-Smirnov distance between the tail and the fit, in [0, 1]. xmin: the threshold.
    tail: how many eigenvalues the fit used.
    """

    alpha: float
    D: float
    xmin: float
    tail: int


@torch.inference_mode()  # spares the many small operations of the searches a tenth of their time
def fit_power_law(
    eigenvalues: Tensor, method: str = "median", xmin_pos: float = 2.0, filter_zeros: bool = False
) -> PowerLaw:
    """Fit a power law to the upper part of a spectrum: PL_Alpha_Hill and its two searches for a threshold.

    Args:
        eigenvalues: [N], ascending, not negative (what `alphadecay.eigenvalues` returns).
        method: `median`: the threshold is lambda_i, i = floor(N / xmin_pos), itself one of the n = N - i tail values
            (the published code). `median-paper`: equation 2 of the paper, the threshold being the next lower eigenvalue.
            `goodness-of-fit`: the threshold with the least D of all. `fix-finger`: the same among
            0.95 p <= xmin <= 1.5 p, with p the peak of the log10 histogram; `fix-finger-reference`: with the published
            code's lower bound, log10(0.95 p).
        xmin_pos: for `median`: 2 takes the upper half of the spectrum.
        filter_zeros: leave out eigenvalues up to 1e-5 first, unless that would leave none.

    Raises:
        UndefinedPowerLaw: the threshold is zero, the whole tail is equal, no threshold gives alpha > 1, or there are
            fewer than two eigenvalues.
        ValueError: unknown method, xmin_pos not above 1, or eigenvalues that do not ascend.
    """
    if method not in METHODS:
        raise ValueError(f"unknown fit {method!r}: choose one of {', '.join(METHODS)}")
    if not xmin_pos > 1:
        raise ValueError(
            f"xmin_pos is {xmin_pos}: it must be above 1 (2 fits the upper half of the spectrum)"
        )
    values = eigenvalues.detach().to("cpu", torch.float64)
    if filter_zeros and (values > ZERO).any():
        values = values[values > ZERO]
    if values.numel() > 1 and float(values.diff().min()) < 0:
        raise ValueError("the eigenvalues are not in ascending order: sort them first")
    if values.numel() < 2:
        raise UndefinedPowerLaw(TOO_FEW)
    if method in ("median", "median-paper"):
        return _fit_median(values, xmin_pos, paper=method == "median-paper")
    if float(values[0]) < sys.float_info.min:
        values = values[int(torch.searchsorted(values, sys.float_info.min)) :]
    if not values.numel():
        raise UndefinedPowerLaw(ZERO_THRESHOLD)
    logs = values.log10()
    start, stop = (
        (0, values.numel() - 1) if method == "goodness-of-fit" else _window(values, logs, method)
    )
    return _least_distance(values[start:], logs[start:], stop - start)


def _fit_median(values: Tensor, xmin_pos: float, paper: bool) -> PowerLaw:
    count = len(values)
    if paper:
        start = count - int(count * (1 - 1 / xmin_pos))
        threshold = values[start - 1]
    else:
        start = int(count / xmin_pos)
        threshold = values[start]
    tail = values[start:]
    if threshold <= 0:
        raise UndefinedPowerLaw(ZERO_THRESHOLD)
    spread = (tail / threshold).log().sum()
    if not spread > 0:
        raise UndefinedPowerLaw(EQUAL_TAIL)
    alpha = 1 + len(tail) / spread
    empirical = torch.arange(len(tail), dtype=torch.float64) / len(tail)
    distance = (1 - (tail / threshold) ** (1 - alpha) - empirical).abs().max()
    return PowerLaw(float(alpha), float(distance), float(threshold), len(tail))


def _window(values: Tensor, logs: Tensor, method: str) -> tuple[int, int]:
    """Indices [start, stop) of the eigenvalues near the peak of the histogram of their log10, without the last eigenvalue."""
    low, high = float(logs[0]), float(logs[-1])
    if low == high:
        raise UndefinedPowerLaw(EQUAL_TAIL)
    width = (high - low) / HISTOGRAM_BINS
    # The logarithms ascend, so that counting them is a search of the edges; torch.histc would wake its threads for it.
    counts = torch.searchsorted(logs, EDGES * width + low).diff()
    peak = 10 ** (int(counts.argmax()) * width + low)
    lower = 0.95 * peak if method == "fix-finger" else math.log10(0.95 * peak)
    start, stop = (
        int(torch.searchsorted(values, lower)),
        int(torch.searchsorted(values, 1.5 * peak, right=True)),
    )
    return start, min(stop, values.numel() - 1)


def _least_distance(values: Tensor, logs: Tensor, count: int) -> PowerLaw:
    """The threshold among the first `count` eigenvalues whose fit is closest to its own tail; of equally close ones the lowest.

    The differences at some 2 sqrt(N) of the eigenvalues bound every D from below. Tails are taken in the order of their bounds until
    no bound is below the least D: the rest cannot win.

    Args:
        values, logs: [N], ascending eigenvalues above zero and their log10.
    """
    if count <= 0:
        raise UndefinedPowerLaw(NO_THRESHOLD)
    # Descending, so that a tail is the first n eigenvalues, and relative to the greatest, so that nearly equal ones keep their digits.
    length = values.numel()  # faster than len, which torch has in Python
    logs = logs.flip(0).sub_(logs[-1])
    sizes = torch.arange(1, length + 1, dtype=logs.dtype)
    spreads = logs.cumsum(0).addcmul_(
        sizes, logs, value=-1
    )  # of each tail the sum of log10(lambda_j / lambda_i)
    rates = sizes / spreads.mul_(math.log(2))  # (alpha - 1) log2(10)
    tails = torch.stack([logs * rates, rates, sizes])[:, -count:].flip(1)  # lowest threshold first
    logs, sizes = logs.unsqueeze(1), sizes.unsqueeze(1)
    step = max(1, math.isqrt(length) // 2)
    sample = logs[::step], sizes[::step]
    rows = max(1, ONE_THREAD // sample[0].numel())
    parts = [
        _distances(*sample, *part.unbind())
        for part in (tails.split(rows, 1) if count > rows else (tails,))
    ]
    bounds, order = (torch.cat(parts) if count > rows else parts[0]).sort()
    best = (
        1.0,
        0,
    )  # D and the row; no fit is a D of 1 or, alpha being infinite, one that is not a number
    for first in range(0, count, BLOCK_ROWS):
        if not float(bounds[first]) <= best[0] + ROUNDING:
            break
        block = order[first : first + BLOCK_ROWS]
        distances = _distances(logs, sizes, *tails.index_select(1, block).unbind())
        best = min(best, *zip(distances.tolist(), block.tolist(), strict=True))
    distance, row = best
    if distance >= 1:
        raise UndefinedPowerLaw(NO_THRESHOLD)
    return PowerLaw(
        1 + float(rates[-1 - row]) * math.log10(2), distance, float(values[row]), length - row
    )


def _distances(logs: Tensor, ranks: Tensor, own: Tensor, rates: Tensor, sizes: Tensor) -> Tensor:
    """[n]: the greatest difference between each tail and its fit, both taken as the share from an eigenvalue up.

    Args:
        logs, ranks: [m, 1], log10 of the eigenvalues to compare at, and how many of the spectrum are from there up.
        own, rates, sizes: [n], of each tail log10 of the threshold times the rate, (alpha - 1) log2(10) and the number of eigenvalues.
    """
    fitted = (
        torch.addcmul(own, logs, rates, value=-1).clamp_(max=0).exp2_()
    )  # below the threshold both shares stay 1
    return fitted.addcdiv_(ranks.clamp(max=sizes), sizes, value=-1).abs_().amax(dim=0)
