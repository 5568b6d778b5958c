"""Floating-point operations: of training LLaMA on a token, and the peak rate of devices."""

import re
import statistics
import time

import torch

from peft_pretraining.model.config import LlamaConfig

# Peak rate in FLOP/s of dense bfloat16 matrix products, from NVIDIA's data sheets. The first name
# that is a part of the device's name counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
# The backward pass of a matrix product computes two products of the same size: the gradient of
# either factor.
BACKWARD_TO_FORWARD_RATIO = 2

# --------------------------------------------------------------------------- operations of a model


def llama_flops(config: LlamaConfig, length: int) -> int:
    """Return the floating-point operations of training LLaMA on one token: 6 N + 12 L d S.

    N is the number of weights in the matrices that a token is multiplied by: all but the embedding,
    and the output layer even if it is tied to the embedding. L is the number of blocks, d the
    number of heads times their width, S the sequence length. A multiplication and the addition
    after it count as 2, the backward pass as two forward passes. Recomputation by activation
    checkpointing does not count, and attention counts as if it were not causal. The formula is that
    of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) and of nanoGPT, which include the
    output layer too.

    Args:
        config: sizes of the model.
        length: tokens in a sequence.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = config.head_dim or hidden // heads
    kv_heads = config.num_key_value_heads or heads
    # q and o, then k and v
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    block = attention + 3 * hidden * config.intermediate_size
    matrices = config.num_hidden_layers * block + hidden * config.vocab_size
    return 6 * matrices + 12 * config.num_hidden_layers * heads * head_dim * length


# -------------------------------------------------------------------------- peak rate of a device


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak rate of one device in FLOP/s, and where the number comes from.

    It is that of the data sheet for bfloat16 on a GPU of `PEAK_FLOPS`. Otherwise a matrix product
    is measured, with the threads of this process.

    Args:
        device: the device.
        dtype: of the matrix products.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    # A MIG slice of a GPU has a fraction of the data sheet's rate.
    if dtype == torch.bfloat16 and "MIG" not in name:
        for gpu, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{gpu}\b", name):
                return flops, f"{gpu} bf16 dense, data sheet"
    return measured_flops(device, dtype), "measured matrix product"


def measured_flops(
    device: torch.device, dtype: torch.dtype, size: int | None = None, max_seconds: float = 0.1
) -> float:
    """Measure the rate of a product of two square matrices in FLOP/s.

    The rate is the median of 3 to 9 products, after one to warm up. No number is drawn from the
    global random state.

    Args:
        device: where to measure.
        dtype: of the matrices.
        size: number of rows (default: 1024 on a CPU and 4096 elsewhere, which takes 0.02 s on a
            device of 0.1 or 5 TFLOP/s).
        max_seconds: after this time no product is started, except for the first three.
    """
    size = size or (1024 if device.type == "cpu" else 4096)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds: list[float] = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 3 and sum(seconds) > max_seconds:
            break
    return 2 * size**3 / statistics.median(seconds[1:])
