"""Checkpoints: everything that decides the future of a run, written whole or not at all, verified on load.

model_<step>/
    config.json, model.safetensors, tokenizer files     transformers' format: AutoModelForCausalLM.from_pretrained reads it
    training_state/optimizer.pt                          state by parameter name
    training_state/trainer.json                          step, tokens, decays, data and model fingerprints, arguments
    training_state/random_<rank>.pt                      random states of each rank
    manifest.json                                        size and SHA-256 of every file
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer

from peft_pretraining.distributed import Ranks
from peft_pretraining.errors import UserError

MANIFEST = "manifest.json"
STATE = Path("training_state")


def save_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, trainer: dict, tokenizer, ranks: Ranks) -> None:
    """Write a checkpoint under `folder` (its name appears only when it is complete); all ranks call it together.

    model: with `.config`; parameter names as transformers'. trainer: what JSON can hold. tokenizer: anything with
    `save_pretrained`, or None.
    """
    building = folder.with_name(folder.name + ".tmp")
    if ranks.is_main:
        shutil.rmtree(building, ignore_errors=True)
        (building / STATE).mkdir(parents=True)
    ranks.barrier()
    torch.save(random_states(ranks.device), building / STATE / f"random_{ranks.rank}.pt")
    ranks.barrier()
    if ranks.is_main:
        save_file(_unshared(model), building / "model.safetensors", metadata={"format": "pt"})
        config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": str(next(model.parameters()).dtype)[6:]}
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
        if tokenizer is not None:
            tokenizer.save_pretrained(building)
        torch.save(optimizer_state_by_name(model, optimizer), building / STATE / "optimizer.pt")
        (building / STATE / "trainer.json").write_text(json.dumps(trainer, indent=2) + "\n", encoding="utf8")
        _finish(building, folder)
    ranks.barrier()


def load_checkpoint(folder: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> dict:
    """Put a checkpoint's weights, optimizer state and random states in place and return its `trainer` dictionary.

    Raises UserError where a file is missing or damaged, or where the checkpoint is of another model.
    """
    verify(folder)
    trainer = json.loads((folder / STATE / "trainer.json").read_text(encoding="utf8"))
    _check_config(folder, model)
    weights = load_file(folder / "model.safetensors", device=str(ranks.device))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.state_dict()) - set(_unshared(model))
    if unexpected or set(missing) - tied:
        odd = sorted({*unexpected, *missing} - tied)
        raise UserError(f"{folder} does not fit the model: {odd[0]} is in only one of them; give the --model_config it was trained with")
    states = torch.load(folder / STATE / "optimizer.pt", map_location=ranks.device, weights_only=True)
    load_optimizer_state_by_name(model, optimizer, states)
    random_file = folder / STATE / f"random_{ranks.rank}.pt"
    if random_file.exists():  # another number of ranks: the ones beyond the saved go on with their own
        restore_random_states(torch.load(random_file, weights_only=True), ranks.device)
    return trainer


def find_checkpoint(place: str, run_folder: Path) -> Path | None:
    """The checkpoint that `--continue_from` means: a checkpoint, the newest of a run folder, or `auto` (the newest of this
    run, None if it has none yet). Raises UserError where there is none."""
    if place == "auto":
        return newest_checkpoint(run_folder)
    folder = Path(place).resolve()
    if (folder / MANIFEST).is_file() and step_of(folder) >= 0:
        return folder
    newest = newest_checkpoint(folder)
    if newest is None:
        raise UserError(f"--continue_from {place}: no checkpoint there; give a folder checkpoints/model_<step>, a run folder, or auto")
    return newest


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint with the greatest step in `run_folder`/checkpoints."""
    return max(checkpoints_of(run_folder), key=step_of, default=None)


def checkpoints_of(run_folder: Path) -> list[Path]:
    """The whole checkpoints of a run, in no order; not those that are being written or were set aside."""
    return [p for p in (run_folder / "checkpoints").glob("model_*") if step_of(p) >= 0 and (p / MANIFEST).is_file()]


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
    return int(digits) if digits.isdigit() else -1


def verify(folder: Path) -> None:
    """Compare every file with the manifest. Raises UserError naming the file that is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf8"))
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({error}): continue from an older checkpoint") from error
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: continue from an older checkpoint")
        if path.stat().st_size != size or sha256(path) != digest:
            raise UserError(f"{path} is damaged (its size or SHA-256 is not the manifest's): continue from an older checkpoint")


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


def _unshared(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dictionary with a tied head left out: safetensors stores no tensor twice, and transformers ties it again."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    return tensors


def _check_config(folder: Path, model: nn.Module) -> None:
    saved = json.loads((folder / "config.json").read_text(encoding="utf8"))
    now = model.config.to_dict()
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for key in (*shape, "tie_word_embeddings", "rms_norm_eps", "hidden_act", "rope_theta", "rope_scaling", "rope_parameters"):
        if saved.get(key) != now.get(key):
            raise UserError(
                f"{folder} was trained with {key} {saved.get(key)}, but the model config says {now.get(key)}: "
                "give the --model_config it was trained with, or leave --continue_from out"
            )


def _finish(building: Path, folder: Path) -> None:
    """Write the manifest, bring every file to the disk, and only then give the checkpoint its name."""
    files = sorted(p for p in building.rglob("*") if p.is_file())
    manifest = {p.relative_to(building).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (building / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf8")
    for path in (*files, building / MANIFEST, building / STATE, building):
        _sync(path)
    previous = folder.with_name(folder.name + ".old")
    if folder.exists():
        folder.rename(previous)
    building.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
