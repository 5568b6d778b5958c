"""One row of statistics for each module: what a module can be scored by.

The definitions are those of He et al. 2025 (arXiv 2506.14562) and of its published code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from alphadecay.constants import METRICS
from alphadecay.spectral.eigenvalues import NO_SPECTRUM, NOT_FINITE_WEIGHT
from alphadecay.spectral.power_law import FLAT, UNDEFINED, UndefinedPowerLaw, fit_power_law

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from alphadecay.spectral.power_law import FitSettings

COLUMNS = ("alpha", "D", *METRICS[1:])  # the order of a row
NO_GRADIENT = 10.0  # gradnorm of a weight without a gradient (the published value)
# Of the entropy: added to probabilities and to the rank, and the threshold of a singular value.
EPSILON = 6e-5
# A row that could not be computed carries the index of its reason in `FAILURES`, because ranks
# exchange rows as numbers.
SOLVER_FAILED, TIMED_OUT, NO_SCORE = 2, 3, 4
FAILURES = (
    None,
    NOT_FINITE_WEIGHT,
    "the eigenvalue solver failed",
    "the eigenvalue solver did not end in time",
    "the score is not finite",
    *(f"alpha is undefined: {reason}" for reason in UNDEFINED),
    # Numbers of reasons are in checkpoints, so that new ones come last.
    *NO_SPECTRUM,
)


def empty_row(gradnorm: float) -> dict[str, float]:
    """Return a row in which only the gradient's norm is known; the other columns are NaN."""
    return dict.fromkeys(COLUMNS, math.nan) | {"gradnorm": gradnorm}


def ignored_fraction_of(
    metric: str, method: str = "median", xmin_pos: float = 2.0, filter_zeros: bool = False
) -> float:
    """Return the fraction of the smallest eigenvalues whose precision does not affect a metric.

    Args:
        metric: one of `alphadecay.METRICS`.
        method: of the power-law fit; likewise xmin_pos and filter_zeros, see `fit_power_law`.

    Returns:
        `ignored_fraction` of `alphadecay.eigenvalues`, from 0 (none) to 1 (all but the largest).
    """
    if metric in ("spectral_norm", "gradnorm_d_weightnorm"):
        return 1.0
    if metric == "entropy" or filter_zeros or not method.startswith("median"):
        return 0.0  # every eigenvalue is used or counted
    if metric == "alpha_farms":
        return 0.5 / xmin_pos  # in some windows the pooled threshold lies lower than in others
    return 1 / xmin_pos


def spectral_row(
    values: Tensor,
    gradnorm: float,
    metric: str,
    whole: bool = True,
    tolerance: float = FLAT,
    **fit: Unpack[FitSettings],
) -> tuple[dict[str, float], int]:
    """Compute the statistics of one module, as far as the metric needs them.

    Args:
        values: [N], the weight's eigenvalues, ascending.
        gradnorm: L2 norm of the weight's gradient.
        metric: one of `alphadecay.METRICS`. `gradnorm_d_weightnorm` needs the largest eigenvalue
            only. For `alpha_farms` the values are those of the matrix's windows, and only
            `alpha_farms` and D are computed.
        whole: True if all values are precise. Otherwise the entropy, which depends on the small
            ones, is left out.
        tolerance: see `fit_power_law`.
        fit: its other keyword arguments.

    Returns:
        The row, by column (NaN where not computed), and the index of its failure in `FAILURES`
        (0: none).
    """
    row = empty_row(gradnorm)
    if metric == "alpha_farms":
        try:
            law = fit_power_law(values, tolerance=tolerance, **fit)
        except UndefinedPowerLaw as error:
            return row, FAILURES.index(f"alpha is undefined: {error}")
        return row | {"alpha_farms": law.alpha, "D": law.D}, 0
    row["spectral_norm"] = float(values[-1])
    row["gradnorm_d_weightnorm"] = gradnorm / (row["spectral_norm"] + 1e-8)
    failure = 0
    if metric != "gradnorm_d_weightnorm":
        row["fnorm"] = float(values.sum())
        row["stable_rank"] = (
            row["fnorm"] / row["spectral_norm"] if row["spectral_norm"] else math.nan
        )
        row["entropy"] = spectral_entropy(values) if whole else math.nan
        try:
            law = fit_power_law(values, tolerance=tolerance, **fit)
            row["alpha"], row["D"] = law.alpha, law.D
            row["alphahat"] = softplus(law.alpha * math.log10(row["spectral_norm"]))
        except UndefinedPowerLaw as error:
            failure = FAILURES.index(f"alpha is undefined: {error}")
    if metric not in ("alpha", "alphahat"):
        failure = 0  # the score is another statistic, which may be known although alpha is not
    if not failure and not math.isfinite(row[metric]):
        failure = NO_SCORE
    return row, failure


def spectral_entropy(values: Tensor) -> float:
    """Return -sum p ln p / ln(rank + 6e-5), with p = lambda / sum(lambda) + 6e-5.

    The rank is the number of singular values above 6e-5.

    Args:
        values: [N], eigenvalues.

    Returns:
        The entropy; NaN if all eigenvalues are zero.
    """
    total = values.sum()
    if total <= 0:
        return math.nan
    p = values / total + EPSILON
    rank = int((values.sqrt() > EPSILON).sum())
    return float(-(p * p.log()).sum()) / math.log(rank + EPSILON)


def softplus(x: float) -> float:
    """Return ln(1 + e^x), without overflow for large x."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
