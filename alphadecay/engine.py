"""Statistics of many weights: whole matrices spread over the cores of a CPU, equal shapes batched on a GPU."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from alphadecay.sharding import is_sharded
from alphadecay.spectra import GRAM_DTYPES, exact_eigenvalues, exact_products, finish, gram, prepare, spectrum, sufficient
from alphadecay.statistics import NO_GRADIENT, NOT_FINITE, SOLVER_FAILED, TIMED_OUT, empty_row, spectral_row, unneeded_share
from alphadecay.workers import run_tasks

Row = tuple[dict[str, float], int]
CPU_BUDGET = 256 << 20  # bytes that matrices being solved may take together, or two of the largest if that is more
BATCH_ELEMENTS = 1 << 28  # of the Gram matrices solved together on a GPU: 1 GiB in float32


class SpectralEngine:
    """Analyses weights, and remembers which solver was the fastest on this device.

    Args:
        timeout: seconds that one module may take; then it counts as failed.
    """

    def __init__(self, timeout: float = 600.0):
        self.timeout = timeout
        self.solvers: dict[tuple[str, int], str] = {}  # (device type, n) -> name in SOLVERS

    def rows(
        self, weights: list[Tensor], gradnorms: list[float], metric: str, *, whole: bool = False, background: bool = False, **fit: object
    ) -> list[Row]:
        """A row and a failure code (see `statistics.spectral_row`) for each weight, [out, in] or [out, in, kh, kw].

        whole: every statistic, from precise eigenvalues, whether the metric needs them or not.
        background: training goes on meanwhile, so leave its cores alone (one thread) and do not touch torch's global settings: where
        these allow rounded products, the products are made in float64, which they do not concern.
        """
        if metric == "gradnorm" or not weights:
            return [(empty_row(norm), 0) for norm in gradnorms]
        lowest = 0.0 if whole else unneeded_share(metric, **fit)
        products = torch.backends.cuda.matmul if weights[0].is_cuda else torch.backends.mkldnn.matmul
        rounded = background and products.fp32_precision not in ("ieee", "none")
        dtypes = GRAM_DTYPES[1:] if rounded or lowest == 0 else GRAM_DTYPES
        if background:
            return self._rows(weights, gradnorms, metric, lowest, dtypes, 1, fit)
        with exact_products(weights[0].device.type):
            return self._rows(weights, gradnorms, metric, lowest, dtypes, torch.get_num_threads(), fit)

    def _rows(self, weights, gradnorms, metric: str, lowest: float, dtypes: tuple, threads: int, fit: dict) -> list[Row]:
        windows = metric == "alpha_farms"
        if weights[0].is_cuda:
            spectra = self.device_spectra(weights, lowest, dtypes, windows)
            tasks = [functools.partial(_known, values) for values in spectra]
        else:
            tasks = [functools.partial(exact_eigenvalues, weight, lowest, dtypes, windows) for weight in weights]
            threads = min(threads, _affordable(weights))
        steps = [functools.partial(_row, task, norm, metric, lowest, fit) for task, norm in zip(tasks, gradnorms, strict=True)]
        # The dearest first: a long one must not start when the others are done.
        order = sorted(range(len(weights)), key=lambda i: -weights[i].numel() * min(weights[i].shape[:2]))
        results = run_tasks([steps[i] for i in order], threads, self.timeout)
        by_index = dict(zip(order, results, strict=True))
        return [_row_or_failure(by_index[i], gradnorms[i]) for i in range(len(weights))]

    def device_spectra(self, weights: list[Tensor], lowest: float, dtypes: tuple[torch.dtype, ...], windows: bool = False) -> list:
        """Eigenvalues of each weight on the CPU, equal shapes solved together; an exception where there are none."""
        spectra: list = [None] * len(weights)
        groups: dict[tuple, list[tuple[int, Tensor, float]]] = defaultdict(list)  # shape of a matrix -> (weight, matrix, scale)
        prepared: dict[int, float] = {}
        for i, weight in enumerate(weights):
            try:
                matrices, prepared[i] = prepare(weight, windows)
            except ValueError as error:
                spectra[i] = error
                continue
            for matrix in matrices:
                groups[tuple(matrix.shape)].append((i, matrix, prepared[i]))
        parts: dict[int, list] = defaultdict(list)
        for (_, n), members in groups.items():
            size = max(1, BATCH_ELEMENTS // n**2)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                for (i, _, _), values in zip(batch, self._solve_batch(batch, lowest, dtypes), strict=True):
                    parts[i].append(values)
        for i, scale in prepared.items():
            failure = next((part for part in parts[i] if isinstance(part, Exception)), None)
            spectra[i] = failure or finish(parts[i], scale, convolution=weights[i].dim() == 4).cpu()
        return spectra

    def _solve_batch(self, batch: list[tuple[int, Tensor, float]], lowest: float, dtypes: tuple[torch.dtype, ...]) -> list:
        """Spectra of matrices of one shape; those that a batched float32 solve does not do for are solved one by one."""
        first = dtypes[0] if batch[0][1].dtype != torch.float64 else torch.float64
        grams = torch.stack([gram(matrix, scale, first) for _, matrix, scale in batch])
        try:
            values = self._solver(grams)(grams).double()
            sound = (torch.isfinite(values).all(-1) & sufficient(values, lowest, first)).tolist()
        except torch.linalg.LinAlgError:
            values, sound = grams, [False] * len(batch)
        del grams
        return [v if ok else _alone(m, scale, lowest, dtypes) for v, ok, (_, m, scale) in zip(values, sound, batch, strict=True)]

    def _solver(self, grams: Tensor) -> Callable[[Tensor], Tensor]:
        """The fastest solver for these matrices [batch, n, n]: tried once on them, remembered for their device and size.

        Libraries differ in whether a batched call is one, and drivers in what is fast, so it is measured and not looked up.
        """
        key = (grams.device.type, grams.shape[-1])
        if key not in self.solvers:
            sample = grams[: min(8, len(grams))]
            self.solvers[key] = min(SOLVERS, key=lambda name: _seconds(SOLVERS[name], sample))
        return SOLVERS[self.solvers[key]]


def _one_by_one(grams: Tensor) -> Tensor:
    return torch.stack([torch.linalg.eigvalsh(g) for g in grams])


def _on_cpu(grams: Tensor) -> Tensor:
    results = run_tasks([functools.partial(torch.linalg.eigvalsh, g) for g in grams.cpu()], torch.get_num_threads(), timeout=600.0)
    for result in results:
        if isinstance(result, Exception):
            raise torch.linalg.LinAlgError(str(result))
    return torch.stack(results).to(grams.device)


SOLVERS: dict[str, Callable[[Tensor], Tensor]] = {"batched": torch.linalg.eigvalsh, "one by one": _one_by_one, "on the CPU": _on_cpu}


def _seconds(solver: Callable[[Tensor], Tensor], grams: Tensor) -> float:
    """Of the second of two calls: the first one loads libraries. Infinite where the solver fails."""
    elapsed = float("inf")
    try:
        for _ in range(2):
            start = time.perf_counter()
            solver(grams).cpu()  # waits for the device
            elapsed = time.perf_counter() - start
    except torch.linalg.LinAlgError:
        return float("inf")
    return elapsed


def _alone(matrix: Tensor, scale: float, lowest: float, dtypes: tuple[torch.dtype, ...]) -> Tensor | Exception:
    """One spectrum, with more precision where it needs it; on the CPU where the device's solver fails."""
    for place in (matrix, matrix.cpu()):
        try:
            return spectrum(place, scale, lowest, dtypes)
        except torch.linalg.LinAlgError as error:
            failure = error
    return failure


