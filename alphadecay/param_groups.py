"""Split and check the parameter groups of an optimizer."""

import torch.nn as nn
from torch.optim import Optimizer

from alphadecay.modules import hidden_weights


def sub_group(group: dict, names: list[str | None], name: str | None) -> dict:
    """The part of an optimizer's group whose parameters go by `name`; `names` is parallel to its parameters."""
    chosen = [i for i, n in enumerate(names) if n == name]
    part = group | {"params": [group["params"][i] for i in chosen], "module": name}
    if (
        "param_names" in group
    ):  # torch's optimizers over named parameters keep this parallel to params
        part["param_names"] = [group["param_names"][i] for i in chosen]
    return part


def check_has_weight_decay(optimizer: Optimizer) -> None:
    if "weight_decay" not in optimizer.defaults:
        raise ValueError(
            f"{type(optimizer).__name__} has no weight decay: use an optimizer that has, such as AdamW"
        )


def split_hidden(groups: list[dict], model: nn.Module) -> list[dict]:
    """Parameter groups cut in two: `hidden` True: weights of all layers but the output layer (see `hidden_weights`); False: the rest."""
    hidden = {id(weight) for weight in hidden_weights(model)}
    split = []
    for group in groups:
        for kind in (True, False):
            parameters = [p for p in group["params"] if (id(p) in hidden) == kind]
            if parameters:
                split.append(group | {"params": parameters, "hidden": kind})
    return split
