"""Statistics of many weights: on a CPU on all its cores, on a GPU in batches of equal shapes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alphadecay.spectral.eigenvalues import (
    GRAM_DTYPES,
    NoSpectrum,
    dense_values,
    exact_eigenvalues,
    exact_products,
    gram,
    is_precise_enough,
    largest_entries,
    pool_eigenvalues,
    rounding_of,
    spectrum,
    to_matrices,
)
from alphadecay.spectral.statistics import (
    FAILURES,
    SOLVER_FAILED,
    TIMED_OUT,
    empty_row,
    ignored_fraction_of,
    spectral_row,
)
from alphadecay.spectral.thread_pool import run_tasks

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from alphadecay.spectral.power_law import FitSettings

Row = tuple[dict[str, float], int]  # statistics by column, and a failure code
Dtypes = tuple[torch.dtype, ...]
# Bytes that matrices being solved on a CPU may take together; two of the largest may take more.
CPU_BUDGET = 256 << 20
# Bytes of the Gram matrices solved together on a GPU. With the solver's copies they take 3 times
# as much.
BATCH_BYTES = 256 << 20


class SpectralEngine:
    """Analyses weights.

    Args:
        timeout: seconds that one module may take before it counts as failed. (On a GPU the
            eigensolver itself is not timed.)
    """

    def __init__(self, timeout: float = 240.0) -> None:
        self.timeout = timeout

    def rows(
        self,
        weights: Sequence[Tensor],
        gradnorms: Sequence[float],
        metric: str,
        *,
        whole: bool = False,
        background: bool = False,
        **fit: Unpack[FitSettings],
    ) -> list[Row]:
        """Compute the statistics of each weight.

        Args:
            weights: [out, in] or [out, in, kh, kw] each, on one device. May be empty for the
                metric `gradnorm`, which needs none.
            gradnorms: L2 norm of each weight's gradient.
            metric: the statistic that modules are scored by; other statistics are computed if they
                cost nothing more.
            whole: compute every statistic, from precise eigenvalues, whether the metric needs them
                or not.
            background: training goes on meanwhile. So only one thread is used, and torch's
                precision settings, which are global, are not changed: if they allow rounded
                products, the products are computed in float64, which they do not affect.
            fit: keyword arguments of `fit_power_law`.

        Returns:
            For each weight its row and failure code, see `statistics.spectral_row`.
        """
        if metric == "gradnorm" or not weights:
            return [(empty_row(norm), 0) for norm in gradnorms]
        ignored_fraction = 0.0 if whole else ignored_fraction_of(metric, **fit)
        if weights[0].is_cuda:
            precision = torch.backends.cuda.matmul.fp32_precision
        else:
            precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        rounded = background and precision not in ("ieee", "none")
        dtypes = GRAM_DTYPES[1:] if rounded or ignored_fraction == 0 else GRAM_DTYPES
        analyze = functools.partial(
            self._rows, weights, gradnorms, metric, ignored_fraction, dtypes, fit
        )
        if background:
            return analyze(threads=1)
        with exact_products(weights[0].device.type):
            return analyze(threads=torch.get_num_threads())

    def _rows(
        self,
        weights: Sequence[Tensor],
        gradnorms: Sequence[float],
        metric: str,
        ignored_fraction: float,
        dtypes: Dtypes,
        fit: FitSettings,
        threads: int,
    ) -> list[Row]:
        """Compute the rows, with Gram matrices in `dtypes`, on `threads` threads."""
        windows = metric == "alpha_farms"
        tasks: list[Callable[[], Tensor]]
        if weights[0].is_cuda:
            spectra = self.device_spectra(weights, ignored_fraction, dtypes, windows)
            tasks = [functools.partial(_raise_if_exception, values) for values in spectra]
        else:
            tasks = [
                functools.partial(exact_eigenvalues, weight, ignored_fraction, dtypes, windows)
                for weight in weights
            ]
            threads = min(threads, _max_concurrent_solves(weights, dtypes))
        row_tasks = [
            functools.partial(_row, task, norm, metric, ignored_fraction, weight, fit)
            for task, norm, weight in zip(tasks, gradnorms, weights, strict=True)
        ]
        # Start the most expensive weights first, so that no long task starts last.
        order = sorted(
            range(len(weights)), key=lambda i: -weights[i].numel() * min(weights[i].shape[:2])
        )
        results = run_tasks([row_tasks[i] for i in order], threads, self.timeout)
        by_index = dict(zip(order, results, strict=True))
        return [_row_or_failure(by_index[i], gradnorms[i]) for i in range(len(weights))]

    def device_spectra(
        self,
        weights: Sequence[Tensor],
        ignored_fraction: float,
        dtypes: Dtypes,
        windows: bool = False,
    ) -> list[Tensor | Exception]:
        """Compute the eigenvalues of each weight on its device, equal shapes together.

        Args:
            weights: [out, in] or [out, in, kh, kw] each.
            ignored_fraction: see `eigenvalues`.
            dtypes: dtypes of the Gram matrices, tried in this order.
            windows: see `exact_eigenvalues`.

        Returns:
            For each weight its ascending eigenvalues, on the CPU, or the exception that says why
            there are none.
        """
        spectra: dict[int, Tensor | Exception] = {}
        # Shape, dtype and device of matrices -> weight's index, matrix and scale.
        groups: dict[
            tuple[torch.Size, torch.dtype, torch.device], list[tuple[int, Tensor, float]]
        ] = defaultdict(list)
        dense: dict[int, Tensor] = {}
        for i, weight in enumerate(weights):
            try:
                dense[i] = dense_values(weight)
            except NoSpectrum as error:
                spectra[i] = error
        scales: dict[int, float] = {}
        for i, largest in zip(dense, largest_entries(list(dense.values())), strict=True):
            try:
                matrices, scales[i] = to_matrices(dense[i], windows, largest)
            except NoSpectrum as error:
                spectra[i] = error
                continue
            for matrix in matrices:
                groups[matrix.shape, matrix.dtype, matrix.device].append((i, matrix, scales[i]))
        parts: dict[int, list[Tensor | Exception]] = defaultdict(list)
        for (shape, _, _), members in groups.items():
            size = max(1, BATCH_BYTES // (shape[-1] ** 2 * dtypes[0].itemsize))
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                results = self._solve_batch(batch, ignored_fraction, dtypes)
                for (i, _, _), values in zip(batch, results, strict=True):
                    parts[i].append(values)
        for i, scale in scales.items():
            failure = next((part for part in parts[i] if isinstance(part, Exception)), None)
            solved = [part for part in parts[i] if isinstance(part, Tensor)]
            is_convolution = weights[i].dim() == 4
            spectra[i] = failure or pool_eigenvalues(solved, scale, is_convolution).cpu()
        return [spectra[i] for i in range(len(weights))]

    def _solve_batch(
        self, batch: list[tuple[int, Tensor, float]], ignored_fraction: float, dtypes: Dtypes
    ) -> list[Tensor | Exception]:
        """Return the spectra of matrices that are equal in shape, dtype and device.

        Matrices for which the first dtype is not precise enough are solved together in the next
        dtype, and one by one after the last. If the batched solver fails, all are solved one by
        one.

        Args:
            batch: (index of the weight, matrix, scale) each.
            ignored_fraction: see `eigenvalues`.
            dtypes: dtypes of the Gram matrices, tried in this order.
        """
        if batch[0][1].dtype == torch.float64:
            dtypes = (torch.float64,)
        try:
            grams = torch.stack([gram(matrix, scale, dtypes[0]) for _, matrix, scale in batch])
            # On a GPU this is one call for all matrices. It is never chosen by its time: equal
            # runs must compute equal numbers.
            values = torch.linalg.eigvalsh(grams).double()
            precise = (
                torch.isfinite(values).all(-1)
                & is_precise_enough(values, ignored_fraction, dtypes[0])
            ).tolist()
            del grams
        except RuntimeError:  # a LinAlgError, or out of memory
            return [
                _solve_single(matrix, scale, ignored_fraction, dtypes) for _, matrix, scale in batch
            ]
        again = [member for member, ok in zip(batch, precise, strict=True) if not ok]
        if again and len(dtypes) > 1:
            better = self._solve_batch(again, ignored_fraction, dtypes[1:])
        else:
            better = [
                _solve_single(matrix, scale, ignored_fraction, ()) for _, matrix, scale in again
            ]
        remaining = iter(better)
        return [v if ok else next(remaining) for v, ok in zip(values, precise, strict=True)]


def _solve_single(
    matrix: Tensor, scale: float, ignored_fraction: float, dtypes: Dtypes
) -> Tensor | Exception:
    """Return the spectrum of one matrix, solved on the CPU if the device's solver fails."""
    try:
        return spectrum(matrix, scale, ignored_fraction, dtypes)
    except RuntimeError:
        pass
    try:
        return spectrum(matrix.cpu(), scale, ignored_fraction, dtypes).to(matrix.device)
    except RuntimeError as error:
        return error


