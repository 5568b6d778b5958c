"""The implementations of the output layer's loss, compared with the plain one."""

import pytest
import torch
import torch.nn as nn
import transformers

from peft_pretraining.errors import UserError
from peft_pretraining.model import linear_cross_entropy
from peft_pretraining.model.linear_cross_entropy import (
    LOSSES,
    Chunked,
    _ChunkedLoss,
    _compiled_softmax_minus_one_hot,
    _softmax_minus_one_hot,
    _softmax_of_whole_rows,
    _whole_rows_compiled,
    plain_loss,
    resolve_loss,
)
from peft_pretraining.model.modeling_llama import build_model, target_positions

FAST = [
    name
    for name in LOSSES
    if name not in ("plain", "liger")
    and (name != "torch" or hasattr(torch.nn, "LinearCrossEntropyOptions"))
]


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    """Chunks of 7 tokens and slices of 3, for 101 words."""
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 7 * 4 * 101)
    monkeypatch.setattr(linear_cross_entropy, "SLICE_BYTES", 3 * 4 * 101)


def inputs(n=24, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (scale * torch.randn(size, 16, generator=generator) for size in (n, 101))
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    return hidden, weight, torch.randint(101, (n,), generator=generator)


def results(loss, hidden, weight, targets, factor=0.25):
    value = loss(hidden, weight, targets)
    return value, *torch.autograd.grad(value * factor, (hidden, weight))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("n", [1, 7, 24])
@pytest.mark.parametrize(
    "scale", [1e-3, 1.0, 8.0]
)  # 8: logits in the hundreds, exponentials that would overflow
def test_value_and_gradients_beside_the_plain_loss(name, n, scale):
    ours, theirs = (results(loss, *inputs(n, scale)) for loss in (LOSSES[name](), plain_loss))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        noise = 2e-6 * max(
            1.0, scale**2 / 4
        )  # the products' own rounding, which is absolute in the logits
        torch.testing.assert_close(a, b, rtol=noise, atol=noise * float(b.detach().abs().max()))


@pytest.mark.parametrize("name", FAST)
def test_no_target_at_all(name):
    value, of_hidden, of_weight = results(LOSSES[name](), *inputs(0))
    assert (
        value == 0
        and of_hidden.shape == (0, 16)
        and of_weight.shape == (101, 16)
        and not of_weight.any()
    )


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(autocast):
    """The error beside float32 is not larger than that of the plain loss.

    The parameters are bfloat16, or float32 under autocast.
    """
    with torch.autocast("cpu", enabled=False):
        exact = results(plain_loss, *inputs())
    given = inputs(dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = (results(loss, *given) for loss in (LOSSES["chunked"](), plain_loss))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - c).norm() <= 1.2 * (b - c).norm() + 1e-6 * c.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_what_is_compiled_equals_its_plain_twin(dtype, with_gradients):
    """For any number of tokens by one graph, and for the training and the evaluation one each."""
    counters = torch._dynamo.utils.counters["stats"]
    for n in (5, 24, 300):
        generator = torch.Generator().manual_seed(n)
        logits = (5 * torch.randn(n, 101, generator=generator)).to(dtype)
        targets = torch.randint(101, (n, 1), generator=generator)
        plain, fast, ours = logits.clone(), logits.clone(), logits.clone()
        expected = _softmax_minus_one_hot(plain, targets, with_gradients)
        for tensor in (fast, targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        before = counters["unique_graphs"]
        found = _whole_rows_compiled()(fast, targets, with_gradients)
        assert counters["unique_graphs"] - before <= (n == 5)
        written = _softmax_of_whole_rows(ours, targets, with_gradients)
        for results, of_logits in ((found, fast), (written, ours)):
            torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)
            if with_gradients:
                # bfloat16: a last bit may differ where the float32 numbers differ by rounding.
                close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
                torch.testing.assert_close(of_logits, plain, **close)
            else:
                assert torch.equal(of_logits, logits)


def test_compilation_reaches_the_loss(monkeypatch):
    """A GPU gets the compiled kernel, a CPU keeps the code that fits its cache."""
    calls = []
    monkeypatch.setattr(
        linear_cross_entropy, "_whole_rows_compiled", lambda: lambda *given: calls.append(given)
    )
    config = {"vocab_size": 101, "hidden_size": 16, "intermediate_size": 24}
    model = build_model(
        transformers.LlamaConfig(**config, num_hidden_layers=1, num_attention_heads=2)
    )
    model.compile_blocks()
    rows = model.loss._softmax_minus_one_hot
    assert rows is _compiled_softmax_minus_one_hot
    for device, count in (("cpu", 0), ("meta", 1)):
        logits, targets = torch.zeros(3, 101, device=device), torch.ones(3, 1, device=device).long()
        rows(logits, targets, True)
        assert len(calls) == count
    rows(logits[:1], targets[:1], True)
    assert len(calls) == 1


def test_nothing_is_kept_without_gradients():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        value = LOSSES["chunked"]()(hidden, weight, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, plain_loss(hidden, weight, targets).detach())


def test_it_goes_backward_once():
    value = LOSSES["chunked"]()(*inputs())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="--loss plain"):
        value.backward()


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_a_model_add_up(tied):
    """Two micro-batches, one with padding and a sequence without a target.

    The output layer may be tied to the embedding.
    """
    config = {
        "vocab_size": 101,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    model = build_model(
        transformers.LlamaConfig(**config, pad_token_id=None, tie_word_embeddings=tied)
    )
    ids = torch.randint(101, (2, 3, 9))
    labels = ids.clone()
    labels[0, 1, 4:] = labels[1, 2] = -100
    gradients = []
    for name in ("chunked", "plain"):
        model.set_loss(name)
        for micro_batch in zip(ids, labels, strict=True):
            (model(*micro_batch) / 7).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_target_positions():
    labels = torch.tensor([[5, 6, -100, 7], [5, -100, -100, -100]])
    assert target_positions(labels).tolist() == [0, 2]


# --------------------------------------------------------------------------------------- the choice


def test_what_the_flag_means():
    """Equal runs get equal losses, on every device: nothing is measured."""
    for device in (torch.device("cpu"), torch.device("cuda")):
        assert resolve_loss("auto", device) == "chunked"
        # That of the run that is continued:
        assert resolve_loss("auto", device, loss_of_checkpoint="torch") == "torch"
        assert resolve_loss("plain", device, loss_of_checkpoint="torch") == "plain"
    with pytest.raises(
        UserError, match="--loss liger: Liger's kernel needs a CUDA device; or leave --loss out"
    ):
        resolve_loss("liger", torch.device("cpu"))


@pytest.mark.parametrize("n", [0, 1, 300])
def test_the_branch_of_other_devices(n):
    """Tensors on the meta device take the branch of a GPU, also for a batch without a target."""
    hidden = torch.empty(n, 16, device="meta", requires_grad=True)
    weight = torch.empty(101, 16, device="meta", requires_grad=True)
    targets = torch.empty(n, dtype=torch.long, device="meta")
    buffer = Chunked()._logits_buffer(hidden, weight)
    # Not called through `Chunked`, because autocast knows no meta device.
    loss = _ChunkedLoss.apply(hidden, weight, targets, buffer, _softmax_minus_one_hot, True)
    loss.backward()
    assert loss.shape == () and hidden.grad.shape == (n, 16) and weight.grad.shape == (101, 16)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", [*FAST, "liger"])
def test_on_a_gpu(name):
    if linear_cross_entropy._unavailable_reason(name, torch.device("cuda")):
        pytest.skip("not installed")
    given = [
        nn.Parameter(x.detach().cuda()) if x.is_floating_point() else x.cuda() for x in inputs()
    ]
    for a, b in zip(results(LOSSES[name](), *given), results(plain_loss, *given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
