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
import random
import re
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.optim import Optimizer

from peft_pretraining.parallel.process_group import Ranks
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.fsdp import FSDPModule, part_of


MANIFEST = "manifest.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPTIMIZER, TRAINER, RANDOM = "training_state/optimizer.pt", "training_state/trainer.json", "training_state/random_{}.pt"
EXTRA = "training_state/{}.safetensors"
REQUIRED = (WEIGHTS, CONFIG, TRAINER, OPTIMIZER, RANDOM.format(0))


# ----------------------------------------------------------------------------------------------------------------- finding


def find_checkpoint(place: str, run_folder: Path, ranks: Ranks) -> Path | None:
    """The checkpoint that `--continue_from` means: a checkpoint, the newest whole one of a run folder, or `auto` (the newest whole one
    of this run, None if it has none yet).

    All ranks call it together: rank 0 looks and compares every file with its SHA-256, all return what it found. In a run folder each
    damaged checkpoint that is newer than the one found is a warning. Raises the same UserError on all ranks where there is nothing to
    continue from: no checkpoint, the one that was named is damaged, or all of them are.
    """
    found = problem = None
    if ranks.is_main:
        try:
            found = _find(place, run_folder)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--continue_from {place}: {error.filename} cannot be read ({error.strerror}); make it readable"
    found, problem = ranks.broadcast((found, problem))
    if problem:
        raise UserError(problem)
    return found


def _find(place: str, run_folder: Path) -> Path | None:
    if place == "auto":
        return newest_checkpoint(run_folder)
    folder = Path(place).resolve()
    if step_of(folder) >= 0 and folder.is_dir():
        if damage := damage_of(folder):
            raise UserError(f"{damage}: continue from an older checkpoint")
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UserError(f"--continue_from {place}: no checkpoint there; give a folder checkpoints/model_<step>, a run folder, or auto")
    return newest


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The whole checkpoint with the greatest step in `run_folder`/checkpoints, None if there is no checkpoint at all.

    Warns of each damaged one that is newer. Raises UserError where all are damaged: to start from scratch would be a loss unnoticed.
    """
    from loguru import logger

    restore_replaced(run_folder)
    damages = []
    for folder in sorted(checkpoints_of(run_folder), key=step_of, reverse=True):
        damage = damage_of(folder)
        if damage is None:
            return folder
        logger.warning(f"{damage}: {folder.name} is passed over for an older checkpoint")
        damages.append(damage)
    if damages:
        raise UserError(
            f"no checkpoint in {run_folder / 'checkpoints'} is whole ({damages[0]}): continue from another run, or start anew in another "
            "--save_dir"
        )
    return None


def checkpoints_of(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or damaged, in no order; not those that are being written or were set aside."""
    return [p for p in (run_folder / "checkpoints").glob("model_*") if step_of(p) >= 0 and p.is_dir()]


def step_of(folder: Path) -> int:
    """The number of updates after which a checkpoint was made, -1 for a folder that is named otherwise."""
    match = re.fullmatch(r"model_([0-9]+)", folder.name)
    return int(match[1]) if match else -1


