"""Models of timm: names, initial weights, FLOPs, and the decays of AlphaDecay on them."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import alphadecay
from peft_pretraining.errors import UserError
from peft_pretraining.vision.models import build_model, current_name, forward_flops, load_weights
from tests.support.reference import balanced, decays, statistics
from tests.support.vision import arguments


def test_names_from_before_2021_and_unknown_names():
    assert current_name("vit_deit_tiny_patch16_224") == "deit_tiny_patch16_224"
    assert current_name("vit_deit_base_distilled_patch16_384") == "deit_base_distilled_patch16_384"
    assert all(timm.is_model(current_name(f"vit_{name}")) for name in timm.list_models("deit_*"))
    assert current_name("vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    with pytest.raises(UserError, match="did you mean deit_tiny_patch16_224"):
        build_model(arguments("--model", "diet_tiny_patch16_224"))
    with pytest.raises(UserError, match="cannot be built .*patch_sise"):
        build_model(arguments("--model_kwargs", "patch_sise=8"))


@pytest.mark.parametrize(
    "name",
    ["deit_tiny_patch16_224", "convnext_atto", pytest.param("resnet18", marks=pytest.mark.slow)],
)
def test_alpha_and_decays_agree_with_the_reference(name):
    torch.manual_seed(0)
    model = build_model(arguments("--model", name, "--input_size", 224))
    ours = alphadecay.AlphaDecay(model, 5e-6, 0.6666, 3.0)
    expected = {module: statistics(weight)["alpha"] for module, weight in balanced(model)}
    found = {row["module"]: row["alpha"] for row in ours.history}
    assert found == pytest.approx(expected, rel=1e-4)
    wanted = decays(list(expected.values()), 5e-6, "tb_linear_map", 0.6666, 3.0, None)
    assert list(ours.weight_decays.values()) == pytest.approx(wanted, rel=1e-4)


def test_flops():
    """DeiT-tiny needs 1.26 billion multiply-adds (Touvron et al. 2021).

    The expected number adds up its 12 blocks, the patch embedding and the head.
    """
    tokens, dim = 197, 192
    block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
    expected = 2 * (12 * block + 196 * dim * 3 * 16**2 + dim * 1000)
    model = timm.create_model("deit_tiny_patch16_224")
    assert forward_flops(model, 224) == expected == pytest.approx(2 * 1.26e9, rel=0.01)
    assert next(model.parameters()).device.type == "cpu"


# Two classifier layers as a tuple, in two ways; a parameter as the input of a layer; convolutions.
FAMILIES = {
    "deit_tiny_distilled_patch16_224": 224,
    "levit_128s": 224,
    "cait_xxs24_224": 224,
    "test_resnet": 64,
    "convnext_atto": 32,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_of_timm_is_built_trained_and_analysed(name):
    size = FAMILIES[name]
    args = ("--model", name, "--input_size", size, "--nb_classes", 10)
    torch.manual_seed(0)
    model = build_model(arguments(*args))
    assert forward_flops(model, size) > 0
    assert all(p.requires_grad for p in model.parameters())
    decay = alphadecay.AlphaDecay(model, 1e-5, every=1)
    optimizer = torch.optim.AdamW(decay.param_groups(), lr=1e-3)
    logits = model.train()(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 10)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])).backward()
    decay.step(optimizer)
    optimizer.step()
    analysed = [row for row in decay.history if row["step"] == 1]
    assert len(analysed) >= 2 and all(row["reason"] is None for row in analysed)


@pytest.mark.skipif(not timm.is_model("qwen3_vit_88m_enc"), reason="of a newer timm")
def test_an_encoder_without_a_classifier_is_refused():
    with pytest.raises(UserError, match="has no classifier layer, because timm has it as the enc"):
        with torch.device("meta"):
            build_model(arguments("--model", "qwen3_vit_88m_enc"))


def test_an_image_size_that_a_model_does_not_take_is_one_sentence():
    model = timm.create_model("test_vit")
    for size in (33, 0):
        with pytest.raises(UserError, match=f"images of {size} x {size} pixels: .*--input_size"):
            forward_flops(model, size)


def test_finetune(tmp_path):
    """Weights are found under a key and a prefix and loaded where they fit.

    A classifier for other classes keeps its initial weights; other misfits are refused.
    """
    saved = build_model(arguments("--model", "test_vit", "--nb_classes", 7))
    torch.save(
        {"model": {f"net.{k}": v for k, v in saved.state_dict().items()}, "epoch": 3},
        tmp_path / "a.pth",
    )
    model = build_model(
        arguments("--model", "test_vit", "--finetune", tmp_path / "a.pth", "--model_prefix", "net.")
    )
    for name, tensor in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(tensor, saved.state_dict()[name])
    assert model.head.out_features == 4
    save_file(
        {k: v for k, v in saved.state_dict().items() if k != "norm.weight"},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(UserError, match="norm.weight is missing"):
        load_weights(model, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"pos_embed has shape \(1, 5, 64\), not \(1, 17, 64\)"):
        load_weights(
            build_model(arguments("--model", "test_vit", "--input_size", 64)),
            write_weights(saved, tmp_path),
        )
    (tmp_path / "torn.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="torn.pth cannot be read"):
        load_weights(model, tmp_path / "torn.pth")


def write_weights(model, folder):
    save_file(model.state_dict(), folder / "whole.safetensors")
    return folder / "whole.safetensors"


def test_head_init_scale():
    torch.manual_seed(0)
    one = build_model(arguments("--model", "test_resnet"))
    torch.manual_seed(0)
    tenth = build_model(arguments("--model", "test_resnet", "--head_init_scale", 0.1))
    assert torch.equal(tenth.fc.weight, one.fc.weight * 0.1) and torch.equal(
        tenth.conv1[0].weight, one.conv1[0].weight
    )
