"""Export the best model as a folder that timm reads."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

import torch.nn as nn
from safetensors.torch import save_file

from peft_pretraining.checkpoint.format import WEIGHTS
from peft_pretraining.checkpoint.state import state_dict_without_tied_weights
from peft_pretraining.utils.files import atomic_directory
from peft_pretraining.vision.models import current_name, model_arguments
from peft_pretraining.vision.transforms import evaluation_crop, normalisation


def timm_config(args: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """Return config.json in the format of the Hugging Face Hub.

    `timm.create_model("local-dir:FOLDER", pretrained=True)` reads a folder that holds it.

    Args:
        args: parsed flags of main_vit.py.
        model: the model of timm that these flags build.
    """
    pretrained = cast(dict[str, Any], model.pretrained_cfg)  # timm sets it
    statistics = {name: list(values) for name, values in normalisation(args).items()}
    return {
        "architecture": current_name(args.model),
        "num_classes": args.nb_classes,
        "num_features": model.num_features,
        "model_args": model_arguments(args),
        "pretrained_cfg": {
            "num_classes": args.nb_classes,
            "input_size": [3, args.input_size, args.input_size],
            "fixed_input_size": bool(pretrained.get("fixed_input_size")),
            "interpolation": "bicubic",
            "crop_pct": evaluation_crop(args),
            **statistics,
            "first_conv": pretrained.get("first_conv"),
            "classifier": pretrained.get("classifier"),
        },
    }


def export(model: nn.Module, config: dict, accuracy: dict, folder: Path) -> None:
    """Write weights, config.json and accuracy.json to a folder that timm loads.

    The new folder is complete before it replaces an older one.

    Args:
        model: the model to write.
        config: see `timm_config`.
        accuracy: what the model reaches on the validation images.
        folder: where to write; an existing folder is replaced.
    """
    weights = {
        name: tensor.contiguous() for name, tensor in state_dict_without_tied_weights(model).items()
    }
    with atomic_directory(folder) as temporary:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        for name, content in (("config.json", config), ("accuracy.json", accuracy)):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")