def damage_of(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where every file is as its manifest says.

    hashes: compare contents; False: only which files there are and their sizes.
    """
    manifest = folder / MANIFEST
    try:
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in json.loads(manifest.read_bytes()).items()}
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{manifest} is damaged ({error})"
    for name in REQUIRED:
        if name not in expected:
            return f"{manifest} is damaged (it does not list {name})"
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{path} is damaged (its size is not the manifest's)"
            if hashes and sha256(path) != digest:
                return f"{path} is damaged (its SHA-256 is not the manifest's)"
        except (FileNotFoundError, NotADirectoryError):
            return f"{path} is missing"
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have, from a damaged manifest
            return f"{path} cannot be read ({error})"
    return None


def set_aside_newer(run_folder: Path, step: int) -> list[Path]:
    """A run that goes on from an older checkpoint leaves its later ones behind, the damaged too: rename them to
    model_<step>.abandoned, so that `auto` does not take one of them for the newest. Returns those that were there."""
    newer = [p for p in checkpoints_of(run_folder) if step_of(p) > step]
    for folder in newer:
        target = folder.with_name(folder.name + ".abandoned")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    return newer


def restore_replaced(run_folder: Path) -> None:
    """After a kill just between the two renames by which a checkpoint takes the place of one of the same step: the old one again."""
    for folder in (run_folder / "checkpoints").glob("model_*.replaced"):
        if not folder.with_suffix("").exists():
            folder.rename(folder.with_suffix(""))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------- loading


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    ranks: Ranks,
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
    if lacking := next((name for name in extra if not (folder / EXTRA.format(name)).exists()), None):
        raise UserError(f"{folder} has no weights of {lacking}: it was trained without; give the flags it was trained with")
    try:
        trainer = json.loads((folder / TRAINER).read_text(encoding="utf8"))
        saved_config = json.loads((folder / CONFIG).read_text(encoding="utf8"))
        saved_random = RANDOM.format(ranks.rank) in json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        randoms = torch.load(folder / RANDOM.format(ranks.rank if saved_random else 0), weights_only=True)
        # Of a sharded model each rank takes its part of the files, which then never are whole on a device.
        sharded = isinstance(model, FSDPModule)
        device = torch.device("cpu") if sharded else ranks.device
        states = torch.load(folder / OPTIMIZER, map_location=device, weights_only=True, mmap=sharded)
        own = model.state_dict()
        with safe_open(folder / WEIGHTS, "pt", str(device)) as file:
            weights = {name: part_of(file.get_tensor(name), own.get(name)) for name in file.keys()}
        extra_weights = {name: load_file(folder / EXTRA.format(name)) for name in extra}
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        reason = re.split(r"\.\s|\n", str(error))[0]  # torch goes on with advice to load it unsafely
        raise UserError(f"{folder} cannot be read any more ({reason}): continue from another checkpoint") from error
    _check_config(folder, saved_config, config or _shapes(model.config.to_dict()))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.state_dict()) - set(unshared_state(model))
    if unexpected or set(missing) - tied:
        odd = sorted({*unexpected, *missing} - tied)
        raise UserError(f"{folder} does not fit the model: {odd[0]} is in only one of them; give the --model_config it was trained with")
    for name, module in extra.items():
        module.load_state_dict(extra_weights[name])
    load_optimizer_state_by_name(model, optimizer, states)
    if saved_random:
        restore_random_states(randoms, ranks.device)
    else:
        digest = hashlib.sha256(randoms["torch"].numpy().tobytes() + str(ranks.rank).encode()).digest()
        seed_random_generators(int.from_bytes(digest[:8], "big"))
    return trainer


def unshared_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dictionary with a tied head left out: safetensors stores no tensor twice, and transformers ties it again."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():  # not by address: a rank's part of a sharded tensor may be empty
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def optimizer_state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict]:
    """The optimizer's state keyed by parameter name, so that it does not depend on how the groups are cut."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def load_optimizer_state_by_name(model: nn.Module, optimizer: Optimizer, states: dict[str, dict]) -> None:
    """The inverse of `optimizer_state_by_name`."""
    for name, parameter in model.named_parameters():
        if name in states:
            # In another --dtype the moments take the parameters'; the count of steps stays as it is.
            optimizer.state[parameter] = {
                key: part_of(value, parameter).to(parameter.dtype) if value.dim() else value.to(parameter.device)
                for key, value in states[name].items()
            }


def _shapes(config: dict) -> dict:
    """Of a transformers config what decides which weights there are and what they compute."""
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys = (*shape, "tie_word_embeddings", "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters")
    return {key: config.get(key) for key in keys}


def _check_config(folder: Path, saved: dict, expected: dict) -> None:
    for key, now in expected.items():
        if saved.get(key) != now:
            raise UserError(
                f"{folder} was trained with {key} {saved.get(key)}, but the model config says {now}: "
                "give the model it was trained with, or do not continue from it"
            )


# ----------------------------------------------------------------------------------------------------------- random states


def seed_random_generators(seed: int) -> None:
    """Start every random number generator of this process at a known state."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict:
    """States of every random number generator of this process."""
    _, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.copy()), *position),  # a tensor, so that the file loads without unpickling code
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_states(states: dict, device: torch.device) -> None:
    """The inverse of `random_states`."""
    random.setstate(states["python"])
    keys, *position = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), *position))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
