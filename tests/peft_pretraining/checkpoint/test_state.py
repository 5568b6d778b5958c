"""Weights and optimizer state by name: tied weights are stored once, layouts do not matter."""

import torch
import transformers
from safetensors.torch import load_file

from peft_pretraining.checkpoint.load import load_checkpoint
from tests.peft_pretraining.checkpoint.common import (
    SINGLE_PROCESS,
    adam,
    equal_states,
    load,
    save,
    small_model,
    state_of,
    train_one_update,
)


def test_a_tied_head_is_saved_once(tmp_path):
    model = small_model(tie_word_embeddings=True)
    optimizer = adam(model)
    train_one_update(model, optimizer)
    folder = save(tmp_path, 1, model, optimizer)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_checkpoint(folder, model, optimizer, SINGLE_PROCESS)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids), rtol=1e-5, atol=1e-5)


def test_transposed_weights_and_moments_are_saved_by_value(tmp_path, trained):
    """A tensor that is not contiguous in memory is saved with the values that it shows."""
    model, optimizer = trained
    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.t().contiguous().t()
        state = optimizer.state[model.lm_head.weight]
        state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    folder = save(tmp_path, 10, model, optimizer)
    assert equal_states(load(folder)[0], state_of(model, optimizer))
