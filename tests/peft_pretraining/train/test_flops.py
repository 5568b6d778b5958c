"""FLOPs of LLaMA, and the peak FLOP/s of devices."""

import time

import pytest
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from peft_pretraining.model.modeling_llama import build_model, load_config
from peft_pretraining.train import flops
from peft_pretraining.train.flops import llama_flops, measured_flops, peak_flops

CPU = torch.device("cpu")


def test_flops_of_llama_60m_by_hand():
    """8 blocks of width 512 with MLPs of 1376, 32,000 words, rows of 256."""
    block = 4 * 512**2 + 3 * 512 * 1376
    assert block == 3_162_112
    matrices = 8 * block + 512 * 32_000
    assert matrices == 41_680_896
    assert (
        llama_flops(load_config("configs/llama_60m.json"), 256)
        == 6 * matrices + 12 * 8 * 512 * 256
        == 262_668_288
    )


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
def test_flops_are_those_that_torch_counts(changes):
    """The formula counts the products of a forward and a backward pass, and nothing else.

    Attention is computed as plain matrix products, which torch's counter sees.
    """
    sizes = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=None,
    )
    config = transformers.LlamaConfig(**sizes | changes)
    model = build_model(config)
    rows, length = 3, 16
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(rows, length, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == rows * length * llama_flops(config, length)


def test_peaks(monkeypatch):
    """The data sheet's rate is used for bfloat16 on known GPUs only; others are measured."""
    monkeypatch.setattr(flops, "measured_flops", lambda device, dtype: 1.0)
    for name, expected in (
        ("NVIDIA H100 80GB HBM3", (989e12, "H100 bf16 dense, data sheet")),
        ("NVIDIA H200", (989e12, "H200 bf16 dense, data sheet")),
        ("NVIDIA H100 PCIe", (756e12, "H100 PCIe bf16 dense, data sheet")),
        ("NVIDIA A100-SXM4-40GB", (312e12, "A100 bf16 dense, data sheet")),
        ("NVIDIA RTX A1000", (1.0, "measured matrix product")),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", (1.0, "measured matrix product")),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == expected
        assert peak_flops(torch.device("cuda", 0), torch.float32)[0] == 1.0
    assert peak_flops(CPU, torch.bfloat16) == (1.0, "measured matrix product")


def test_a_measured_peak_is_quick_and_draws_no_number(monkeypatch):
    """It counts 2 n^3 operations, in the dtype of the run.

    With products that do nothing but sleep for 0.03 s, the rate must follow from that time.
    """
    before, start = torch.random.get_rng_state(), time.perf_counter()
    assert measured_flops(CPU, torch.float32, 256) > 1e7
    assert time.perf_counter() - start < 2 and torch.equal(before, torch.random.get_rng_state())
    seen = []
    monkeypatch.setattr(
        torch, "mm", lambda left, right, out: (seen.append(left.dtype), time.sleep(0.03))
    )
    assert measured_flops(CPU, torch.bfloat16, 100, max_seconds=0.2) == pytest.approx(
        2e6 / 0.03, rel=0.3
    )
    assert set(seen) == {torch.bfloat16} and 4 <= len(seen) <= 7
