"""Which modules are balanced; their names, types and blocks."""

import re
from dataclasses import dataclass
from math import prod

import torch.nn as nn
from torch import Tensor

SCOPES = ("reference", "all_blocks")
BATCHNORM_TYPES = ("name", "align")
MIN_EIGENVALUES = 50  # a shorter spectrum has no tail to speak of (the reference's threshold)
SOLVER_COST = 5.0  # measured on a CPU with one thread: 3 to 8 for n from 64 to 2048, in float32
# A block is the first numbered container on the way to the module; hierarchical models number stages and blocks in them.
_BLOCK = re.compile(r"((?:^|.*?\.)\d+(?:\.(?:blocks|layers)\.\d+)?)\.")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


@dataclass(frozen=True)
class BalancedModule:
    """A module whose weight has a spectrum. name: as in `named_modules()`; type: its last part that is not a number
    (`q_proj`); block: the name of the block that holds it (`model.layers.0`), None outside blocks."""

    name: str
    type: str
    block: str | None
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def n_eigenvalues(self) -> int:
        out, fan_in, *kernel = self.weight.shape
        return min(out, fan_in) * prod(kernel)

    @property
    def cost(self) -> float:
        """Work of one analysis in multiply-adds of its Gram matrix; the eigensolver is as slow as n^3 of them times `SOLVER_COST`."""
        out, fan_in, *kernel = self.weight.shape
        small, large = sorted((out, fan_in))
        return prod(kernel) * (large * small**2 + SOLVER_COST * small**3)


def clean_name(name: str) -> str:
    """A module's or parameter's name without the parts that torch's wrappers (compile, checkpointing) put in."""
    return _WRAPPERS.sub(r"", name).lstrip(".")


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or torch.compile's wrapper, in any order."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def block_of(name: str) -> str | None:
    """`model.layers.3.mlp.up_proj` -> `model.layers.3`; None for a module outside any numbered block."""
    match = _BLOCK.match(name)
    return match.group(1) if match else None


def spectral_modules(model: nn.Module) -> list[BalancedModule]:
    """Every nn.Linear, nn.Conv2d and transformers' Conv1D in `named_modules()` order, a shared weight once.

    Not among them: weights behind a parametrisation (weight_norm), and packed ones such as MultiheadAttention's `in_proj_weight`.
    """
    found: dict[int, BalancedModule] = {}
    for name, module in unwrap(model).named_modules():
        if _has_spectrum(module):
            name = clean_name(name)
            if module.weight.dim() not in (2, 4):
                raise ValueError(
                    f"{name}.weight is flattened (FSDP1, ZeRO-3): shard with fully_shard, which keeps its shape"
                )
            kind = next(
                (part for part in reversed(name.split(".")) if not part.isdigit()),
                type(module).__name__,
            )
            found.setdefault(id(module.weight), BalancedModule(name, kind, block_of(name), module))
    return list(found.values())


def hidden_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of every layer of `spectral_modules` but the last, the output layer; never an embedding that a layer shares."""
    embeddings = _embeddings(model)
    return [m.weight for m in spectral_modules(model)[:-1] if id(m.weight) not in embeddings]


def balanced_modules(
    model: nn.Module,
    scope: str = "reference",
    remove_first: bool = True,
    remove_last: bool = True,
    min_eigenvalues: int = MIN_EIGENVALUES,
) -> list[BalancedModule]:
    """The modules that get a decay of their own.

    Args:
        scope: `reference`: all of `spectral_modules` but the first and the last of the list (each as its flag says);
            `all_blocks`: every module inside a numbered block, never embedding, head or patch embedding.
        min_eigenvalues: modules with fewer are left out.

    Frozen modules are left out in both. Raises ValueError for an unknown scope.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: choose one of {', '.join(SCOPES)}")
    modules = spectral_modules(model)
    if scope == "all_blocks":
        modules = [m for m in modules if m.block is not None]
    else:
        modules = modules[int(remove_first) : len(modules) - int(remove_last)]
    embeddings = _embeddings(model)  # a tied head is one
    return [
        m
        for m in modules
        if m.weight.requires_grad
        and m.n_eigenvalues >= min_eigenvalues
        and id(m.weight) not in embeddings
    ]


def batchnorm_followers(
    model: nn.Module, balanced: list[BalancedModule], kind: str = "name"
) -> dict[str, list[nn.Module]]:
    """For each balanced module the BatchNorm2d modules that take its decay.

    kind: `name`: the batch norm whose name is the convolution's with `bn` for `conv`; `align`: every batch norm follows
    the nearest balanced module before it.
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
            if leader in names:
                followers.setdefault(leader, []).append(module)
    return followers


def _embeddings(model: nn.Module) -> set[int]:
    return {id(m.weight) for m in unwrap(model).modules() if isinstance(m, nn.Embedding)}


def _has_spectrum(module: nn.Module) -> bool:
    # transformers' Conv1D is known by its name: this package does not import transformers.
    conv1d = type(module).__name__ == "Conv1D" and type(module).__module__.startswith(
        "transformers."
    )
    # A parametrised weight (weight_norm) is no parameter of the optimizer, and a lazy one has no values yet.
    weight = module._parameters.get("weight")
    known = weight is not None and not nn.parameter.is_lazy(weight)
    return known and (isinstance(module, (nn.Linear, nn.Conv2d)) or conv1d)
