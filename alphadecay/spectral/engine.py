"""Statistics of many weights: whole matrices spread over the cores of a CPU, equal shapes batched on a GPU."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from alphadecay.spectral.eigenvalues import (
    GRAM_DTYPES,
    exact_eigenvalues,
    exact_products,
    finish,
    gram,
    is_precise_enough,
    prepare,
    spectrum,
)
from alphadecay.spectral.statistics import (
    NOT_FINITE,
    SOLVER_FAILED,
    TIMED_OUT,
    empty_row,
    ignored_fraction,
    spectral_row,
)
from alphadecay.spectral.thread_pool import run_tasks

Row = tuple[dict[str, float], int]
CPU_BUDGET = (
    256 << 20
)  # bytes that matrices being solved may take together, or two of the largest if that is more
BATCH_BYTES = (
    256 << 20
)  # of the Gram matrices solved together on a GPU, which with the solver's copies take three times as much


class SpectralEngine:
    """Analyses weights, and remembers which solver was the fastest on this device.

    Args:
        timeout: seconds that one module may take; then it counts as failed. (On a GPU the solver itself is not timed.)
    """

    def __init__(self, timeout: float = 240.0):
        self.timeout = timeout
        self.solvers: dict[
            str, str
        ] = {}  # "cuda float32 512", device, dtype and n -> name in SOLVERS

    def rows(
        self,
        weights: list[Tensor],
        gradnorms: list[float],
        metric: str,
        *,
        whole: bool = False,
        background: bool = False,
        **fit: object,
    ) -> list[Row]:
        """A row and a failure code (see `statistics.spectral_row`) for each weight, [out, in] or [out, in, kh, kw].

        whole: every statistic, from precise eigenvalues, whether the metric needs them or not.
        background: training goes on meanwhile, so leave its cores alone (one thread) and do not touch torch's precision settings: where
        these allow rounded products, the products are made in float64, which they do not concern.
        """
        if metric == "gradnorm" or not weights:
            return [(empty_row(norm), 0) for norm in gradnorms]
        lowest = 0.0 if whole else ignored_fraction(metric, **fit)
        products = (
            torch.backends.cuda.matmul if weights[0].is_cuda else torch.backends.mkldnn.matmul
        )
        rounded = background and products.fp32_precision not in ("ieee", "none")
        dtypes = GRAM_DTYPES[1:] if rounded or lowest == 0 else GRAM_DTYPES
        if background:
            return self._rows(weights, gradnorms, metric, lowest, dtypes, 1, fit)
        with exact_products(weights[0].device.type):
            return self._rows(
                weights, gradnorms, metric, lowest, dtypes, torch.get_num_threads(), fit
            )

    def _rows(
        self, weights, gradnorms, metric: str, lowest: float, dtypes: tuple, threads: int, fit: dict
    ) -> list[Row]:
        windows = metric == "alpha_farms"
        if weights[0].is_cuda:
            spectra = self.device_spectra(weights, lowest, dtypes, windows)
            tasks = [functools.partial(_known, values) for values in spectra]
        else:
            tasks = [
                functools.partial(exact_eigenvalues, weight, lowest, dtypes, windows)
                for weight in weights
            ]
            threads = min(threads, _max_concurrent_solves(weights, dtypes))
        steps = [
            functools.partial(_row, task, norm, metric, lowest, fit)
            for task, norm in zip(tasks, gradnorms, strict=True)
        ]
        # The dearest first: a long one must not start when the others are done.
        order = sorted(
            range(len(weights)), key=lambda i: -weights[i].numel() * min(weights[i].shape[:2])
        )
        results = run_tasks([steps[i] for i in order], threads, self.timeout)
        by_index = dict(zip(order, results, strict=True))
        return [_row_or_failure(by_index[i], gradnorms[i]) for i in range(len(weights))]

    def device_spectra(
        self,
        weights: list[Tensor],
        lowest: float,
        dtypes: tuple[torch.dtype, ...],
        windows: bool = False,
    ) -> list:
        """Eigenvalues of each weight on the CPU, equal shapes solved together; an exception where there are none."""
        spectra: list = [None] * len(weights)
        groups: dict[tuple, list[tuple[int, Tensor, float]]] = defaultdict(
            list
        )  # alike matrices -> (weight, matrix, scale)
        prepared: dict[int, float] = {}
        for i, weight in enumerate(weights):
            try:
                matrices, prepared[i] = prepare(weight, windows)
            except ValueError as error:
                spectra[i] = error
                continue
            for matrix in matrices:
                groups[matrix.shape, matrix.dtype, matrix.device].append((i, matrix, prepared[i]))
        parts: dict[int, list] = defaultdict(list)
        for ((_, n), _, _), members in groups.items():
            size = max(1, BATCH_BYTES // (n * n * dtypes[0].itemsize))
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                for (i, _, _), values in zip(
                    batch, self._solve_batch(batch, lowest, dtypes), strict=True
                ):
                    parts[i].append(values)
        for i, scale in prepared.items():
            failure = next((part for part in parts[i] if isinstance(part, Exception)), None)
            spectra[i] = failure or finish(parts[i], scale, convolution=weights[i].dim() == 4).cpu()
        return spectra

    def _solve_batch(
        self, batch: list[tuple[int, Tensor, float]], lowest: float, dtypes: tuple[torch.dtype, ...]
    ) -> list:
        """Spectra of matrices alike in shape, dtype and device. Those for which the first dtype is not precise enough are solved together
        in the next one, and alone after the last; so are all where the solver fails."""
        if batch[0][1].dtype == torch.float64:
            dtypes = (torch.float64,)
        try:
            grams = torch.stack([gram(matrix, scale, dtypes[0]) for _, matrix, scale in batch])
            values = self._solver(grams)(grams).double()
            sound = (
                torch.isfinite(values).all(-1) & is_precise_enough(values, lowest, dtypes[0])
            ).tolist()
            del grams
        except RuntimeError:  # a LinAlgError, or out of memory
            return [_solve_single(matrix, scale, lowest, dtypes) for _, matrix, scale in batch]
        again = [member for member, ok in zip(batch, sound, strict=True) if not ok]
        if again and len(dtypes) > 1:
            better = self._solve_batch(again, lowest, dtypes[1:])
        else:
            better = [_solve_single(matrix, scale, lowest, ()) for _, matrix, scale in again]
        rest = iter(better)
        return [v if ok else next(rest) for v, ok in zip(values, sound, strict=True)]

    def _solver(self, grams: Tensor) -> Callable[[Tensor], Tensor]:
        """The fastest solver for these matrices [batch, n, n]: tried once on them, remembered for their device and size.

        Libraries differ in whether a batched call is one, and drivers in what is fast, so it is measured and not looked up.
        """
        key = f"{grams.device.type} {str(grams.dtype)[6:]} {grams.shape[-1]}"
        if key not in self.solvers:
            sample = grams[:4]
            self.solvers[key] = min(SOLVERS, key=lambda name: _seconds(SOLVERS[name], sample))
        return SOLVERS[self.solvers[key]]


def _one_by_one(grams: Tensor) -> Tensor:
    return torch.stack([torch.linalg.eigvalsh(g) for g in grams])


SOLVERS: dict[str, Callable[[Tensor], Tensor]] = {
    "batched": torch.linalg.eigvalsh,
    "one by one": _one_by_one,
}


def _seconds(solver: Callable[[Tensor], Tensor], grams: Tensor) -> float:
    """Of the second of two calls: the first one loads libraries. Infinite where the solver fails."""
    elapsed = float("inf")
    try:
        for _ in range(2):
            start = time.perf_counter()
            solver(grams).cpu()  # waits for the device
            elapsed = time.perf_counter() - start
    except RuntimeError:
        return float("inf")
    return elapsed


def _solve_single(
    matrix: Tensor, scale: float, lowest: float, dtypes: tuple[torch.dtype, ...]
) -> Tensor | Exception:
    """One spectrum, with more precision where it needs it; on the CPU where the device's solver fails."""
    try:
        return spectrum(matrix, scale, lowest, dtypes)
    except RuntimeError:
        pass
    try:
        return spectrum(matrix.cpu(), scale, lowest, dtypes).to(matrix.device)
    except RuntimeError as error:
        return error


