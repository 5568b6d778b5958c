"""Weights and optimizer state as dictionaries by parameter name."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.parallel.fsdp import local_shard_like


def state_dict_without_tied_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dictionary with each tied weight listed once, under its first name.

    safetensors refuses to store a tensor twice. transformers ties the weights again when it loads.
    """
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Compare objects, not memory addresses: the local shard of a sharded tensor may be empty.
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def optimizer_state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer state by parameter name, so that parameter groups do not matter."""
    return {
        name: dict(optimizer.state[p])
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def load_optimizer_state_by_name(
    model: nn.Module, optimizer: Optimizer, states: dict[str, dict[str, Tensor]]
) -> None:
    """Load what `optimizer_state_by_name` returned into an optimizer.

    The moments are converted to the dtype of the parameter, which differs if --dtype changed. The
    step count, a scalar, keeps its dtype.

    Args:
        model: The model whose parameters the optimizer holds.
        optimizer: Gets the state. Parameters that are not in `states` keep what they have.
        states: State by parameter name; whole tensors, of which a sharded model takes its shards.
    """
    for name, parameter in model.named_parameters():
        if name in states:
            optimizer.state[parameter] = {
                key: _like_parameter(value, parameter) for key, value in states[name].items()
            }


def _like_parameter(value: Tensor, parameter: torch.nn.Parameter) -> Tensor:
    if value.dim() == 0:
        return value.to(parameter.device)
    return local_shard_like(value, parameter).to(parameter.dtype)
