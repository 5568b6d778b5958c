"""LlamaConfig, compared with transformers' class of the same name."""

import json
from pathlib import Path

import pytest
import transformers
from loguru import logger

from peft_pretraining import constants
from peft_pretraining.errors import UserError
from peft_pretraining.model import config as module
from peft_pretraining.model.config import LlamaConfig, load_config
from peft_pretraining.model.linear_cross_entropy import LOSSES
from tests.end_to_end.common import ROOT

BASE = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
NEW_TRANSFORMERS = int(transformers.__version__.split(".")[0]) >= 5


def write(folder, content):
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


CASES = {
    **{
        path.stem: json.loads(path.read_text()) | {"pad_token_id": None}
        for path in sorted((ROOT / "configs").glob("llama_*.json"))
    },
    "defaults": BASE,
    "rope_theta": BASE | {"rope_theta": 5e5},
    "scaled rope": BASE | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2}},
    "old name of rope_type": BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "other values": BASE
    | {
        "head_dim": 32,
        "num_key_value_heads": 2,
        "hidden_act": "gelu",
        "attention_bias": True,
        "tie_word_embeddings": True,
        "dtype": "float32",
        "architectures": ["LlamaForCausalLM"],
        "_name_or_path": "somewhere",
        "transformers_version": "4.57.0",
        "unknown": [1, 2],
        "output_attentions": True,
    },
}


@pytest.mark.skipif(not NEW_TRANSFORMERS, reason="transformers 4 writes other keys")
@pytest.mark.parametrize("case", CASES)
def test_config_json_is_that_of_transformers(case):
    """The JSON file has the same keys and values, also after the config has been read again."""
    theirs = json.loads(json.dumps(transformers.LlamaConfig(**CASES[case]).to_dict()))
    ours = json.loads(json.dumps(LlamaConfig.from_dict(CASES[case]).to_dict()))
    again = json.loads(json.dumps(LlamaConfig.from_dict(ours).to_dict()))
    assert ours == theirs and again == theirs


def test_transformers_4_finds_its_keys(monkeypatch):
    monkeypatch.setattr(module.importlib.metadata, "version", lambda package: "4.57.1")
    plain = LlamaConfig.from_dict(BASE | {"rope_theta": 5e5}).to_dict()
    assert (plain["rope_theta"], plain["rope_scaling"]) == (5e5, None)
    scaling = {"rope_type": "linear", "factor": 2.0}
    scaled = LlamaConfig.from_dict(BASE | {"rope_scaling": scaling}).to_dict()
    assert scaled["rope_scaling"] == {"rope_theta": 10000.0, **scaling}


def test_derived_values():
    config = LlamaConfig.from_dict(BASE)
    assert config.num_key_value_heads == 4 and config.head_dim == 16
    assert config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ([1], "is not a LLaMA config"),
        ({"model_type": "gpt2"}, 'must contain "model_type": "llama"'),
        (BASE | {"hidden_size": "big"}, "hidden_size must be a whole number above 0, not 'big'"),
        (BASE | {"hidden_size": True}, "hidden_size must be a whole number above 0, not True"),
        (BASE | {"vocab_size": 0}, "vocab_size must be a whole number above 0, not 0"),
        (
            {k: v for k, v in BASE.items() if k != "vocab_size"},
            "vocab_size must be a whole number",
        ),
        (
            BASE | {"num_attention_heads": 3},
            "hidden_size 64 must be an even multiple of num_attention_heads 3",
        ),
        (BASE | {"num_attention_heads": 64}, "an even multiple of num_attention_heads 64"),
        (BASE | {"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        (BASE | {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, not '1e-6'"),
        (BASE | {"rope_theta": [1]}, "rope_theta must be a number"),
        (BASE | {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
        (BASE | {"rope_scaling": 2.0}, "rope_scaling must be a JSON object or null, not 2.0"),
        (BASE | {"rope_teta": 1e4}, "rope_teta is no key of a LLaMA config; did you mean rope_th"),
        (BASE | {"sliding_window": 4096}, "sliding_window 4096 is not implemented"),
    ],
)
def test_bad_configs(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_config(write(tmp_path, content))


def test_a_missing_config_is_reported_with_its_neighbours():
    with pytest.raises(
        UserError, match="llama_61m.json: no such file; configs in configs: .*llama_60m.json"
    ):
        load_config("configs/llama_61m.json")


def test_a_negative_pad_token_is_left_out(tmp_path):
    """torch would read -1 as the last row of the embedding."""
    assert load_config(write(tmp_path, BASE | {"pad_token_id": -1})).pad_token_id is None
    assert load_config(write(tmp_path, BASE | {"pad_token_id": 0})).pad_token_id == 0
    outside = BASE | {"pad_token_id": BASE["vocab_size"]}
    assert load_config(write(tmp_path, outside)).pad_token_id is None


def test_keys_without_effect_are_named(tmp_path):
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    extra = {"quantization_config": {"bits": 4}, "colour": "blue", "sliding_window": None}
    config = load_config(write(tmp_path, BASE | extra))
    logger.remove(sink)
    assert "quantization_config" not in config.to_dict() and config.to_dict()["colour"] == "blue"
    assert len(lines) == 2 and "quantization_config is left out" in lines[0]
    assert "colour has no effect" in lines[1]


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_configs_of_the_project_are_read_without_a_warning(path):
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    load_config(path)
    logger.remove(sink)
    assert lines == []


def test_the_command_line_offers_every_loss():
    assert tuple(LOSSES) == constants.LOSS_NAMES
