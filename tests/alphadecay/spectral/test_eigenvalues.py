import pytest
import torch

from alphadecay import eigenvalues, fit_power_law
from alphadecay.spectral.eigenvalues import FLOAT32_RANGE, FLOAT64_RANGE, is_precise_enough
from tests.support import reference
from tests.support.spectra import spectrum_matrix


@pytest.mark.parametrize("shape", [(60, 60), (200, 60), (60, 200), (70, 60, 3, 3), (64, 3, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_svd(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert eigenvalues(weight).numpy() == pytest.approx(reference.eigenvalues(weight), rel=1e-9)


def test_transpose_has_the_same_spectrum():
    weight = torch.randn(80, 50)
    torch.testing.assert_close(
        eigenvalues(weight), eigenvalues(weight.T.contiguous()), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("smallest", [1e-3, 1e-6, 1e-9, 1e-12])
def test_ill_conditioned(smallest):
    """Singular values over many decades: the upper half, which alpha reads, to 1e-8."""
    singular = torch.logspace(0, torch.tensor(smallest).log10(), 128, dtype=torch.float64)
    values = eigenvalues(spectrum_matrix(singular, rows=300))
    assert values[64:].numpy() == pytest.approx((singular.flip(0) ** 2)[64:].numpy(), rel=1e-8)


@pytest.mark.parametrize("rank", [1, 16, 48])
def test_rank_deficient(rank):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(96, rank, generator=generator, dtype=torch.float64)
    weight = left @ torch.randn(rank, 64, generator=generator, dtype=torch.float64)
    values = eigenvalues(weight)
    if rank < 32:  # the median is zero: what rounding left of the zeros is removed
        assert int((values == 0).sum()) == 64 - rank
        with pytest.raises(ValueError, match="median eigenvalue is zero"):
            fit_power_law(values)
    else:
        assert fit_power_law(values).alpha == pytest.approx(
            reference.fit(reference.eigenvalues(weight))[0], rel=1e-9
        )


def test_zeros_of_any_rank_are_exact():
    """Also where the median is far from zero, for the fits that read the whole spectrum."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(200, 120, generator=generator, dtype=torch.float64)
    values = eigenvalues(left @ torch.randn(120, 200, generator=generator, dtype=torch.float64))
    assert int((values == 0).sum()) == 80


def test_extreme_scales():
    weight = torch.randn(64, 80)
    alpha = fit_power_law(eigenvalues(weight)).alpha
    for scale in (1e-20, 1e20):
        assert fit_power_law(eigenvalues(weight * scale)).alpha == pytest.approx(alpha, rel=1e-5)


def test_zero_matrix():
    assert eigenvalues(torch.zeros(60, 50)).tolist() == [0.0] * 50


@pytest.mark.parametrize(
    "weight, message",
    [
        (torch.ones(3), r"neither \[out, in\] nor"),
        (torch.ones(4, 4, dtype=torch.int8), "not of a floating-point dtype"),
        (torch.ones(4, 4, dtype=torch.complex64), "not of a floating-point dtype"),
        (torch.ones(4, 4, device="meta"), "on the meta device, without values"),
        (torch.ones(0, 4), "empty"),
        (torch.full((4, 4), float("nan")), "NaN or Inf"),
        (torch.full((4, 4), float("inf")), "NaN or Inf"),
    ],
)
def test_bad_weights(weight, message):
    with pytest.raises(ValueError, match=message):
        eigenvalues(weight)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_narrow_dtypes_are_widened(dtype):
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(eigenvalues(weight), eigenvalues(weight.double()))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_weights_are_made_dense(layout):
    weight = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).relu()
    assert torch.equal(eigenvalues(weight.to_sparse(layout=layout)), eigenvalues(weight))


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, FLOAT32_RANGE), (torch.float64, FLOAT64_RANGE)]
)
def test_the_guard_looks_at_the_threshold_of_the_papers_convention(dtype, limit):
    """Of 8 eigenvalues that is the fourth, the largest one below the upper half."""
    precise = torch.tensor([0, 0, 0, 1, 1, 1, 1, limit], dtype=torch.float64)
    imprecise = torch.tensor([0, 0, 0, 0.9, 1, 1, 1, limit], dtype=torch.float64)
    assert is_precise_enough(torch.stack([precise, imprecise]), 0.5, dtype).tolist() == [
        True,
        False,
    ]
