"""One row of statistics for each module: what a module can be scored by."""

import math

from torch import Tensor

from alphadecay.spectral.power_law import UNDEFINED, UndefinedPowerLaw, fit_power_law

METRICS = (
    "alpha",
    "alphahat",
    "spectral_norm",
    "fnorm",
    "stable_rank",
    "entropy",
    "gradnorm",
    "gradnorm_d_weightnorm",
    "alpha_farms",
)
COLUMNS = ("alpha", "D", *METRICS[1:])  # the order of a row
NO_GRADIENT = 10.0  # gradnorm of a weight that has no gradient yet (the reference's value)
EPSILON = 6e-5  # of the entropy: added to probabilities and rank, and the least singular value that counts
# A row that could not be computed carries the index of the reason, so that ranks can exchange it as a number.
NOT_FINITE, SOLVER_FAILED, TIMED_OUT, NO_SCORE = 1, 2, 3, 4
FAILURES = (
    None,
    "the weight holds NaN or Inf",
    "the eigenvalue solver failed",
    "the eigenvalue solver did not end in time",
    "the score is not finite",
    *(f"alpha is undefined: {reason}" for reason in UNDEFINED),
)


def empty_row(gradnorm: float) -> dict[str, float]:
    """A row of which only the gradient's norm is known."""
    return dict.fromkeys(COLUMNS, math.nan) | {"gradnorm": gradnorm}


def ignored_fraction(
    metric: str, method: str = "median", xmin_pos: float = 2.0, filter_zeros: bool = False
) -> float:
    """The share of the spectrum, from below, that the metric does not read closely (`lowest` of `eigenvalues`)."""
    if metric in ("spectral_norm", "gradnorm_d_weightnorm"):
        return 1.0
    if metric == "entropy" or filter_zeros or not method.startswith("median"):
        return 0.0  # they read or count every eigenvalue
    if metric == "alpha_farms":
        return 0.5 / xmin_pos  # the pooled threshold lies lower in some windows than in others
    return 1 / xmin_pos


def spectral_row(
    values: Tensor, gradnorm: float, metric: str, whole: bool = True, **fit: object
) -> tuple[dict[str, float], int]:
    """Statistics of one module, as far as the metric asks for them.

    Args:
        values: [N], the weight's eigenvalues, ascending.
        gradnorm: L2 norm of the weight's gradient.
        metric: `gradnorm_d_weightnorm` reads the greatest eigenvalue only. For `alpha_farms` the values are those of the matrix's
            windows, and the row has nothing else but its D.
        whole: whether all the values are precise. The entropy, which counts the small ones, is left out where they are not.
        fit: passed on to `fit_power_law` (method, xmin_pos, filter_zeros).

    Returns:
        The row, by name (NaN where not computed), and the index of its failure in `FAILURES` (0: none).
    """
    row = empty_row(gradnorm)
    if metric == "alpha_farms":
        try:
            law = fit_power_law(values, **fit)
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
            law = fit_power_law(values, **fit)
            row["alpha"], row["D"] = law.alpha, law.D
            row["alphahat"] = softplus(law.alpha * math.log10(row["spectral_norm"]))
        except UndefinedPowerLaw as error:
            failure = FAILURES.index(f"alpha is undefined: {error}")
    if metric not in ("alpha", "alphahat"):
        failure = 0  # alpha may be undefined, the score is another statistic
    if not failure and not math.isfinite(row[metric]):
        failure = NO_SCORE
    return row, failure


def spectral_entropy(values: Tensor) -> float:
    """-sum p ln p / ln(rank + 6e-5), p = lambda / sum(lambda) + 6e-5, rank = singular values above 6e-5; values: [N]."""
    total = values.sum()
    if total <= 0:
        return math.nan
    p = values / total + EPSILON
    rank = int((values.sqrt() > EPSILON).sum())
    return float(-(p * p.log()).sum()) / math.log(rank + EPSILON)


def softplus(x: float) -> float:
    """ln(1 + e^x) without overflow for large x."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
