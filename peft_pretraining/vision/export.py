"""Write the best model as a folder that timm reads."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch.nn as nn
from safetensors.torch import save_file

from peft_pretraining.checkpoint.format import WEIGHTS
from peft_pretraining.checkpoint.state import state_dict_without_tied_weights
from peft_pretraining.vision.models import current_name, model_arguments
from peft_pretraining.vision.transforms import evaluation_crop, normalisation

# ---------------------------------------------------------------------------------------------------------- how it is kept


def timm_config(args: argparse.Namespace, model: nn.Module) -> dict:
    """config.json as on the Hugging Face Hub: `timm.create_model("local-dir:FOLDER", pretrained=True)` reads the folder."""
    statistics = {name: list(values) for name, values in normalisation(args).items()}
    classifier = {key: model.pretrained_cfg.get(key) for key in ("first_conv", "classifier")}
    return {
        "architecture": current_name(args.model),
        "num_classes": args.nb_classes,
        "num_features": model.num_features,
        "model_args": model_arguments(args),
        "pretrained_cfg": {
            "num_classes": args.nb_classes,
            "input_size": [3, args.input_size, args.input_size],
            "fixed_input_size": bool(model.pretrained_cfg.get("fixed_input_size")),
            "interpolation": "bicubic",
            "crop_pct": evaluation_crop(args),
            **statistics,
            **classifier,
        },
    }


def export(model: nn.Module, config: dict, accuracy: dict, folder: Path) -> None:
    """Write a model that timm loads to `folder`: weights, config.json, and what it reaches. The folder is replaced as a whole."""
    building, before = (folder.with_name(folder.name + ending) for ending in (".tmp", ".old"))
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    weights = {
        name: tensor.contiguous() for name, tensor in state_dict_without_tied_weights(model).items()
    }
    save_file(weights, building / WEIGHTS, metadata={"format": "pt"})
    for name, content in (("config.json", config), ("accuracy.json", accuracy)):
        (building / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    building.rename(folder)
    shutil.rmtree(before, ignore_errors=True)
