"""Load a checkpoint into a model, its optimizer and the random number generators."""

import hashlib
import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.optim import Optimizer

from peft_pretraining.checkpoint.format import (
    CONFIG,
    EXTRA,
    MANIFEST,
    OPTIMIZER,
    RANDOM,
    TRAINER,
    WEIGHTS,
)
from peft_pretraining.checkpoint.random_state import restore_random_states, seed_random_generators
from peft_pretraining.checkpoint.state import (
    load_optimizer_state_by_name,
    state_dict_without_tied_weights,
)
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.fsdp import is_fsdp, local_shard_like
from peft_pretraining.parallel.process_group import DistributedContext

# Fields of a transformers config that determine which weights a LLaMA has and what it computes.
COMPARED_CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)

UNREADABLE_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    EOFError,
    KeyError,
    SafetensorError,
    pickle.UnpicklingError,
)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    ranks: DistributedContext,
    config: dict[str, Any] | None = None,
    extra: dict[str, nn.Module] | None = None,
) -> dict[str, Any]:
    """Load weights, optimizer state and random states from a checkpoint.

    A rank that took no part in saving the checkpoint gets random states that are derived from
    those of rank 0 and from its own number.

    Args:
        folder: A checkpoint that `find_checkpoint` returned, which has verified its files.
        model: Gets the weights. If it is sharded, each rank reads only its shards.
        optimizer: Gets the optimizer state.
        ranks: All processes of the run.
        config: Fields that must have the same values in the saved config.json. By default, the
            fields of `model.config` that determine the shapes of a LLaMA and what it computes.
        extra: Further modules to load, by name; see `Checkpoints.save`.

    Returns:
        The `trainer` dictionary that was given to `Checkpoints.save`.

    Raises:
        UserError: A file cannot be read any more, or the checkpoint is of another model.
    """
    extra = extra or {}
    for name in extra:
        if not (folder / EXTRA.format(name)).exists():
            raise UserError(
                f"{folder} has no weights of {name}, because it was trained without it: "
                "give the flags it was trained with"
            )
    try:
        trainer = json.loads((folder / TRAINER).read_text(encoding="utf8"))
        saved_config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        has_own_states = RANDOM.format(ranks.rank) in manifest
        randoms = torch.load(
            folder / RANDOM.format(ranks.rank if has_own_states else 0), weights_only=True
        )
        weights, states = _read_tensors(folder, model, ranks.device)
        extra_weights = {name: load_file(folder / EXTRA.format(name)) for name in extra}
    except UNREADABLE_ERRORS as error:
        # Only the first sentence: torch goes on with the advice to load the file unsafely.
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise UserError(
            f"{folder} cannot be read any more ({reason}): continue from another checkpoint"
        ) from error
    _check_config(folder, saved_config, config or _compared_fields(model))
    _load_weights(folder, model, weights)
    for name, module in extra.items():
        module.load_state_dict(extra_weights[name])
    load_optimizer_state_by_name(model, optimizer, states)
    if has_own_states:
        restore_random_states(randoms, ranks.device)
    else:
        main_state = randoms["torch"].numpy().tobytes()
        digest = hashlib.sha256(main_state + str(ranks.rank).encode()).digest()
        seed_random_generators(int.from_bytes(digest[:8], "big"))
    return trainer


def _read_tensors(
    folder: Path, model: nn.Module, device: torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Return weights, cut into this rank's shards, and optimizer state, by parameter name.

    For a sharded model the files are mapped into memory, so that whole tensors are never on a
    device.
    """
    sharded = is_fsdp(model)
    device = torch.device("cpu") if sharded else device
    states = torch.load(folder / OPTIMIZER, map_location=device, weights_only=True, mmap=sharded)
    current = model.state_dict()
    with safe_open(folder / WEIGHTS, "pt", str(device)) as file:
        weights = {
            name: local_shard_like(file.get_tensor(name), current.get(name)) for name in file.keys()
        }
    return weights, states


def _load_weights(folder: Path, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.state_dict()) - set(state_dict_without_tied_weights(model))
    if mismatched := sorted({*unexpected, *missing} - tied):
        raise UserError(
            f"{folder} does not fit the model: {mismatched[0]} is in only one of them; "
            "give the --model_config it was trained with"
        )


def _compared_fields(model: nn.Module) -> dict[str, Any]:
    config = model.config.to_dict()
    return {key: config.get(key) for key in COMPARED_CONFIG_FIELDS}


def _check_config(folder: Path, saved: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, value in expected.items():
        if saved.get(key) != value:
            raise UserError(
                f"{folder} was trained with {key} {saved.get(key)}, but the model config says "
                f"{value}: give the model it was trained with, or do not continue from it"
            )
