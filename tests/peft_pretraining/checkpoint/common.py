"""A small LLaMA, and helpers that save and load its checkpoints in one process."""

import copy
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.checkpoint.format import REQUIRED
from peft_pretraining.checkpoint.load import load_checkpoint
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.checkpoint.state import optimizer_state_by_name
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.process_group import DistributedContext

SINGLE_PROCESS = DistributedContext(0, 0, 1, torch.device("cpu"))
FILES = [*REQUIRED, "manifest.json"]


def small_model(**changes) -> nn.Module:
    """Build a LLaMA of one block; `changes` override fields of its config."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return build_model(transformers.LlamaConfig(**sizes | changes, pad_token_id=None))


def adam(model: nn.Module) -> Optimizer:
    return build_optimizer(
        "adam", [{"params": list(model.parameters()), "weight_decay": 0.1}], 1e-2
    )


def train_one_update(model: nn.Module, optimizer: Optimizer) -> None:
    model(torch.arange(20)[None], torch.arange(20)[None]).backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return copies of all weights and optimizer states, by name."""
    states = optimizer_state_by_name(model, optimizer)
    return copy.deepcopy(
        {
            **model.state_dict(),
            **{f"{n}.{k}": v for n, state in states.items() for k, v in state.items()},
        }
    )


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(run_folder: Path, step: int, model: nn.Module, optimizer: Optimizer, **options) -> Path:
    """Save one checkpoint, wait until it is written, and return its folder."""
    checkpoints = Checkpoints(run_folder, SINGLE_PROCESS, **options)
    checkpoints.save(step, model, optimizer, {"progress": {"update_step": step}}, None)
    checkpoints.finish()
    return run_folder / f"checkpoints/model_{step}"


def load(folder: Path) -> tuple[dict[str, Tensor], int]:
    """Load a checkpoint into a new model; return the loaded state and the recorded update."""
    model = small_model()
    optimizer = adam(model)
    trainer = load_checkpoint(folder, model, optimizer, SINGLE_PROCESS)
    return state_of(model, optimizer), trainer["progress"]["update_step"]


def checkpoint_names(run_folder: Path) -> list[str]:
    return sorted(p.name for p in (run_folder / "checkpoints").iterdir())