def _known(values: Tensor | Exception) -> Tensor:
    if isinstance(values, Exception):
        raise values
    return values


def _row(spectrum_of: Callable[[], Tensor], gradnorm: float, metric: str, lowest: float, fit: dict) -> Row:
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


def _affordable(weights: list[Tensor]) -> int:
    """How many matrices may be solved at a time: each takes a widened copy and, in the solver, two Gram matrices."""
    bytes_each = [4 * w.shape[0] * w.shape[1] for w in weights]
    small = [min(w.shape[:2]) for w in weights]
    need = max(8 * n * n + (0 if w.dtype == torch.float32 else b) for n, b, w in zip(small, bytes_each, weights, strict=True))
    return max(1, max(CPU_BUDGET, 2 * max(bytes_each)) // need)


def gradient_norms(weights: list[Tensor]) -> list[float]:
    """L2 norms of the weights' gradients, fused, with one wait for the device; 10 where there is none yet.

    Of sharded weights (DTensor) every rank must ask together.
    """
    with_gradient = [w for w in weights if w.grad is not None]
    gradients = [w.grad.detach() for w in with_gradient]
    if any(map(is_sharded, gradients)):
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
        norms = [n.full_tensor() if is_sharded(n) else n for n in norms]
    elif gradients and gradients[0].device.type == "cpu":
        # torch's norm adds up one by one on a CPU: three times slower than BLAS, and forty times less exact.
        norms = [torch.dot(g, g).sqrt() for g in (g.float().flatten() for g in gradients)]
    else:
        norms = torch._foreach_norm(gradients, dtype=torch.float32) if gradients else []
    known = dict(zip(map(id, with_gradient), torch.stack(list(norms)).tolist() if gradients else [], strict=True))
    return [known.get(id(w), NO_GRADIENT) for w in weights]
