"""Models of timm: creation (also by names from before 2021), initial weights, FLOPs."""

from __future__ import annotations

import argparse
import copy
import difflib
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peft_pretraining.errors import UserError

# ------------------------------------------------------------------------------------- creation


def current_name(name: str) -> str:
    """Return timm's present name of a model: until 2021 DeiT was called `vit_deit_...`."""
    return name.removeprefix("vit_") if name.startswith("vit_deit_") else name


def build_model(args: argparse.Namespace) -> nn.Module:
    """Return the classifier that the flags name, with fresh weights or those of --finetune.

    Args:
        args: parsed flags of main_vit.py.

    Raises:
        UserError: if timm has no model of that name (the message suggests similar names), or cannot
            build it with these flags.
    """
    import timm

    name = current_name(args.model)
    if not timm.is_model(name):
        similar = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = "timm.list_models() returns all of them"
        if similar:
            hint = f"did you mean {' or '.join(similar)}?"
        raise UserError(f"--model {args.model} is no model of timm {timm.__version__}: {hint}")
    stochastic_depth = {"drop_path_rate": args.drop_path} if args.drop_path else {}
    try:
        model = timm.create_model(
            name, num_classes=args.nb_classes, **model_arguments(args), **stochastic_depth
        )
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"--model {name} cannot be built with these --model_kwargs, --input_size and "
            f"--drop_path: {error}"
        ) from error
    if not callable(getattr(model, "get_classifier", None)):
        raise UserError(
            f"--model {name} has no classifier layer, because timm has it as the encoder of other "
            "models; give the name of an image classifier"
        )
    with torch.no_grad():
        for layer in _classifiers_of(model):
            for parameter in layer.parameters():
                parameter.mul_(args.head_init_scale)
    if args.finetune:
        load_weights(model, Path(args.finetune), args.model_key, args.model_prefix)
    return model


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments with which timm builds the model again.

    They are --model_kwargs, and the image size if the shapes of the weights depend on it.

    Args:
        args: parsed flags of main_vit.py.
    """
    import timm

    default = timm.get_pretrained_cfg(current_name(args.model))
    size_matters = (
        default is not None
        and default.fixed_input_size
        and default.input_size[-1] != args.input_size
    )
    return ({"img_size": args.input_size} if size_matters else {}) | dict(args.model_kwargs)


def load_weights(
    model: nn.Module, path: Path, keys: str = "model|module", prefix: str = ""
) -> None:
    """Load the weights of a file into the model.

    A classifier layer for another number of classes keeps its fresh weights.

    Args:
        model: the model to change.
        path: a .safetensors or .pth file.
        keys: names, separated by |, under one of which the file may hold the weights.
        prefix: only weights whose names start with it count; it is removed from the names.

    Raises:
        UserError: if the file cannot be read, or a weight outside the classifier is missing or has
            another shape.
    """
    from loguru import logger

    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in _read_weights(path, keys).items()
        if name.startswith(prefix)
    }
    classifier = {
        id(parameter) for layer in _classifiers_of(model) for parameter in layer.parameters()
    }
    fresh = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        loaded = weights.get(name)
        if loaded is not None and loaded.shape == tensor.shape:
            continue
        if id(tensor) not in classifier:
            problem = "is missing"
            if loaded is not None:
                problem = f"has shape {tuple(loaded.shape)}, not {tuple(tensor.shape)}"
            raise UserError(
                f"{path} does not fit the model: {name} {problem}; give the --model and "
                "--input_size that it was trained with"
            )
        weights.pop(name, None)
        fresh.append(name)
    unused = model.load_state_dict(weights, strict=False).unexpected_keys
    logger.info(
        f"weights loaded from {path}; kept at their initial values: {', '.join(fresh) or 'none'}; "
        f"not used: {', '.join(unused) or 'none'}"
    )


def _read_weights(path: Path, keys: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: dict[str, Any] = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): give a .safetensors or .pth file of weights"
        ) from error
    for key in keys.split("|"):
        if isinstance(content.get(key), dict):
            return content[key]
    return content


def _classifiers_of(model: Any) -> tuple[nn.Module, ...]:
    """Return the layers of a model of timm that compute logits.

    Distilled models have two, whose mean is the output in training and evaluation: without a
    teacher, timm does not distil.
    """
    found = model.get_classifier()
    return tuple(found) if isinstance(found, tuple | list | nn.ModuleList) else (found,)


# ------------------------------------------------------------------------------------------ cost


def forward_flops(model: nn.Module, input_size: int) -> int:
    """Return the floating-point operations of one image's forward pass.

    Counts the multiplications and additions of all matrix products and convolutions.

    Args:
        model: the model; it is not changed.
        input_size: pixels of an image's side.

    Raises:
        UserError: the model does not take images of that size.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # The counter looks for the gradient function of each tensor that a layer takes, and there is
    # none without gradients: CaiT and others give their parameters to layers.
    shapes_only = copy.deepcopy(model).to("meta").eval().requires_grad_(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shapes_only(torch.empty(1, 3, input_size, input_size, device="meta"))
    except Exception as error:  # models check the size in many ways, or not at all
        raise UserError(
            f"the model cannot be run on images of {input_size} x {input_size} pixels: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; give another "
            "--input_size, or the one that the model was made for"
        ) from error
    return counter.get_total_flops()
