import pytest
import timm
import torch
import torch.nn as nn
import transformers

from alphadecay.modules import balanced_modules, batchnorm_followers, block_of, clean_name


def small_llama(**more):
    shape = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
    )
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **more))


@pytest.mark.parametrize(
    "name, block",
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3"),
        ("blocks.11.attn.qkv", "blocks.11"),
        ("layer1.0.conv1", "layer1.0"),
        ("stages.2.blocks.1.mlp.fc1", "stages.2.blocks.1"),
        ("layers.0.blocks.1.attn.qkv", "layers.0.blocks.1"),
        ("patch_embed.proj", None),
        ("stem.0", None),
        ("lm_head", None),
    ],
)
def test_block_of(name, block):
    assert block_of(name) == block


def test_reference_scope_drops_the_first_and_the_last():
    names = [m.name for m in balanced_modules(small_llama())]
    assert len(names) == 13
    assert (
        names[0] == "model.layers.0.self_attn.k_proj"
        and names[-1] == "model.layers.1.mlp.down_proj"
    )
    both = [m.name for m in balanced_modules(small_llama(), remove_first=False, remove_last=False)]
    assert both == ["model.layers.0.self_attn.q_proj", *names, "lm_head"]


def test_all_blocks_scope():
    names = [m.name for m in balanced_modules(small_llama(), "all_blocks")]
    assert len(names) == 14 and "lm_head" not in names and names[0].endswith("q_proj")
    vit = [
        m.name for m in balanced_modules(timm.create_model("vit_tiny_patch16_224"), "all_blocks")
    ]
    assert len(vit) == 48 and all(n.startswith("blocks.") for n in vit)


def test_types():
    assert {m.type for m in balanced_modules(small_llama())} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_short_spectra_and_frozen_modules_are_dropped():
    model = nn.Sequential(*(nn.Linear(n, n) for n in (64, 49, 50, 64, 64)))
    model[3].requires_grad_(False)
    assert [m.name for m in balanced_modules(model)] == ["2"]
    assert [m.name for m in balanced_modules(model, min_eigenvalues=0)] == ["1", "2"]


def test_tied_weights_are_balanced_once():
    model = small_llama(tie_word_embeddings=True)
    assert [m.name for m in balanced_modules(model, remove_first=False, remove_last=False)][
        -1
    ].endswith("down_proj")
    shared = nn.Linear(64, 64)
    twin = nn.Linear(64, 64)
    twin.weight = shared.weight
    assert [
        m.name
        for m in balanced_modules(
            nn.Sequential(shared, twin), remove_first=False, remove_last=False
        )
    ] == ["0"]


def test_conv1d_of_transformers():
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=100, n_positions=32)
    types = [
        m.type for m in balanced_modules(transformers.GPT2LMHeadModel(config), remove_first=False)
    ]
    assert types == ["c_attn", "c_proj", "c_fc", "c_proj"]


def test_wrappers_leave_names_alone():
    model = small_llama()
    plain = [m.name for m in balanced_modules(model)]
    assert [m.name for m in balanced_modules(torch.compile(model))] == plain
    assert [m.name for m in balanced_modules(nn.DataParallel(model))] == plain
    assert clean_name("_orig_mod.model.layers.0._checkpoint_wrapped_module.q") == "model.layers.0.q"


def test_wrappers_in_any_order():
    model = small_llama()
    plain = [m.name for m in balanced_modules(model)]
    assert [
        m.name for m in balanced_modules(torch.compile(nn.DataParallel(torch.compile(model))))
    ] == plain


def test_weights_that_are_no_parameters_are_left_out():
    normed = [nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)) for _ in range(3)]
    model = nn.Sequential(*normed, nn.LazyLinear(64), *(nn.Linear(64, 64) for _ in range(3)))
    assert [m.name for m in balanced_modules(model)] == ["5"]


def test_batchnorm_followers():
    model = timm.create_model("resnet18")
    names = {name: module for name, module in model.named_modules()}
    balanced = balanced_modules(model)
    by_name = batchnorm_followers(model, balanced, "name")
    assert by_name["layer2.0.conv1"] == [names["layer2.0.bn1"]]
    assert "layer2.0.downsample.0" not in by_name  # its batch norm is called downsample.1
    assert batchnorm_followers(model, balanced, "align")["layer2.0.downsample.0"] == [
        names["layer2.0.downsample.1"]
    ]


def test_unknown_choices():
    with pytest.raises(
        ValueError, match="unknown scope 'blocks': choose one of reference, all_blocks"
    ):
        balanced_modules(small_llama(), "blocks")
    with pytest.raises(ValueError, match="unknown batchnorm_type"):
        batchnorm_followers(small_llama(), [], "near")
