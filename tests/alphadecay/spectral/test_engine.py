"""The spectral engine, compared with singular values in float64 (tests/support/reference.py)."""

import json
import math
import threading
import time

import pytest
import torch
import torch.nn as nn

from alphadecay import AlphaDecay, fit_power_law, norms
from alphadecay.spectral import engine
from alphadecay.spectral.eigenvalues import (
    GRAM_DTYPES,
    NoSpectrum,
    eigenvalues,
    exact_eigenvalues,
    exact_products,
    gram,
    largest_entries,
    square_windows,
    to_matrices,
)
from alphadecay.spectral.engine import SpectralEngine
from alphadecay.spectral.statistics import (
    FAILURES,
    ignored_fraction_of,
    spectral_entropy,
    spectral_row,
)
from alphadecay.spectral.thread_pool import run_tasks
from tests.support import fork_server, reference
from tests.support.spectra import spectrum_matrix


def gaussian(rows, columns, seed=0, dtype=torch.float32):
    return torch.randn(
        rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def outlier(n, size):
    singular = torch.linspace(1, 2, n, dtype=torch.float64)
    singular[0] = size
    return spectrum_matrix(singular, 2 * n)


def heavy_tailed(n, power):
    return spectrum_matrix(torch.arange(1, n + 1, dtype=torch.float64) ** -power, 3 * n)


WEIGHTS = {
    **{
        f"gaussian {r}x{c}": gaussian(r, c)
        for r, c in (
            (50, 50),
            (51, 300),
            (512, 512),
            (512, 1376),
            (768, 64),
            (64, 5461),
            (5461, 50),
        )
    },
    **{f"bf16 {r}x{c}": gaussian(r, c, dtype=torch.bfloat16) for r, c in ((128, 128), (64, 300))},
    "fp16": gaussian(128, 200, dtype=torch.float16),
    "float64": gaussian(128, 200, dtype=torch.float64),
    **{f"power {p}": heavy_tailed(128, p).float() for p in (0.5, 1, 1.5, 2)},
    **{
        f"condition 1e{d}": spectrum_matrix(
            torch.logspace(0, -d, 128, dtype=torch.float64), 200
        ).float()
        for d in (3, 6, 9, 12)
    },
    **{f"outlier {s:g}": outlier(128, s).float() for s in (10, 100, 1e3, 1e5)},
    "tiny": gaussian(128, 128, dtype=torch.float64) * 1e-20,
    "tiny float32": gaussian(128, 128) * 1e-20,
    "huge float32": gaussian(128, 128) * 1e20,
    "rank 3n/4": gaussian(200, 96, 1, torch.float64) @ gaussian(96, 128, 2, torch.float64),
    "conv": torch.randn(64, 64, 3, 3, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("path", ["cpu", "device"])
def test_alpha_agrees_with_svd(name, path):
    """alpha is within 1e-5 on the path of CPUs and on the batched path of GPUs (run on the CPU)."""
    weight = WEIGHTS[name]
    expected = reference.fit(reference.eigenvalues(weight))[0]
    if path == "cpu":
        row, failure = SpectralEngine().rows([weight], [10.0], "alpha")[0]
        assert failure == 0
        alpha = row["alpha"]
    else:
        dtypes = (torch.float32, torch.float64)
        alpha = fit_power_law(
            SpectralEngine().device_spectra([weight, weight], 0.5, dtypes)[1]
        ).alpha
    assert alpha == pytest.approx(expected, rel=1e-5)


UNDEFINED = {
    "all zero": (torch.zeros(64, 64), "the median eigenvalue is zero"),
    "rank 1": (torch.ones(64, 100), "the median eigenvalue is zero"),
    "rank n/4": (
        gaussian(64, 16, 1, torch.float64) @ gaussian(16, 64, 2, torch.float64),
        "the median eigenvalue is zero",
    ),
    "all equal": (3 * torch.eye(64), "all eigenvalues of the tail are equal"),
    "nan": (torch.full((64, 64), math.nan), "the weight holds NaN or Inf"),
    "inf": (
        torch.cat([torch.full((1, 64), math.inf), torch.ones(63, 64)]),
        "the weight holds NaN or Inf",
    ),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined_alpha_is_flagged(name):
    weight, reason = UNDEFINED[name]
    results = SpectralEngine().rows([gaussian(64, 64), weight], [10.0, 10.0], "alpha")
    assert results[0][1] == 0 and results[0][0]["alpha"] > 1
    row, failure = results[1]
    assert FAILURES[failure].endswith(reason) and math.isnan(row["alpha"])


def test_guards_are_needed():
    """alpha is imprecise if float32 eigenvalues are not replaced: the tests above can fail."""
    for name in ("outlier 1000", "condition 1e12"):
        matrix = WEIGHTS[name]
        values = torch.linalg.eigvalsh(gram(matrix, 1.0, torch.float32)).double().clamp_min(1e-300)
        expected = reference.fit(reference.eigenvalues(matrix))[0]
        assert abs(fit_power_law(values).alpha / expected - 1) > 1e-5


@pytest.mark.parametrize("setting", ["bf16 autocast", "tf32"])
def test_products_are_never_rounded(setting):
    weight = gaussian(300, 200)
    expected = fit_power_law(eigenvalues(weight)).alpha
    torch.set_float32_matmul_precision("medium" if setting == "tf32" else "highest")
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16 autocast"):
            for background in (False, True):
                row, _ = SpectralEngine().rows([weight], [10.0], "alpha", background=background)[0]
                assert row["alpha"] == pytest.approx(expected, rel=1e-5)
            with exact_products("cpu"):
                assert (weight @ weight.T).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == (
            "medium" if setting == "tf32" else "highest"
        )
    finally:
        torch.set_float32_matmul_precision("highest")


def test_gram_blocks_equal_the_product():
    matrix = gaussian(400, 300, dtype=torch.float64)
    assert torch.allclose(
        gram(matrix, 2.0, torch.float64).tril(), (matrix.T @ matrix / 4).tril(), rtol=1e-12
    )


def test_a_failing_batched_solver_does_not_poison(monkeypatch):
    def failing(grams):
        raise torch.linalg.LinAlgError("injected")

    solve = torch.linalg.eigvalsh
    monkeypatch.setattr(
        torch.linalg, "eigvalsh", lambda x: failing(x) if x.dim() == 3 else solve(x)
    )
    weights = [gaussian(100, 60, seed) for seed in range(3)]
    for weight, values in zip(
        weights,
        SpectralEngine().device_spectra(weights, 0.5, (torch.float32, torch.float64)),
        strict=True,
    ):
        assert fit_power_law(values).alpha == pytest.approx(
            reference.fit(reference.eigenvalues(weight))[0], rel=1e-5
        )


def test_the_scale_of_all_weights_needs_one_wait():
    weights = [gaussian(100, 60, seed) * 10.0**seed for seed in range(3)]
    weights.append(weights[0].bfloat16())
    assert largest_entries(weights) == [float(weight.abs().max()) for weight in weights]
    assert largest_entries([weights[0].double()]) == [float(weights[0].abs().max())]
    with pytest.raises(NoSpectrum, match="NaN or Inf"):
        to_matrices(torch.full((2, 2), math.nan))


def test_tasks_run_in_order_and_apart():
    def fail():
        raise KeyError("x")

    results = run_tasks(
        [lambda: 1, fail, lambda: threading.current_thread().name, lambda: torch.get_num_threads()],
        2,
        10.0,
    )
    assert results[0] == 1 and isinstance(results[1], KeyError)
    assert results[2] != threading.current_thread().name and results[3] == 1
    assert run_tasks([], 2, 1.0) == []


def test_a_hanging_task_holds_up_no_other():
    start = time.monotonic()
    results = run_tasks([lambda: time.sleep(60), *([lambda: 7] * 5)], 1, 0.5)
    assert isinstance(results[0], TimeoutError) and results[1:] == [7] * 5
    assert time.monotonic() - start < 10


def test_the_number_of_threads_is_left_alone():
    """This also holds after an analysis in the background: new threads inherit the number."""
    before = torch.get_num_threads()
    caller = threading.Thread(target=run_tasks, args=([lambda: time.sleep(0.01)] * 3, 1, 10.0))
    caller.start()
    caller.join()
    seen = []
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert seen == [before] == [torch.get_num_threads()]


def test_filter_zeros_reads_every_eigenvalue():
    """The filter counts eigenvalues above 1e-5, also in the half that alpha does not read."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(200, 120, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    weight = ((left * torch.linspace(10, 100, 120, dtype=torch.float64)) @ right.T).float()
    row, _ = SpectralEngine().rows([weight], [10.0], "alpha", filter_zeros=True)[0]
    values = reference.eigenvalues(weight)
    assert row["alpha"] == pytest.approx(reference.fit(values[values > 1e-5])[0], rel=1e-6)


def test_mixed_dtypes_of_one_shape_keep_their_precision():
    weights = [gaussian(100, 60), gaussian(100, 60, 1, torch.float64)]
    values = SpectralEngine().device_spectra(weights, 0.5, (torch.float32, torch.float64))[1]
    assert values.numpy() == pytest.approx(reference.eigenvalues(weights[1]), rel=1e-10)


def test_a_rank_whose_engine_fails_still_answers(monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    for lag in (0, 1):
        decay = AlphaDecay(model, 0.1, every=2, lag=lag)
        before = dict(decay.weight_decays)
        optimizer = torch.optim.SGD(decay.param_groups(), lr=0.1)
        with monkeypatch.context() as patch:
            patch.setattr(
                decay._engine,
                "rows",
                lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("injected")),
            )
            for _ in range(2 + lag):
                decay.step(optimizer)
        assert (
            decay.weight_decays == before
            and decay.history[-1]["reason"] == "the eigenvalue solver failed"
        )


def test_norms_of_wide_and_half_tensors():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = [gaussian(100, 60, seed, dtype) for seed in range(2)]
        expected = [float(t.double().norm()) for t in tensors]
        assert [float(n) for n in norms.tensor_norms(tensors)] == pytest.approx(expected, rel=1e-5)
        for tensor in tensors:
            tensor.grad = tensor.clone()
        assert norms.gradient_norms(tensors) == pytest.approx(expected, rel=1e-6)


# --------------------------------------------------------------------------- aspect-corrected alpha


def test_windows_cover_the_matrix():
    for shape in ((64, 64), (64, 150), (151, 50)):
        matrix = torch.arange(shape[0] * shape[1]).reshape(shape)
        windows = square_windows(matrix)
        assert {tuple(w.shape) for w in windows} == {(min(shape) // 2,) * 2}
        assert len(torch.cat([w.flatten() for w in windows]).unique()) == matrix.numel()


def test_farms_alpha_does_not_depend_on_the_shape():
    shapes = ((256, 256), (256, 688), (256, 1024))
    weights = [gaussian(*shape, seed) for seed, shape in enumerate(shapes)]
    plain = [row["alpha"] for row, _ in SpectralEngine().rows(weights, [10.0] * 3, "alpha")]
    farms = [
        row["alpha_farms"] for row, _ in SpectralEngine().rows(weights, [10.0] * 3, "alpha_farms")
    ]
    assert plain == pytest.approx(
        [2.12, 2.99, 3.41], rel=0.03
    )  # the spread of shapes that the windows take out
    assert max(farms) / min(farms) < 1.03
    pooled = (
        torch.cat([torch.linalg.svdvals(w.double()) ** 2 for w in square_windows(weights[1])])
        .sort()
        .values
    )
    assert farms[1] == pytest.approx(reference.fit(pooled.tolist())[0], rel=1e-5)


# --------------------------------------------------------------------- analyses beside the training


def training(lag, steps=12, resume_at=None):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
    decay = AlphaDecay(model, 0.1, every=4, lag=lag)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=1e-1)
    for step in range(1, steps + 1):
        model(
            torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        ).square().mean().backward()
        decay.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if step == resume_at:
            state = json.loads(json.dumps(decay.state_dict()))
            decay = AlphaDecay(model, 0.1, every=4, lag=lag)
            decay.load_state_dict(state)
    return model, decay


def test_asynchronous_decays_take_effect_after_the_lag():
    _, synchronous = training(0)
    _, asynchronous = training(3)
    assert sorted({r["step"] for r in synchronous.history}) == [0, 4, 8, 12]
    assert sorted({r["step"] for r in asynchronous.history}) == [0, 7, 11]
    first = {(r["module"]): r["alpha"] for r in synchronous.history if r["step"] == 4}
    later = {(r["module"]): r["alpha"] for r in asynchronous.history if r["step"] == 7}
    assert first == later  # of the weights at the launch, not of those at the landing


@pytest.mark.parametrize("resume_at", [3, 4, 5, 6, 7])
def test_resume_between_launch_and_landing_is_exact(resume_at):
    model, decay = training(3)
    other, resumed = training(3, resume_at=resume_at)
    assert resumed.weight_decays == decay.weight_decays
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_the_lag_is_below_every():
    with pytest.raises(ValueError, match="0 <= lag < every"):
        AlphaDecay(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))), 0.1, every=4, lag=4)


# -------------------------------------------------------------------------------------------- ranks


def on_ranks(what, folder):
    """What each of 2 ranks wrote, and their log."""
    done = fork_server.on_ranks("tests/support/ranks/sharded.py", what, folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)], done.stderr


@pytest.mark.slow
def test_sharded_weights_give_the_same_decays(tmp_path):
    results, _ = on_ranks("sharded", tmp_path)
    assert results[0] == results[1]
    for histories in results[0].values():
        assert [r["module"] for r in histories["whole"][:4]] == ["1", "2", "3", "4"]
        for whole, sharded in zip(histories["whole"], histories["sharded"], strict=True):
            assert (sharded["module"], sharded["step"]) == (whole["module"], whole["step"])
            assert sharded["weight_decay"] == pytest.approx(whole["weight_decay"], rel=1e-6)
            assert sharded["score"] == pytest.approx(whole["score"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, reason",
    [("raise", "solver failed"), ("nan", "solver failed"), ("hang", "did not end in time")],
)
def test_a_fault_on_one_rank_keeps_that_decay_everywhere(tmp_path, kind, reason):
    results, log = on_ranks(kind, tmp_path)
    assert results[0]["after"] == results[1]["after"]
    for result in results:
        assert result["after"]["3"] == result["before"]["3"]
        assert result["after"]["2"] != result["before"]["2"]
        assert reason in result["reasons"].pop("3") and set(result["reasons"].values()) == {None}
        assert result["seconds"] < 30
    assert log.count("3 keeps its weight decay") == 1


@pytest.mark.slow
def test_ranks_that_disagree_are_told(tmp_path):
    results, _ = on_ranks("disagree", tmp_path)
    assert (
        results[0] == results[1]
        and "the ranks do not agree on what to analyse: rank 0 has" in results[0]
    )


@pytest.mark.parametrize(
    "precision, dtypes",
    [("ieee", GRAM_DTYPES), ("tf32", GRAM_DTYPES[1:]), ("bf16", GRAM_DTYPES[1:])],
)
def test_a_background_analysis_computes_no_rounded_products(monkeypatch, precision, dtypes):
    """Training may round float32 products meanwhile, so the analysis uses float64 products."""
    used = []

    def recorded(weight, ignored_fraction, dtypes, windows):
        used.append(dtypes)
        return exact_eigenvalues(weight, ignored_fraction, dtypes, windows)

    monkeypatch.setattr(engine, "exact_eigenvalues", recorded)
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = precision
    try:
        SpectralEngine().rows([gaussian(60, 50)], [1.0], "alpha", background=True)
        assert setting.fp32_precision == precision
    finally:
        setting.fp32_precision = before
    assert used == [dtypes]


def test_few_large_weights_are_solved_at_once(monkeypatch):
    """The copies and the solver's matrices together stay within the budget."""
    weights = [gaussian(200, 100, seed) for seed in range(8)]
    # In float32 a weight takes two Gram matrices, and no copy because it has this dtype already.
    monkeypatch.setattr(engine, "CPU_BUDGET", 3 * 2 * 4 * 100**2)
    threads = []
    get_num_threads = torch.get_num_threads

    def recorded(tasks, count, timeout):
        threads.append(count)
        monkeypatch.setattr(torch, "get_num_threads", get_num_threads)  # run_tasks restores it
        return run_tasks(tasks, count, timeout)

    monkeypatch.setattr(engine, "run_tasks", recorded)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    SpectralEngine().rows(weights, [1.0] * 8, "alpha")
    assert threads == [3]


def test_only_what_a_metric_ignores_may_be_rounded():
    assert ignored_fraction_of("alpha") == 0.5
    assert ignored_fraction_of("spectral_norm") == 1
    assert ignored_fraction_of("entropy") == 0


def test_a_score_without_a_power_law_is_a_failure():
    """Equal eigenvalues have no exponent, but an entropy; zeros do not have that either."""
    values = torch.ones(64, dtype=torch.float64)
    failures = {m: spectral_row(values, 1.0, m)[1] for m in ("alpha", "alphahat", "entropy")}
    assert failures["alpha"] == failures["alphahat"] > 0 == failures["entropy"]
    assert "alpha is undefined" in FAILURES[failures["alphahat"]]
    assert math.isnan(spectral_entropy(torch.zeros(64, dtype=torch.float64)))


def test_a_weight_that_cannot_be_solved_holds_up_no_other():
    bad = torch.full((64, 64), math.nan)
    solved = SpectralEngine().device_spectra([bad, gaussian(64, 64, 0)], 0.5, (torch.float64,))
    assert isinstance(solved[0], Exception) and isinstance(solved[1], torch.Tensor)
