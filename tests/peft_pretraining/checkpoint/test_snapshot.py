"""The copy in host memory: it follows the state, and its memory is used again."""

import pytest
import torch

from peft_pretraining.checkpoint.save import Checkpoints
from peft_pretraining.checkpoint.snapshot import HostSnapshot
from peft_pretraining.errors import UserError
from tests.peft_pretraining.checkpoint.common import (
    SINGLE_PROCESS,
    adam,
    equal_states,
    load,
    small_model,
    state_of,
    train_one_update,
)


def test_the_memory_is_used_again_for_the_next_copy():
    snapshot = HostSnapshot()
    weight, step = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    pointers = []
    for _ in range(2):
        snapshot.request({"model.safetensors": {"w": weight}}, {"w": {"step": step}})
        files, states = snapshot.copy()
        assert files["model.safetensors"]["w"].tolist() == weight.tolist()
        assert states["w"]["step"].item() == step.item()
        weight += 1
        step += 1
        pointers.append(files["model.safetensors"]["w"].data_ptr())
    assert pointers[0] == pointers[1] != weight.data_ptr()
    with pytest.raises(AssertionError):
        snapshot.copy()  # nothing was requested


def test_the_copy_follows_the_state(tmp_path):
    """The first save of a run has no optimizer state yet, the next one has."""
    model = small_model()
    optimizer = adam(model)
    checkpoints = Checkpoints(tmp_path, SINGLE_PROCESS)
    for step in (1, 2, 3):
        checkpoints.save(step, model, optimizer, {"progress": {"update_step": step}}, None)
        expected = state_of(model, optimizer)
        checkpoints.before_update()
        train_one_update(model, optimizer)
        checkpoints.finish()
        assert equal_states(load(tmp_path / f"checkpoints/model_{step}")[0], expected)


def test_training_goes_on_when_the_copy_fails(tmp_path, trained, monkeypatch):
    def no_memory(*arguments, **options):
        raise MemoryError("no memory")

    monkeypatch.setattr(torch, "empty", no_memory)
    checkpoints = Checkpoints(tmp_path, SINGLE_PROCESS)
    checkpoints.save(10, *trained, {}, None)
    checkpoints.before_update()
    with pytest.raises(UserError, match="could not be saved .no memory"):
        checkpoints.finish()
