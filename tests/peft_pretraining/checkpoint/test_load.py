"""Loading a checkpoint: the full state comes back, and what does not fit is refused."""

import random

import numpy as np
import pytest
import torch

from peft_pretraining.checkpoint.load import load_checkpoint
from peft_pretraining.checkpoint.random_state import seed_random_generators
from peft_pretraining.errors import UserError
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.process_group import DistributedContext
from tests.peft_pretraining.checkpoint.common import (
    FILES,
    SINGLE_PROCESS,
    adam,
    equal_states,
    load,
    save,
    small_model,
    state_of,
    train_one_update,
)


def test_round_trip(tmp_path, trained):
    model, optimizer = trained
    folder = save(tmp_path, 10, model, optimizer)
    expected = torch.rand(3), random.random(), float(np.random.rand())
    other = small_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    # One group for each parameter: the state is found by the parameter's name.
    other_optimizer = build_optimizer(
        "adam", [{"params": [p], "weight_decay": 0.1} for p in other.parameters()], 1e-3
    )
    assert load_checkpoint(folder, other, other_optimizer, SINGLE_PROCESS) == {
        "progress": {"update_step": 10}
    }
    # The random generators continue from where they were when the checkpoint was saved.
    assert torch.equal(torch.rand(3), expected[0])
    assert (random.random(), float(np.random.rand())) == expected[1:]
    assert equal_states(state_of(model, optimizer), state_of(other, other_optimizer))


def test_a_checkpoint_of_another_model_is_refused(tmp_path, trained):
    folder = save(tmp_path, 10, *trained)
    model = small_model(hidden_size=32)
    with pytest.raises(
        UserError, match="trained with hidden_size 16, but the model config says 32"
    ):
        load_checkpoint(folder, model, adam(model), SINGLE_PROCESS)
    model = small_model(rope_theta=500.0)
    with pytest.raises(UserError, match="trained with rope_"):
        load_checkpoint(folder, model, adam(model), SINGLE_PROCESS)


def test_the_moments_take_the_dtype_of_the_parameters(tmp_path, trained):
    folder = save(tmp_path, 10, *trained)
    model = small_model().bfloat16()
    optimizer = adam(model)
    load_checkpoint(folder, model, optimizer, SINGLE_PROCESS)
    train_one_update(model, optimizer)
    state = optimizer.state[model.lm_head.weight]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["step"].dtype == torch.float32 and float(state["step"]) == 2


def test_ranks_without_saved_random_states_get_their_own(tmp_path, trained):
    """A rank that took no part in the save gets random states of its own, the same each time."""
    folder = save(tmp_path, 10, *trained)
    draws = []
    for rank in (0, 1, 3, 1):
        seed_random_generators(99 + len(draws))
        ranks = DistributedContext(rank, rank, 4, SINGLE_PROCESS.device)
        load_checkpoint(folder, *trained, ranks)
        draws.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert draws[1] == draws[3] and len(set(draws)) == 3


def test_a_file_that_is_damaged_after_it_was_verified(run):
    folder = run[0] / "checkpoints/model_20"
    message = "model_20 cannot be read any more .*continue from another checkpoint"
    for name in FILES:
        path = folder / name
        content = path.read_bytes()
        for damaged in (None, b"", b"garbled", content[: len(content) // 2]):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(UserError, match=message):
                load(folder)
            path.write_bytes(content)