def _raise_if_exception(values: Tensor | Exception) -> Tensor:
    """Return the values, or raise them if they are an exception."""
    if isinstance(values, Exception):
        raise values
    return values


def _row(
    eigenvalues: Callable[[], Tensor],
    gradnorm: float,
    metric: str,
    ignored_fraction: float,
    weight: Tensor,
    fit: FitSettings,
) -> Row:
    """Compute the eigenvalues of one weight, and its statistics from them."""
    values = eigenvalues()
    if not torch.isfinite(values).all():
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "the solver returned eigenvalues that are not finite"
        )
    return spectral_row(
        values,
        gradnorm,
        metric,
        whole=ignored_fraction == 0,
        tolerance=rounding_of(weight),
        **fit,
    )


def _row_or_failure(result: Row | Exception, gradnorm: float) -> Row:
    """Return a computed row, or an empty one with the failure code of an exception."""
    if not isinstance(result, Exception):
        return result
    if isinstance(result, TimeoutError):
        return empty_row(gradnorm), TIMED_OUT
    if isinstance(result, NoSpectrum):
        return empty_row(gradnorm), FAILURES.index(str(result))
    return empty_row(gradnorm), SOLVER_FAILED


def _max_concurrent_solves(weights: Sequence[Tensor], dtypes: Dtypes) -> int:
    """Return how many weights may be solved at once within `CPU_BUDGET`.

    Each takes a copy in the Gram matrix's dtype, unless it has this dtype already, and two Gram
    matrices in the solver.
    """
    wide = dtypes[0].itemsize
    copies = [wide * w.shape[0] * w.shape[1] for w in weights]
    sides = [min(w.shape[:2]) for w in weights]
    need = max(
        2 * wide * n * n + (0 if w.dtype == dtypes[0] else copy)
        for n, copy, w in zip(sides, copies, weights, strict=True)
    )
    return max(1, max(CPU_BUDGET, 2 * max(copies)) // max(need, 1))
