"""State by parameter name, and tied weights."""

import torch
import torch.nn as nn
from torch.optim import Optimizer

from peft_pretraining.parallel.fsdp import local_shard_like


def state_dict_without_tied_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dictionary with a tied head left out: safetensors stores no tensor twice, and transformers ties it again."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(
        keep_vars=True
    ).items():  # not by address: a rank's part of a sharded tensor may be empty
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def optimizer_state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict]:
    """The optimizer's state keyed by parameter name, so that it does not depend on how the groups are cut."""
    return {
        name: dict(optimizer.state[p])
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def load_optimizer_state_by_name(
    model: nn.Module, optimizer: Optimizer, states: dict[str, dict]
) -> None:
    """The inverse of `optimizer_state_by_name`."""
    for name, parameter in model.named_parameters():
        if name in states:
            # In another --dtype the moments take the parameters'; the count of steps stays as it is.
            optimizer.state[parameter] = {
                key: local_shard_like(value, parameter).to(parameter.dtype)
                if value.dim()
                else value.to(parameter.device)
                for key, value in states[name].items()
            }
