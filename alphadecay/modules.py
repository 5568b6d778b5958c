"""Which modules are balanced, and their names, types and blocks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

import torch.nn as nn

from alphadecay.constants import BATCHNORM_TYPES, SCOPES

MIN_EIGENVALUES = 50  # a shorter spectrum is too short to fit a tail (the published threshold)
SOLVER_COST = 5.0  # measured on a CPU with one thread: 3 to 8 for n from 64 to 2048, in float32
# A block is the first numbered container in a module's name. Hierarchical models number stages and,
# inside a stage, blocks.
_BLOCK = re.compile(r"((?:^|.*?\.)\d+(?:\.(?:blocks|layers)\.\d+)?)\.")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


@dataclass(frozen=True)
class BalancedModule:
    """A module whose weight has a spectrum.

    Attributes:
        name: its name in `named_modules()`, without the parts that wrappers add.
        type: the last part of its name that is not a number, such as `q_proj`.
        block: the name of the block that contains it, such as `model.layers.0`; None outside
            blocks.
        module: the module.
    """

    name: str
    type: str
    block: str | None
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The weight: [out, in], or [out, in, kh, kw] of a convolution."""
        return cast(nn.Parameter, self.module.weight)

    @property
    def n_eigenvalues(self) -> int:
        """Length of the spectrum: min(out, in), times kh * kw for a convolution."""
        out, fan_in, *kernel = self.weight.shape
        return min(out, fan_in) * prod(kernel)

    @property
    def cost(self) -> float:
        """Work of one analysis, in multiply-adds of its Gram matrix.

        The eigensolver of an n x n matrix counts as `SOLVER_COST` * n^3 of them.
        """
        out, fan_in, *kernel = self.weight.shape
        small, large = sorted((out, fan_in))
        return prod(kernel) * (large * small**2 + SOLVER_COST * small**3)


def clean_name(name: str) -> str:
    """Return a module's or parameter's name without the parts that torch's wrappers insert.

    The wrappers are those of torch.compile, activation checkpointing and FSDP1.
    """
    return _WRAPPERS.sub(r"", name).lstrip(".")


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel or torch.compile's wrapper.

    The wrappers may be nested in any order.
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def block_of(name: str) -> str | None:
    """Return the name of the numbered block that contains a module, None if there is none.

    For `model.layers.3.mlp.up_proj` it is `model.layers.3`.
    """
    match = _BLOCK.match(name)
    return match.group(1) if match else None


def spectral_modules(model: nn.Module) -> list[BalancedModule]:
    """Return every module whose weight has a spectrum, in `named_modules()` order.

    These are nn.Linear, nn.Conv2d and transformers' Conv1D. A weight that several modules share
    counts once. Weights behind a parametrisation (weight_norm) and packed weights, such as
    MultiheadAttention's `in_proj_weight`, are left out.

    Raises:
        ValueError: a weight has lost its shape (FSDP1, ZeRO-3).
    """
    found: dict[int, BalancedModule] = {}
    for name, module in unwrap(model).named_modules():
        if _has_spectrum(module):
            name = clean_name(name)
            weight = cast(nn.Parameter, module.weight)
            if weight.dim() not in (2, 4):
                raise ValueError(
                    f"{name}.weight is flattened (FSDP1, ZeRO-3): shard the model with "
                    "fully_shard, which keeps the shape"
                )
            kind = next(
                (part for part in reversed(name.split(".")) if not part.isdigit()),
                type(module).__name__,
            )
            found.setdefault(id(weight), BalancedModule(name, kind, block_of(name), module))
    return list(found.values())


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all `spectral_modules` except the last one, the output layer.

    A weight that is shared with an embedding is left out.
    """
    embeddings = _embedding_ids(model)
    return [m.weight for m in spectral_modules(model)[:-1] if id(m.weight) not in embeddings]


def balanced_modules(
    model: nn.Module,
    scope: str = "reference",
    remove_first: bool = True,
    remove_last: bool = True,
    min_eigenvalues: int = MIN_EIGENVALUES,
) -> list[BalancedModule]:
    """Return the modules that get a weight decay of their own.

    Frozen modules, and weights shared with an embedding (a tied head), are left out.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are unwrapped.
        scope: `reference`: all `spectral_modules` except the first and the last of the list.
            `all_blocks`: every module inside a numbered block, which excludes embedding, head and
            patch embedding.
        remove_first: for `reference`: leave the first module out.
        remove_last: for `reference`: leave the last module out.
        min_eigenvalues: modules with fewer eigenvalues are left out.

    Raises:
        ValueError: unknown scope, or a weight that has lost its shape.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    modules = spectral_modules(model)
    if scope == "all_blocks":
        modules = [m for m in modules if m.block is not None]
    else:
        modules = modules[int(remove_first) : len(modules) - int(remove_last)]
    embeddings = _embedding_ids(model)
    return [
        m
        for m in modules
        if m.weight.requires_grad
        and m.n_eigenvalues >= min_eigenvalues
        and id(m.weight) not in embeddings
    ]


def batchnorm_followers(
    model: nn.Module, balanced: Sequence[BalancedModule], kind: str = "name"
) -> dict[str, list[nn.Module]]:
    """Return the BatchNorm2d modules that take the decay of each balanced module.

    Args:
        model: the model that contains them.
        balanced: its balanced modules.
        kind: `name`: the batch norm whose name is the convolution's with `bn` for `conv`.
            `align`: every batch norm takes the decay of the nearest balanced module before it.

    Returns:
        Name of a balanced module -> its batch norms. Modules without one are not listed.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in BATCHNORM_TYPES:
        raise ValueError(
            f"unknown batchnorm_type {kind!r}: choose one of {', '.join(BATCHNORM_TYPES)}"
        )
    names = {m.name for m in balanced}
    followers: dict[str, list[nn.Module]] = {}
    previous = None
    for name, module in unwrap(model).named_modules():
        name = clean_name(name)
        previous = name if name in names else previous
        if isinstance(module, nn.BatchNorm2d):
            leader = name.replace("bn", "conv") if kind == "name" else previous
            if leader is not None and leader in names:
                followers.setdefault(leader, []).append(module)
    return followers


def _embedding_ids(model: nn.Module) -> set[int]:
    """Return the ids of all embedding weights."""
    return {id(m.weight) for m in unwrap(model).modules() if isinstance(m, nn.Embedding)}


def _has_spectrum(module: nn.Module) -> bool:
    """Return True for a linear layer or convolution with a weight of its own."""
    # transformers' Conv1D is recognised by name, because this package does not import transformers.
    is_conv1d = type(module).__name__ == "Conv1D" and type(module).__module__.startswith(
        "transformers."
    )
    # A parametrised weight (weight_norm) is not a parameter of the optimizer, and a lazy one has
    # no values yet.
    weight = module._parameters.get("weight")
    has_values = weight is not None and not nn.parameter.is_lazy(weight)
    return has_values and (isinstance(module, (nn.Linear, nn.Conv2d)) or is_conv1d)
