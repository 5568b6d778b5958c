"""Split and check the parameter groups of an optimizer."""

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from torch.optim import Optimizer

from alphadecay.modules import hidden_weights


def sub_group(
    group: dict[str, Any], names: Sequence[str | None], name: str | None
) -> dict[str, Any]:
    """Return the subset of a parameter group that belongs to module `name`.

    Args:
        group: a group of an optimizer.
        names: module name of each parameter in `group["params"]`; None for those without one.
        name: the module whose parameters are wanted; None for those that belong to no module.

    Returns:
        A new group with all options of `group`, and `module` set to `name`.
    """
    chosen = [i for i, n in enumerate(names) if n == name]
    part = group | {"params": [group["params"][i] for i in chosen], "module": name}
    if "param_names" in group:  # optimizers over named_parameters() keep it parallel to params
        part["param_names"] = [group["param_names"][i] for i in chosen]
    return part


def check_has_weight_decay(optimizer: Optimizer) -> None:
    """Check that the optimizer has a weight decay at all.

    Raises:
        ValueError: it has none.
    """
    if "weight_decay" not in optimizer.defaults:
        raise ValueError(
            f"{type(optimizer).__name__} has no weight decay: use an optimizer that has one, "
            "such as AdamW"
        )


def split_hidden(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Split parameter groups into hidden weights and all other parameters.

    AdamC and Muon treat hidden weights differently. They are the weights of all layers except the
    output layer, see `alphadecay.modules.hidden_weights`.

    Args:
        groups: parameter groups, each with `params`.
        model: the model whose parameters they hold.

    Returns:
        The groups with all their options, each split in two where it holds both kinds, and with
        `hidden` True or False.
    """
    hidden = {id(weight) for weight in hidden_weights(model)}
    split = []
    for group in groups:
        for kind in (True, False):
            parameters = [p for p in group["params"] if (id(p) in hidden) == kind]
            if parameters:
                split.append(group | {"params": parameters, "hidden": kind})
    return split
