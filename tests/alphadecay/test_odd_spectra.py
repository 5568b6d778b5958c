"""One odd spectrum does not decide the decays of all modules."""

import logging

import pytest
import torch
import torch.nn as nn

from alphadecay import AlphaDecay, analyze
from alphadecay.assignment import squeezing_module
from alphadecay.constants import FIT_METHODS

EQUAL = "alpha is undefined: all eigenvalues of the tail are equal"


def network(odd=None, dtype=torch.float32, width=128):
    """Return a model of ordinary weights in four blocks, and one that `odd` has filled."""
    torch.manual_seed(0)
    model = nn.Module()
    model.first, model.last = nn.Linear(width, width), nn.Linear(width, width)
    shapes = ((width, width), (width, 3 * width))
    model.layers = nn.ModuleList(
        nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in shapes)) for _ in range(4)
    )
    for weight in model.layers.parameters():
        nn.init.normal_(weight, std=0.02)
    if odd is not None:
        odd(model.layers[1][0].weight)
    return model.to(dtype)


def orthogonal(weight):
    nn.init.orthogonal_(weight, gain=1.4)


def flipped_signs(weight):
    """A Hadamard matrix: orthogonal, all entries of one size."""
    h = torch.ones(1, 1)
    while len(h) < len(weight):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    weight.data.copy_(h / len(h) ** 0.5)


@pytest.mark.parametrize("method", FIT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("odd", [orthogonal, nn.init.eye_, flipped_signs])
def test_a_flat_spectrum_keeps_its_decay_and_the_others_have_theirs(odd, dtype, method, caplog):
    """Before, its alpha of thousands or millions gave every other module the least decay."""
    decay = AlphaDecay(network(odd, dtype), 1.0, fit_method=method)
    rows = {row["module"]: row for row in decay.history}
    flat = rows.pop("layers.1.0")
    assert (flat["alpha"], flat["weight_decay"], flat["reason"]) == (None, 1.0, EQUAL)
    decays = [row["weight_decay"] for row in rows.values()]
    assert (min(decays), max(decays)) == pytest.approx((0.6666, 3.0))
    assert len([d for d in decays if d > 0.7]) > 2
    assert caplog.messages == [f"update 0: layers.1.0 keeps its weight decay: {EQUAL}"]


@pytest.mark.parametrize("width", [64, 700])
def test_flatness_is_noticed_at_every_size(width):
    rows = analyze(network(orthogonal, width=width))
    assert [row["module"] for row in rows if row["reason"] == EQUAL] == ["layers.1.0"]


@pytest.mark.parametrize("method", FIT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [16, 80])
def test_low_rank_is_a_heavy_tail_and_ordinary_weights_are_defined(rank, dtype, method):
    def low_rank(weight):
        weight.data.copy_(torch.randn(128, rank) @ torch.randn(rank, 128) * 0.02)

    for odd in (None, low_rank):
        decay = AlphaDecay(network(odd, dtype), 1.0, fit_method=method)
        assert all(row["reason"] is None and row["alpha"] < 60 for row in decay.history)
    by_name = {row["module"]: row["alpha"] for row in decay.history}
    if method.startswith("median"):
        assert min(by_name, key=by_name.get) == "layers.1.0"


@pytest.mark.parametrize("updates", [1, 5])
def test_what_muon_makes_of_a_spectrum_is_not_flat(updates):
    """Its updates have singular values between about 0.7 and 1.2, which is not rounding."""
    model = network(nn.init.zeros_)
    weights = list(model.layers.parameters())
    optimizer = torch.optim.Muon(weights, lr=0.02, adjust_lr_fn="match_rms_adamw")
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    (row,) = [row for row in analyze(model) if row["module"] == "layers.1.0"]
    assert row["reason"] is None and 1 < row["alpha"] < 30


def test_an_outlier_is_named_once_with_the_map_that_it_does_not_affect(caplog):
    def nearly_flat(weight):
        nn.init.orthogonal_(weight)
        weight.data.add_(torch.randn(weight.shape) * 1e-4)

    decay = AlphaDecay(network(nearly_flat), 1.0, every=1)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=0.0)
    decay.step(optimizer)
    (message,) = caplog.messages
    assert message.startswith("update 0: the alpha of layers.1.0, ")
    assert message.endswith(
        "lies so far from the others that their decays lie within 5 % of the range; the map "
        "tb_quantile is not affected by an outlier"
    )
    caplog.clear()
    AlphaDecay(network(nearly_flat), 1.0, mapping="tb_quantile")
    AlphaDecay(network(), 1.0)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "decays, expected",
    [
        ([1, 1.09, 1.05, 1.02, 3.0], 4),
        ([3.0, 2.95, 0.6, 2.97, 2.99], 2),
        ([1, 1.2, 1.05, 1.02, 3.0], None),
        ([1, 1, 1, 1, 1], None),
        ([1, 1, 1, 3], None),
        ([], None),
    ],
)
def test_which_decay_squeezes_the_others(decays, expected):
    assert squeezing_module(torch.tensor(decays, dtype=torch.float64)) == expected


@pytest.mark.parametrize(
    "weight, reason",
    [
        (torch.ones(60, 60, dtype=torch.int8), "the weight is not of a floating-point dtype"),
        (torch.empty(60, 0), "the weight is empty"),
        (torch.empty(60, 60, device="meta"), "the weight is on the meta device, without values"),
        (torch.full((60, 60), float("nan")), "the weight holds NaN or Inf"),
        (torch.randn(60, 60).to_sparse(), None),
        (torch.randn(60, 60).to(torch.float8_e4m3fn), None),
    ],
)
def test_the_reason_names_what_is_wrong_with_a_weight(weight, reason, caplog):
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60))
    model[1].weight = nn.Parameter(weight, requires_grad=False)
    caplog.set_level(logging.INFO)
    first, second = analyze(model)
    assert first["reason"] is None and second["reason"] == reason
    assert (second["alpha"] is None) == (reason is not None)
    assert caplog.messages == []


def test_a_model_on_the_meta_device_is_one_line(caplog):
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(60, 60) for _ in range(4)))
    assert {row["reason"] for row in analyze(model)} == {
        "the weight is on the meta device, without values"
    }
    assert set(AlphaDecay(model, 0.1).weight_decays.values()) == {0.1}
    assert caplog.messages == [
        "update 0: every one of the 2 modules keeps its weight decay: the weight is on the meta "
        "device, without values"
    ]
