"""One row of statistics for each module: what a module can be scored by."""

import math

import torch
from torch import Tensor

from alphadecay.power_law import UNDEFINED, UndefinedPowerLaw, fit_power_law
from alphadecay.spectra import eigenvalues

METRICS = ("alpha", "alphahat", "spectral_norm", "fnorm", "stable_rank", "entropy", "gradnorm", "gradnorm_d_weightnorm")
COLUMNS = ("alpha", "D", *METRICS[1:])  # the order of a row
NO_GRADIENT = 10.0  # gradnorm of a weight that has no gradient yet (the reference's value)
EPSILON = 6e-5  # of the entropy: added to probabilities and rank, and the least singular value that counts
# A row that could not be computed carries the index of the reason, so that ranks can exchange it as a number.
FAILURES = (
    None,
    "the weight holds NaN or Inf",
    "the eigenvalue solver failed",
    "the score is not finite",
    *(f"alpha is undefined: {reason}" for reason in UNDEFINED),
)


def module_row(weight: Tensor, gradient: Tensor | None, metric: str = "alpha", **fit: object) -> tuple[dict[str, float], int]:
    """Statistics of one module, as far as the metric asks for them.

    Args:
        weight: [out, in] or [out, in, kh, kw].
        gradient: the weight's gradient, or None.
        metric: `gradnorm` computes no eigenvalue and `gradnorm_d_weightnorm` only the greatest; every other gives all.
        fit: passed on to `fit_power_law` (method, xmin_pos, filter_zeros).

    Returns:
        The row, by name (NaN where not computed), and the index of its failure in `FAILURES` (0: none).
    """
    row = dict.fromkeys(COLUMNS, math.nan)
    row["gradnorm"] = NO_GRADIENT if gradient is None else float(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64))
    failure = 0
    if metric != "gradnorm":
        try:
            values = eigenvalues(weight).cpu()
        except ValueError:
            return row, 1
        except torch.linalg.LinAlgError:
            return row, 2
        row["spectral_norm"] = float(values[-1])
        row["gradnorm_d_weightnorm"] = row["gradnorm"] / (row["spectral_norm"] + 1e-8)
        if metric != "gradnorm_d_weightnorm":
            failure = _fill_spectral(row, values, fit)
    if failure and metric not in ("alpha", "alphahat"):
        failure = 0  # alpha is undefined, but the score is another statistic
    if not failure and not math.isfinite(row[metric]):
        failure = 3
    return row, failure


def _fill_spectral(row: dict[str, float], values: Tensor, fit: dict) -> int:
    total, greatest = float(values.sum()), float(values[-1])
    row["fnorm"] = total
    row["stable_rank"] = total / greatest if greatest else math.nan
    row["entropy"] = spectral_entropy(values)
    try:
        law = fit_power_law(values, **fit)
    except UndefinedPowerLaw as error:
        return FAILURES.index(f"alpha is undefined: {error}")
    row["alpha"], row["D"] = law.alpha, law.D
    row["alphahat"] = softplus(law.alpha * math.log10(greatest))
    return 0


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
