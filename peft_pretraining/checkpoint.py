"""Checkpoints: everything that decides the future of a run, verified before it is loaded. saving.py writes them.

model_<step>/
    config.json, model.safetensors, tokenizer files     transformers' format: AutoModelForCausalLM.from_pretrained reads it
    training_state/optimizer.pt                          state by parameter name
    training_state/trainer.json                          step, tokens, decays, data and model fingerprints, arguments
    training_state/random_<rank>.pt                      random states of each rank
    training_state/<name>.safetensors                    weights of other modules, as the moving average's
    manifest.json                                        size and SHA-256 of every file
"""

import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from loguru import logger
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim import Optimizer

from peft_pretraining.distributed import Ranks
from peft_pretraining.errors import UserError

MANIFEST, WEIGHTS = "manifest.json", "model.safetensors"
STATE = Path("training_state")
NEEDED = ("config.json", WEIGHTS, *(f"{STATE}/{name}" for name in ("trainer.json", "optimizer.pt", "random_0.pt")))


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    ranks: Ranks,
    config: dict | None = None,
    extra: dict[str, nn.Module] | None = None,
) -> dict:
    """Put the weights, optimizer state and random states of a checkpoint that `find_checkpoint` gave in place; returns its `trainer`.

    It may have been made by any number of ranks. config: what the saved config.json must agree with, by default the shapes in that of
    `model.config`; extra: more modules whose weights were saved, by name (see `Checkpoints.save`).
    Raises UserError where it is of another model or can no longer be read.
    """
    extra = extra or {}
    try:
        trainer = json.loads((folder / STATE / "trainer.json").read_text(encoding="utf8"))
        _check_config(folder, config or _shapes(model.config.to_dict()))
        weights = load_file(folder / WEIGHTS, device=str(ranks.device))
        if lacking := next((name for name in extra if not (folder / extra_file(name)).exists()), None):
            raise UserError(f"{folder} has no weights of {lacking}: it was trained without; give the flags it was trained with")
        extra_weights = {name: load_file(folder / extra_file(name)) for name in extra}
        states = torch.load(folder / STATE / "optimizer.pt", map_location=ranks.device, weights_only=True)
        random_file = folder / STATE / f"random_{ranks.rank}.pt"
        own = random_file.exists()
        randomness = torch.load(random_file if own else folder / STATE / "random_0.pt", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} can no longer be read ({error}): start again") from error
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.state_dict()) - set(unshared(model))
    if unexpected or set(missing) - tied:
        odd = sorted({*unexpected, *missing} - tied)
        raise UserError(f"{folder} does not fit the model: {odd[0]} is in only one of them; give the --model_config it was trained with")
    for name, module in extra.items():
        module.load_state_dict(extra_weights[name])
    load_optimizer_state_by_name(model, optimizer, states)
    if own:
        restore_random_states(randomness, ranks.device)
    else:  # a rank that the saved run did not have
        seed_random_generators(
            int.from_bytes(hashlib.sha256(randomness["torch"].numpy().tobytes() + bytes([ranks.rank])).digest()[:7], "big")
        )
    return trainer


def find_checkpoint(place: str, run_folder: Path, ranks: Ranks) -> Path | None:
    """The checkpoint that `--continue_from` means, every file of it compared with its manifest; the same on all ranks.

    place: a checkpoint, a run folder (its newest whole checkpoint), or `auto` (the newest whole one of this run, None if it has
    none yet). Damaged ones that are newer are warned about and passed over. Raises UserError where there is none or none is whole.
    """
    found = problem = None
    if ranks.is_main:
        try:
            found = _find(place, run_folder)
        except UserError as error:
            problem = str(error)
    found, problem = ranks.broadcast((found, problem))
    if problem:
        raise UserError(problem)
    return found


def _find(place: str, run_folder: Path) -> Path | None:
    folder = run_folder if place == "auto" else Path(place).resolve()
    if place != "auto" and step_of(folder) >= 0 and folder.is_dir():
        if problem := damage(folder):
            raise UserError(f"--continue_from {place}: {problem}; give an older checkpoint")
        return folder
    problems = []
    for candidate in sorted(checkpoints_of(folder), key=step_of, reverse=True):
        problem = damage(candidate)
        if problem is None:
            return candidate
        problems.append(problem)
        logger.warning(f"{problem}: going back to the checkpoint before")
    if problems:
        raise UserError(f"no checkpoint of {folder} is whole: move {folder / 'checkpoints'} away to train from the start")
    if place != "auto":
        raise UserError(f"--continue_from {place}: no checkpoint there; give a folder checkpoints/model_<step>, a run folder, or auto")
    return None


def checkpoints_of(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, damaged or not, in no order; not those that are being written or deleted or were set aside."""
    return [p for p in (run_folder / "checkpoints").glob("model_*") if step_of(p) >= 0]


def set_aside_newer(run_folder: Path, step: int) -> list[Path]:
    """A run that goes on from an older checkpoint leaves its later ones behind: rename them to model_<step>.abandoned, so that `auto`
    does not take one of them for the newest. Returns those that were there."""
    newer = [p for p in checkpoints_of(run_folder) if step_of(p) > step]
    for folder in newer:
        target = folder.with_name(folder.name + ".abandoned")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    return newer


def step_of(folder: Path) -> int:
    """The number of updates after which a checkpoint was made, -1 for a folder that is named otherwise."""
    digits = folder.name.removeprefix("model_")
    return int(digits) if digits.isdecimal() else -1


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: the file that is missing or is not what the manifest says; None for a whole one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST} cannot be read ({error})"
    for name in NEEDED:
        if name not in expected:
            return f"{folder / MANIFEST} does not list {name}"
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if path.stat().st_size != size or sha256(path) != digest:
                return f"{path} is damaged (its size or SHA-256 is not the manifest's)"
        except (OSError, ValueError) as error:
            return f"{path} cannot be read ({error})"
    return None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def optimizer_state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, dict]:
    """The optimizer's state keyed by parameter name, so that it does not depend on how the groups are cut."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def load_optimizer_state_by_name(model: nn.Module, optimizer: Optimizer, states: dict[str, dict]) -> None:
    """The inverse of `optimizer_state_by_name`."""
    for name, parameter in model.named_parameters():
        if name in states:
            # In another --dtype the moments take the parameters'; the count of steps stays as it is.
            optimizer.state[parameter] = {k: v.to(parameter.dtype) if v.dim() else v for k, v in states[name].items()}


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


def unshared(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dictionary with a tied head left out: safetensors stores no tensor twice, and transformers ties it again."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    return tensors


def extra_file(name: str) -> Path:
    """Where a checkpoint keeps the weights of another module than the model."""
    return STATE / f"{name}.safetensors"


def _shapes(config: dict) -> dict:
    """Of a transformers config what decides which weights there are and what they compute."""
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    keys = (*shape, "tie_word_embeddings", "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters")
    return {key: config.get(key) for key in keys}


def _check_config(folder: Path, expected: dict) -> None:
    saved = json.loads((folder / "config.json").read_text(encoding="utf8"))
    for key, now in expected.items():
        if saved.get(key) != now:
            raise UserError(
                f"{folder} was trained with {key} {saved.get(key)}, but the model config says {now}: "
                "give the model it was trained with, or do not continue from it"
            )
