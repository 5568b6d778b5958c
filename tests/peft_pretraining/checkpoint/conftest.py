"""Fixtures of the checkpoint tests."""

import pytest
from loguru import logger

from tests.peft_pretraining.checkpoint.common import (
    adam,
    save,
    small_model,
    state_of,
    train_one_update,
)


@pytest.fixture
def logged_warnings():
    """The messages of all warnings that are logged during the test."""
    messages = []
    sink = logger.add(lambda message: messages.append(message.record["message"]), level="WARNING")
    yield messages
    logger.remove(sink)


@pytest.fixture
def trained():
    """A model and its optimizer after one update."""
    model = small_model()
    optimizer = adam(model)
    train_one_update(model, optimizer)
    return model, optimizer


@pytest.fixture
def run(tmp_path, trained):
    """The folder of a run with checkpoints of updates 10 and 20, and the state of each."""
    folder, states = tmp_path / "run", {}
    for step in (10, 20):
        train_one_update(*trained)
        save(folder, step, *trained)
        states[step] = state_of(*trained)
    return folder, states
