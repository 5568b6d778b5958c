"""A checkpoint is a model that transformers loads, and that stops at the end of a document."""

import json

import pytest
import torch
import transformers

from tests.end_to_end.common import run, write_config, write_text

LLAMA_2 = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "pretraining_tp": 1}
LLAMA_3 = {
    "bos_token_id": 128_000,
    "eos_token_id": [128_001, 128_008, 128_009],
    "num_key_value_heads": 2,
    "rope_theta": 500_000.0,
}
LLAMA_3_1 = LLAMA_3 | {
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
        "rope_type": "llama3",
    }
}
MISTRAL = {
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "sliding_window": None,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
}
CASES = {
    "published": ({}, []),
    "llama 2": (LLAMA_2, []),
    "llama 3": (LLAMA_3, []),
    "llama 3.1": (LLAMA_3_1, ["--use_hf_model"]),
    "mistral-like": (MISTRAL, []),
    "tied": ({"tie_word_embeddings": True}, []),
    "pad outside the vocabulary": ({"pad_token_id": 40_000}, []),
    "hf": ({"pad_token_id": 40_000}, ["--use_hf_model"]),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_text(folder)
    return folder


class EndAfterThree(transformers.LogitsProcessor):
    """Makes the end of the document the only choice for the third new token."""

    def __init__(self, length, eos):
        self.length, self.eos = length, eos

    def __call__(self, ids, scores):
        if ids.shape[1] == self.length + 2:
            scores = torch.full_like(scores, -1e9)
            scores[:, self.eos] = 0.0
        return scores


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_a_checkpoint_and_stops_at_the_end_of_a_document(
    case, corpus, tmp_path, monkeypatch
):
    monkeypatch.setenv("ALPHADECAY_CACHE", str(corpus / "cache"))
    changes, flags = CASES[case]
    path = write_config(tmp_path, num_attention_heads=4, **changes)
    command = (
        f"--model_config {path} --dataset {corpus}/corpus.jsonl --tokenizer bpe --max_length 32 "
        "--dtype float32 --batch_size 4 --total_batch_size 4 --num_training_steps 1 --no_wandb "
        f"--target_eval_tokens 100 --save_dir {tmp_path}/run"
    )
    run([*command.split(), *flags], processes=1)
    folder = tmp_path / "run/checkpoints/model_1"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = {name: getattr(model.config, name) for name in ("eos_token_id", "pad_token_id")}
    assert ids == {name: getattr(tokenizer, name) for name in ids}
    assert model.config.bos_token_id is None  # documents do not begin with a token of their own
    assert tokenizer.convert_ids_to_tokens(ids["eos_token_id"]) == "</s>"
    saved = json.loads((folder / "config.json").read_text())
    assert (saved["max_position_embeddings"] == 32) == (case != "llama 3.1")
    inputs = tokenizer("a document", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    ending = transformers.LogitsProcessorList([EndAfterThree(length, ids["eos_token_id"])])
    made = model.generate(**inputs, max_new_tokens=20, do_sample=False, logits_processor=ending)
    assert made.shape[1] == length + 3 and made[0, -1] == ids["eos_token_id"]
