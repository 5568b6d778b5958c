"""Starting and resuming a run."""

import pytest
import torch

from alphadecay import AlphaDecay
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.errors import UserError
from peft_pretraining.model.config import LlamaConfig
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train import resume as module
from peft_pretraining.train.resume import resolve_checkpoint, resume, saved_argument

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2
)


def build(seed, every=2):
    """A model with its weight-decay scheduler and its optimizer, after the first analysis."""
    torch.manual_seed(seed)
    model = build_model(CONFIG)
    decay = AlphaDecay(model, 0.1, every=every)
    return model, build_optimizer("adamw", decay.param_groups(), 1e-3), decay


def decays(optimizer):
    return {group["module"]: group["weight_decay"] for group in optimizer.param_groups[:-1]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with a checkpoint after update 2, and the decays that were assigned there."""
    folder = tmp_path_factory.mktemp("run")
    model, optimizer, decay = build(seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # so that the second analysis assigns other decays
            parameter += 0.5 * torch.randn_like(parameter) * (parameter.ndim == 2)
    for _ in range(2):
        decay.step(optimizer)
        model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trainer = {
        "progress": {"update_step": 2, "tokens_seen": 8, "position": None},
        "decay": decay.state_dict(),
        "data": "these documents",
        "arguments": {"lr": 1e-3, "loss": "chunked"},
    }
    checkpoints = Checkpoints(folder, ALONE)
    checkpoints.save(2, model, optimizer, trainer)
    checkpoints.finish()
    (folder / "metrics.jsonl").write_text('{"update_step": 2}\n')
    return folder, decays(optimizer)


def resumed(saved, arguments=None, total=10, data="these documents", scheduler=True):
    model, optimizer, decay = build(seed=1)
    progress = resume(
        saved[0] / "checkpoints/model_2",
        arguments or {"lr": 1e-3},
        total,
        model,
        optimizer,
        decay if scheduler else None,
        data,
        ALONE,
    )
    return progress, optimizer, decay


def test_the_next_update_has_the_decays_of_the_checkpoint(saved):
    """Not those that were computed for the initial weights of the new process."""
    progress, optimizer, decay = resumed(saved)
    assert progress == {"update_step": 2, "tokens_seen": 8, "position": None}
    assert decay.history == []
    assert not decay.step(optimizer)  # update 3 is not an analysis
    assert decays(optimizer) == saved[1]
    assert saved[1] != decays(build(seed=1)[1])  # the test could tell the difference
    assert decay.step(optimizer)  # update 4 is one


def test_other_arguments_are_a_warning(saved):
    messages = []
    sink = module.logger.add(lambda message: messages.append(message.record["message"]))
    try:
        resumed(saved, {"lr": 1e-3, "loss": "chunked"})
        assert all("will not be the one" not in message for message in messages)
        resumed(saved, {"lr": 2e-3})
    finally:
        module.logger.remove(sink)
    warnings = [message for message in messages if "will not be the one" in message]
    assert len(warnings) == 1 and warnings[0].startswith("--lr is 0.002, was 0.001")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data": "others"}, "was trained on other data"),
        ({"scheduler": False}, "another kind of weight decay"),
        ({"total": 2}, "has made all 2 updates already"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(saved, changes, message):
    with pytest.raises(UserError, match=message):
        resumed(saved, **changes)


def test_saved_arguments(saved):
    checkpoint = saved[0] / "checkpoints/model_2"
    assert saved_argument(checkpoint, "loss") == "chunked"
    assert saved_argument(checkpoint, "compile") is None


def test_where_a_run_starts(saved, tmp_path, monkeypatch):
    folder, checkpoint = saved[0], saved[0] / "checkpoints/model_2"
    assert resolve_checkpoint("auto", folder, ALONE) == ("auto", checkpoint)
    assert resolve_checkpoint("auto", tmp_path, ALONE) == ("auto", None)
    assert resolve_checkpoint(None, tmp_path, ALONE) == (None, None)
    assert resolve_checkpoint(str(checkpoint), tmp_path, ALONE)[1] == checkpoint
    with pytest.raises(UserError, match="already holds a run"):
        resolve_checkpoint(None, folder, ALONE)
    # A run that torchrun has restarted resumes from its own checkpoint.
    monkeypatch.setattr(module, "was_restarted", lambda: True)
    assert resolve_checkpoint(None, folder, ALONE) == ("auto", checkpoint)
    # If it has none yet, it starts from the same place as before.
    place = str(checkpoint)
    assert resolve_checkpoint(place, tmp_path, ALONE) == (place, checkpoint)
