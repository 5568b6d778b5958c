"""LLaMA, compared with transformers' implementation."""

import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers

from peft_pretraining.data.sequences import packed_batch
from peft_pretraining.errors import UserError
from peft_pretraining.model.modeling_llama import build_model, load_config

BASE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def config_of(**changes):
    return transformers.LlamaConfig(**BASE | {"pad_token_id": None, **changes})


def batch(pads=True, rows=3, length=20):
    ids = torch.randint(2, 256, (rows, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    if pads:
        for row, real in enumerate((20, 7, 1)):
            ids[row, real:] = 0
            labels[row, real:] = -100
    return ids, labels


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}])
def test_the_model_of_transformers_is_not_asked_for_packed_sequences(changes, monkeypatch):
    """The host would wait for a GPU in every pass. The logits stay those of transformers."""
    torch.manual_seed(0)
    ours = build_model(config_of(**changes), use_hf_model=True)
    theirs = transformers.LlamaForCausalLM(config_of(**changes))
    theirs.load_state_dict(ours.state_dict())
    ids, _ = batch()
    expected = theirs(ids).logits
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", pytest.fail)
    assert torch.equal(ours(ids), expected)
    assert not any("attn" in key for key in ours.config.to_dict())


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"rope_theta": 5e5}],
)
def test_logits_are_those_of_transformers(changes):
    torch.manual_seed(0)
    ours = build_model(config_of(**changes))
    with torch.no_grad():  # larger than at initialisation, so that every part matters
        for parameter in ours.parameters():
            parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(
                torch.randn_like(parameter) * 0.3
            )
    theirs = transformers.LlamaForCausalLM(config_of(**changes))
    theirs.load_state_dict(ours.state_dict())
    ids, labels = batch()
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    mask = labels != -100
    masked = theirs(ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(
        ours(ids)[mask], masked[mask], rtol=1e-5, atol=1e-5
    )  # right pads reach no real token
    mean = theirs(ids, labels=labels).loss
    torch.testing.assert_close(
        ours(ids, labels), mean * (labels[:, 1:] != -100).sum(), rtol=1e-5, atol=1e-5
    )


def test_gradients_are_those_of_transformers():
    torch.manual_seed(0)
    ours = build_model(config_of())
    theirs = build_model(config_of(), use_hf_model=True)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model(*batch()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    model = build_model(config_of())
    model(*batch()).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(*batch()).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True))


def test_loss_beside_the_plain_sum():
    model = build_model(config_of())
    ids, labels = batch()
    logits = model(ids)
    plain = sum(
        F.cross_entropy(logits[r, t], labels[r, t + 1])
        for r in range(3)
        for t in range(19)
        if labels[r, t + 1] != -100
    )
    torch.testing.assert_close(model(ids, labels), plain)
    assert model(ids, torch.full_like(labels, -100)).item() == 0.0


def test_initial_weights():
    torch.manual_seed(0)
    for use_hf_model in (False, True):
        model = build_model(load_config("configs/llama_9m.json"), use_hf_model)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert (parameter == 1).all()
            else:
                assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.03), name
        assert (
            float(model.model.embed_tokens.weight[31999].detach().norm()) > 0
        )  # pad_token_id -1 would freeze it at zero


@pytest.mark.parametrize(
    "size, millions",
    [
        ("9m", 9.0),
        ("20m", 19.5),
        ("60m", 58.1),
        ("130m", 134.1),
        ("350m", 368.0),
        ("1b", 1339.1),
        ("7b", 6738.4),
    ],
)
def test_published_sizes(size, millions):
    with torch.device("meta"):
        model = build_model(load_config(f"configs/llama_{size}.json"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu"}, {"attention_bias": True}, {"head_dim": 32}]
)
def test_unsupported_models_are_refused(changes):
    with pytest.raises(UserError, match="add --use_hf_model"):
        build_model(config_of(**changes))


# --------------------------------------------------------------------------------- packed documents


def test_attention_within_documents():
    """A packed row gives each document the loss that it has alone."""
    torch.manual_seed(0)
    model = build_model(config_of())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    documents = [torch.randint(2, 256, (length,)) for length in (7, 1, 12)]
    documents = [torch.cat([d, torch.tensor([1])]) for d in documents]  # 1 ends a document
    alone = sum(model(d[None], d[None]) for d in documents)
    packed = packed_batch(torch.cat(documents)[None].numpy(), end_of_document=1)
    across = model(**packed)
    model.confine_attention(1)
    torch.testing.assert_close(model(**packed), alone)
    assert abs(float(across.detach() / alone.detach()) - 1) > 1e-3
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(model(**packed), alone)


# ---------------------------------------------------------------------------------- compiled blocks


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("end", [None, 1])
def test_compiled_blocks(end):
    """Compilation changes no number and no name, and one graph serves all blocks and steps."""
    from torch._dynamo.utils import counters

    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = build_model(config_of(num_hidden_layers=3))
        if end is not None:
            model.confine_attention(end)
        if compiled:
            model.compile_blocks()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses, graphs = [], []
        for step in range(4):
            ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(step))
            losses.append(model(ids, ids))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
            graphs.append(counters["stats"]["unique_graphs"])
        results.append(
            (
                torch.stack(losses).detach(),
                list(model.state_dict()),
                [n for n, _ in model.named_modules()],
            )
        )
    assert graphs == [1] * 4 and not counters["graph_break"]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    assert results[1][1:] == results[0][1:]
