"""Checkpoints: everything that decides the future of a run, written whole or not at all, verified before it is loaded.

model_<step>/
    config.json, model.safetensors, tokenizer files     transformers' format: AutoModelForCausalLM.from_pretrained reads it
    training_state/optimizer.pt                          state by parameter name
    training_state/trainer.json                          step, tokens, decays, data and model fingerprints, arguments
    training_state/random_<rank>.pt                      random states of each rank
    manifest.json                                        size and SHA-256 of every file

Only a folder of exactly that name counts. Others that a kill can leave behind: model_<step>.tmp, half written; .deleted, half deleted;
.replaced, the one before where the same step is saved again. Here they are found and loaded; saving.py writes them.
"""

import hashlib
import json
import pickle
import re
from pathlib import Path

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
from peft_pretraining.parallel.fsdp import FSDPModule, local_shard_like
from peft_pretraining.parallel.process_group import DistributedContext

# ----------------------------------------------------------------------------------------------------------------- loading


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    ranks: DistributedContext,
    config: dict | None = None,
    extra: dict[str, nn.Module] | None = None,
) -> dict:
    """Put a checkpoint's weights, optimizer state and random states in place and return its `trainer` dictionary.

    folder: as `find_checkpoint` returned it, which has compared its files with the manifest. Ranks beyond those that saved it get
    random states that follow from rank 0's and the number of the rank. config: what the saved config.json must agree with, by default
    the shapes in that of `model.config`. extra: see `Checkpoints.save`.
    Raises UserError where a file cannot be read any more, or where the checkpoint is of another model.
    """
    extra = extra or {}
    if lacking := next(
        (name for name in extra if not (folder / EXTRA.format(name)).exists()), None
    ):
        raise UserError(
            f"{folder} has no weights of {lacking}: it was trained without; give the flags it was trained with"
        )
    try:
        trainer = json.loads((folder / TRAINER).read_text(encoding="utf8"))
        saved_config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        saved_random = RANDOM.format(ranks.rank) in json.loads(
            (folder / MANIFEST).read_text(encoding="utf8")
        )
        randoms = torch.load(
            folder / RANDOM.format(ranks.rank if saved_random else 0), weights_only=True
        )
        # Of a sharded model each rank takes its part of the files, which then never are whole on a device.
        sharded = isinstance(model, FSDPModule)
        device = torch.device("cpu") if sharded else ranks.device
        states = torch.load(
            folder / OPTIMIZER, map_location=device, weights_only=True, mmap=sharded
        )
        own = model.state_dict()
        with safe_open(folder / WEIGHTS, "pt", str(device)) as file:
            weights = {
                name: local_shard_like(file.get_tensor(name), own.get(name)) for name in file.keys()
            }
        extra_weights = {name: load_file(folder / EXTRA.format(name)) for name in extra}
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        KeyError,
        SafetensorError,
        pickle.UnpicklingError,
    ) as error:
        reason = re.split(r"\.\s|\n", str(error))[
            0
        ]  # torch goes on with advice to load it unsafely
        raise UserError(
            f"{folder} cannot be read any more ({reason}): continue from another checkpoint"
        ) from error
    _check_config(folder, saved_config, config or _shapes(model.config.to_dict()))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.state_dict()) - set(state_dict_without_tied_weights(model))
    if unexpected or set(missing) - tied:
        odd = sorted({*unexpected, *missing} - tied)
        raise UserError(
            f"{folder} does not fit the model: {odd[0]} is in only one of them; give the --model_config it was trained with"
        )
    for name, module in extra.items():
        module.load_state_dict(extra_weights[name])
    load_optimizer_state_by_name(model, optimizer, states)
    if saved_random:
        restore_random_states(randoms, ranks.device)
    else:
        digest = hashlib.sha256(
            randoms["torch"].numpy().tobytes() + str(ranks.rank).encode()
        ).digest()
        seed_random_generators(int.from_bytes(digest[:8], "big"))
    return trainer


def _shapes(config: dict) -> dict:
    """Of a transformers config what decides which weights there are and what they compute."""
    shape = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    keys = (
        *shape,
        "tie_word_embeddings",
        "rms_norm_eps",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
    )
    return {key: config.get(key) for key in keys}


def _check_config(folder: Path, saved: dict, expected: dict) -> None:
    for key, now in expected.items():
        if saved.get(key) != now:
            raise UserError(
                f"{folder} was trained with {key} {saved.get(key)}, but the model config says {now}: "
                "give the model it was trained with, or do not continue from it"
            )
