"""Bit-identical results on a GPU, for --deterministic."""

import os

import torch


def use_deterministic_algorithms() -> None:
    """Let torch use algorithms whose results do not depend on the order of threads.

    Call it before the first computation on a GPU. On a CPU torch's algorithms are deterministic
    without it. Some are slower: cuBLAS gets a fixed workspace, sums over indices are sorted first,
    and cuDNN's attention, whose backward pass adds in any order, is not used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It helps debugging, and is slow. mypy does not know the attribute.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def use_deterministic_compilation() -> bool:
    """Forbid torch.compile to choose kernels by their time. Return False if torch is too old."""
    import torch._inductor.config as inductor  # takes a second to import

    if not hasattr(inductor, "deterministic"):
        return False
    inductor.deterministic = True
    return True
