"""alphadecay on whole models beside the plain twin of tests/support/reference.py."""

import pytest
import timm
import torch
import transformers

import alphadecay
from alphadecay.assignment import MAPS, assign_decays
from alphadecay.balancer import AlphaDecay
from alphadecay.modules import balanced_modules
from alphadecay.norms import gradient_norms
from alphadecay.spectral.engine import SpectralEngine
from alphadecay.spectral.statistics import COLUMNS
from tests.support import reference

TOLERANCE = 1e-6  # relative; gradients' norms are summed in float32, all else in float64


def llama_60m():
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_json_file("configs/llama_60m.json")
    config.pad_token_id = None
    return transformers.LlamaForCausalLM(config)


def heavy_tailed(model):
    """Add low-rank matrices whose singular values follow a power law, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for index, module in enumerate(balanced_modules(model)):
            out, fan_in = module.weight.shape
            rank = min(out, fan_in) // 3
            scale = torch.arange(1, rank + 1) ** -(0.5 + 0.05 * (index % 10))
            left = torch.randn(out, rank, generator=generator) / out**0.5
            right = torch.randn(rank, fan_in, generator=generator) / fan_in**0.5
            module.weight.add_(3 * (left * scale) @ right)
    return model


MODELS = {
    "llama_60m": llama_60m,
    "llama_60m heavy-tailed": lambda: heavy_tailed(llama_60m()),
    "vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224"),
    "resnet18": lambda: timm.create_model("resnet18"),
}


FAST = "vit_tiny"  # the plain twin takes seconds for the other models


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in MODELS],
)
def case(request):
    """A model with gradients, and the plain twin's names, statistics and eigenvalues."""
    torch.manual_seed(2)
    model = MODELS[request.param]()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    names = [name for name, _ in reference.balanced(model)]
    spectra = {name: reference.eigenvalues(weight) for name, weight in reference.balanced(model)}
    plain = {
        name: reference.statistics(weight, weight.grad, values=spectra[name])
        for name, weight in reference.balanced(model)
    }
    return model, names, plain, spectra


def test_statistics_agree(case):
    model, names, plain, _ = case
    modules = balanced_modules(model)
    assert [m.name for m in modules] == names
    weights = [m.weight for m in modules]
    # As AlphaDecay asks for them (float32 where that is enough for alpha, no entropy), and all of
    # them precisely.
    for whole, tolerance in ((False, 1e-5), (True, TOLERANCE)):
        rows = SpectralEngine().rows(weights, gradient_norms(weights), "alpha", whole=whole)
        for module, (row, failure) in zip(modules, rows, strict=True):
            assert failure == 0 and list(row) == list(COLUMNS)
            computed = {k: v for k, v in plain[module.name].items() if whole or k != "entropy"}
            assert {k: row[k] for k in computed} == pytest.approx(computed, rel=tolerance), (
                module.name
            )


@pytest.mark.parametrize("mapping", MAPS)
@pytest.mark.parametrize("metric", ["alpha", "alphahat", "entropy"])
def test_decays_agree(case, mapping, metric):
    model, names, plain, _ = case
    scores = [plain[name][metric] for name in names]
    blocks = [m.block for m in balanced_modules(model)]
    for positive in (True, False):
        arguments = (
            torch.tensor(scores, dtype=torch.float64),
            1e-5,
            mapping,
            0.6666,
            3,
            positive,
            blocks,
        )
        expected = reference.decays(
            scores if positive else reference.reverse(scores), 1e-5, mapping, 0.6666, 3, blocks
        )
        if min(expected) < 0:  # log2 of scores on both sides of 1
            with pytest.raises(ValueError, match="tb_log2 gives no decay"):
                assign_decays(*arguments)
        else:
            assert assign_decays(*arguments).tolist() == pytest.approx(expected, rel=TOLERANCE)


def test_balancer_agrees(case):
    """The whole way: model -> parameter groups."""
    model, names, plain, _ = case
    decay = AlphaDecay(model, 0.1, 0.6666, 5)
    expected = reference.decays(
        [plain[n]["alpha"] for n in names], 0.1, "tb_linear_map", 0.6666, 5, None
    )
    assert decay.weight_decays == pytest.approx(dict(zip(names, expected, strict=True)), rel=1e-4)
    groups = {g["module"]: g["weight_decay"] for g in decay.param_groups()}
    assert groups == {None: 0.1} | decay.weight_decays


@pytest.mark.parametrize("method", alphadecay.FIT_METHODS)
def test_fits_pick_the_same_threshold(case, method):
    """Every fit on a few modules of each model: the twin's loops take seconds for each."""
    model, _, _, spectra = case
    modules = balanced_modules(model)
    for module in {m.type: m for m in modules if m.n_eigenvalues <= 800}.values():
        alpha, D, threshold = reference.fit(spectra[module.name], method)
        law = alphadecay.fit_power_law(alphadecay.eigenvalues(module.weight), method)
        assert law.xmin == pytest.approx(threshold, rel=TOLERANCE), module.name
        assert (law.alpha, law.D) == pytest.approx((alpha, D), rel=1e-6), module.name
