"""Image classifiers: timm's models by today's and yesterday's names, what they cost, and how they are kept."""

from __future__ import annotations

import argparse
import copy
import difflib
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file

from peft_pretraining.errors import UserError

# ------------------------------------------------------------------------------------------------------------------ making one


def current_name(name: str) -> str:
    """Today's name of a model of timm: until 2021 DeiT was `vit_deit_...`."""
    return name.removeprefix("vit_") if name.startswith("vit_deit_") else name


def build_model(args: argparse.Namespace) -> nn.Module:
    """The classifier that the flags name, with fresh weights or those of --finetune. UserError for an unknown name, with near ones."""
    import timm

    name = current_name(args.model)
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has them all"
        raise UserError(f"--model {args.model} is no model of timm {timm.__version__}: {hint}")
    stochastic_depth = {"drop_path_rate": args.drop_path} if args.drop_path else {}
    try:
        model = timm.create_model(
            name, num_classes=args.nb_classes, **model_arguments(args), **stochastic_depth
        )
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"--model {name} cannot be built with these --model_kwargs, --input_size and --drop_path: {error}"
        ) from error
    with torch.no_grad():
        for parameter in model.get_classifier().parameters():
            parameter.mul_(args.head_init_scale)
    if args.finetune:
        load_weights(model, Path(args.finetune), args.model_key, args.model_prefix)
    return model


def model_arguments(args: argparse.Namespace) -> dict:
    """What timm must be told to build the model again: --model_kwargs, and the input size where the model's shapes depend on it."""
    import timm

    usual = timm.get_pretrained_cfg(current_name(args.model))
    fixed = usual is not None and usual.fixed_input_size and usual.input_size[-1] != args.input_size
    return ({"img_size": args.input_size} if fixed else {}) | dict(args.model_kwargs)


def load_weights(
    model: nn.Module, path: Path, keys: str = "model|module", prefix: str = ""
) -> None:
    """Load the weights of a file where they fit; a classifier of another number of classes keeps its fresh ones.

    keys: names, separated by |, under one of which the file may hold the weights; prefix: of the names that count.
    Raises UserError where the file cannot be read, or a weight outside the classifier has another shape or is missing.
    """
    from loguru import logger

    try:
        found = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give a .safetensors or .pth file of weights"
        ) from error
    found = next((found[key] for key in keys.split("|") if isinstance(found.get(key), dict)), found)
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in found.items()
        if name.startswith(prefix)
    }
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}
    fresh = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in found and found[name].shape == tensor.shape:
            continue
        if id(tensor) not in classifier:
            what = (
                f"has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
                if name in found
                else "is missing"
            )
            raise UserError(
                f"{path} does not fit the model: {name} {what}; give the --model and --input_size that it was trained with"
            )
        found.pop(name, None)
        fresh.append(name)
    unused = model.load_state_dict(found, strict=False).unexpected_keys
    logger.info(
        f"weights from {path}; fresh: {', '.join(fresh) or 'none'}; not used: {', '.join(unused) or 'none'}"
    )


# ------------------------------------------------------------------------------------------------------------- what it costs


def forward_flops(model: nn.Module, input_size: int) -> int:
    """Floating-point operations of one image's forward pass: products and sums of all matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    shapes_only = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes_only(torch.empty(1, 3, input_size, input_size, device="meta"))
    return counter.get_total_flops()
