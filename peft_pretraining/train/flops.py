"""Floating-point operations: of a LLaMA's token, and the peak rate of devices."""

import re
import statistics
import time

import torch
from transformers import PretrainedConfig

# Floating-point operations a second of dense bfloat16 matrix products, from NVIDIA's data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
BACKWARD_TO_FORWARD_RATIO = 2  # forward passes that a backward pass costs: a gradient for each of the two factors of every product

# --------------------------------------------------------------------------------------------------- what there is to compute


def llama_flops(config: PretrainedConfig, length: int) -> int:
    """Floating-point operations of training LLaMA on one token of a row of `length` tokens: 6 N + 12 L d S.

    N: entries of the matrices that a token is multiplied with, so all but the embeddings, the head among them (a tied one too); L blocks,
    d = heads x size of a head, S = length. A multiplication with its addition counts as 2, a backward pass as two forward passes; what
    activation checkpointing computes again does not count, and attention counts as if it were not causal: the formula of PaLM
    (Chowdhery et al. 2022, appendix B) and nanoGPT, which keep the head too.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head  # q and o, k and v
    block = attention + 3 * hidden * config.intermediate_size
    matrices = config.num_hidden_layers * block + hidden * config.vocab_size
    return 6 * matrices + 12 * config.num_hidden_layers * heads * head * length


# ------------------------------------------------------------------------------------------------ what a device can compute


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Floating-point operations a second of one device, and where the number is from.

    That of the data sheet, for bfloat16 on a GPU of `PEAK_FLOPS`; else that of a matrix product, measured with this process's threads.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if dtype == torch.bfloat16 and "MIG" not in name:  # a part of a GPU has no data sheet
        for gpu, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{gpu}\b", name):
                return flops, f"{gpu} bf16 dense, data sheet"
    return measured_flops(device, dtype), "measured matrix product"


def measured_flops(
    device: torch.device, dtype: torch.dtype, size: int | None = None, most_seconds: float = 0.5
) -> float:
    """Floating-point operations a second of a product of two square matrices, the median of 3 to 9 of them.

    size: of the matrices (default: 1024 on a CPU, 4096 elsewhere, 0.02 s where a device makes 0.1 or 5 TFLOP/s). After `most_seconds` no
    product is begun but the third. Draws from no global random state.
    """
    size = size or (1024 if device.type == "cpu" else 4096)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = []
    for _ in range(10):  # the first to warm up
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 3 and sum(seconds) > most_seconds:
            break
    return 2 * size**3 / statistics.median(seconds[1:])