def _known(values: Tensor | Exception) -> Tensor:
    if isinstance(values, Exception):
        raise values
    return values


def _row(
    spectrum_of: Callable[[], Tensor], gradnorm: float, metric: str, lowest: float, fit: dict
) -> Row:
    values = spectrum_of()
    if not torch.isfinite(values).all():
        raise torch.linalg.LinAlgError("the solver gave eigenvalues that are not finite")
    return spectral_row(values, gradnorm, metric, whole=lowest == 0, **fit)


def _row_or_failure(result: Row | Exception, gradnorm: float) -> Row:
    if not isinstance(result, Exception):
        return result
    if isinstance(result, TimeoutError):
        return empty_row(gradnorm), TIMED_OUT
    return empty_row(gradnorm), NOT_FINITE if isinstance(result, ValueError) else SOLVER_FAILED


def _max_concurrent_solves(weights: list[Tensor], dtypes: tuple[torch.dtype, ...]) -> int:
    """How many matrices may be solved at a time: each takes a widened copy and, in the solver, two Gram matrices."""
    wide = dtypes[0].itemsize
    bytes_each = [wide * w.shape[0] * w.shape[1] for w in weights]
    small = [min(w.shape[:2]) for w in weights]
    need = max(
        2 * wide * n * n + (0 if w.dtype == dtypes[0] else b)
        for n, b, w in zip(small, bytes_each, weights, strict=True)
    )
    return max(1, max(CPU_BUDGET, 2 * max(bytes_each)) // need)
