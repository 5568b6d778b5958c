"""Checkpoints of image classifiers."""

import threading

import pytest
import torch
from safetensors.torch import load_file

import main_vit
from peft_pretraining.checkpoint.load import load_checkpoint
from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.errors import UserError
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.vision.models import build_model
from tests.support.vision import ALONE, arguments


def test_a_checkpoint_holds_the_statistics_of_the_moment_of_saving(tmp_path, monkeypatch):
    """The next forward pass changes them while the background thread still copies the weights."""
    model = build_model(arguments("--model", "test_resnet"))
    optimizer = build_optimizer("adam", [{"params": list(model.parameters())}], 1e-3)
    checkpoints, forward_done = Checkpoints(tmp_path, ALONE), threading.Event()
    make = checkpoints._snapshot.copy
    monkeypatch.setattr(checkpoints._snapshot, "copy", lambda: forward_done.wait(20) and make())
    wanted = {name: buffer.clone() for name, buffer in model.named_buffers()}
    checkpoints.save(
        1, model, optimizer, {}, config={"architecture": "test_resnet"}, extra={"ema": model}
    )
    model(torch.randn(4, 3, 32, 32))
    forward_done.set()
    checkpoints.finish()
    saved = load_file(tmp_path / "checkpoints/model_1/model.safetensors")
    assert all(torch.equal(saved[name], buffer) for name, buffer in wanted.items())


def test_a_checkpoint_keeps_the_moving_average(tmp_path):
    args = arguments("--model", "test_resnet", "--model_ema", "true")
    torch.manual_seed(0)
    training = main_vit.make_training(args, build_model(args))
    with torch.no_grad():
        training.model.fc.weight.add_(1)
    training.ema.update(training.model)
    checkpoints = Checkpoints(tmp_path, ALONE)
    checkpoints.save(
        1,
        training.model,
        training.optimizer,
        {"data": "x"},
        config=training.config,
        extra=training.averages(),
    )
    checkpoints.finish()
    other = main_vit.make_training(args, build_model(args))
    folder = tmp_path / "checkpoints/model_1"
    assert load_checkpoint(
        folder, other.model, other.optimizer, ALONE, other.config, other.averages()
    ) == {"data": "x"}
    for ours, theirs in ((other.model, training.model), (other.ema.module, training.ema.module)):
        assert all(
            torch.equal(a, b)
            for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )
    assert not torch.equal(other.model.fc.weight, other.ema.module.fc.weight)
    with pytest.raises(
        UserError, match="was trained with num_classes 4, but the model config says 5"
    ):
        load_checkpoint(
            folder, other.model, other.optimizer, ALONE, other.config | {"num_classes": 5}
        )
    (folder / "training_state/ema.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights of ema, because it was trained without"):
        load_checkpoint(folder, other.model, other.optimizer, ALONE, other.config, other.averages())
