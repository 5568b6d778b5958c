"""LlamaConfig: the sizes and constants of a LLaMA model, read from a JSON file of configs/.

A class of our own: importing that of transformers takes 1.3 seconds, because it loads torchvision.
`to_dict` returns what transformers' class would return, so a checkpoint's config.json can be read
by `AutoModelForCausalLM.from_pretrained`.
"""

import difflib
import importlib.metadata
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loguru import logger

from peft_pretraining.errors import UserError

# Keys that transformers 5 writes for every kind of model, with their defaults. They do not change
# this model.
GENERAL_KEYS = {
    "architectures": None,
    "output_hidden_states": False,
    "return_dict": True,
    "dtype": None,
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "problem_type": None,
}
LAST_KEYS = ("_name_or_path", "output_attentions")
# Keys whose values in a file are not kept: `to_dict` writes the first anew, and `rope_parameters`
# takes the values of the other two.
REPLACED_KEYS = ("transformers_version", "rope_theta", "rope_scaling")
# Further keys that configs on the Hub have, and that do not change this model.
HARMLESS_KEYS = (
    "model_type",
    "max_sequence_length",
    "torch_dtype",
    "auto_map",
    "unk_token_id",
    "sliding_window",
    "tie_encoder_decoder",
)
NUMBERS = ("rms_norm_eps", "initializer_range", "rope_theta", "attention_dropout")
BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
)


@dataclass(frozen=True)
class LlamaConfig:
    """The configuration of a LLaMA model, under transformers' names and with its defaults.

    Args:
        vocab_size: number of token embeddings.
        hidden_size: width d of the hidden states.
        intermediate_size: width of the MLP's hidden layer.
        num_hidden_layers: number of transformer blocks.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads (default: as many as query heads).
        initializer_range: standard deviation of the initial weights.
        rms_norm_eps: added to the mean square in RMSNorm.
        tie_word_embeddings: use the embedding as the output layer's weight.
        rope_parameters: base `rope_theta` and kind `rope_type` of the rotary position embedding.
        head_dim: width of a head (default: hidden_size / num_attention_heads).
        general: values of GENERAL_KEYS and LAST_KEYS that the file gives.
        extra: keys of the file that this class does not know, and `model_type`.

    The other fields do not change the model. They are kept because config.json contains them.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | None = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None
    general: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=lambda: {"model_type": "llama"})

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        rope = dict(self.rope_parameters or {})
        rope.setdefault("rope_theta", 10000.0)
        rope.setdefault("rope_type", rope.get("type", "default"))
        object.__setattr__(self, "rope_parameters", rope)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LlamaConfig":
        """Return the config of a JSON object in the format of transformers 4 or 5.

        Args:
            values: keys and values of a config.json.
        """
        own = {f.name for f in fields(cls)} - {"general", "extra"}
        settings = {name: value for name, value in values.items() if name in own}
        # transformers 5 has one dictionary for the rotary embedding, transformers 4 a number and
        # a dictionary.
        rope = settings.get("rope_parameters") or values.get("rope_scaling") or {}
        if values.get("rope_theta") is not None:
            rope = rope | {"rope_theta": rope.get("rope_theta", values["rope_theta"])}
        general = {k: v for k, v in values.items() if k in GENERAL_KEYS or k in LAST_KEYS}
        known = own | set(REPLACED_KEYS) | general.keys()
        extra = {name: value for name, value in values.items() if name not in known}
        extra.setdefault("model_type", "llama")
        return cls(**settings | {"rope_parameters": rope}, general=general, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """Return the keys and values that transformers' LlamaConfig returns."""
        own = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("general", "extra")
        }
        version = importlib.metadata.version("transformers")
        if version.startswith("4.") and self.rope_parameters:
            # transformers 4 reads these keys instead of rope_parameters.
            scaled = self.rope_parameters["rope_type"] != "default"
            own["rope_theta"] = self.rope_parameters["rope_theta"]
            own["rope_scaling"] = self.rope_parameters if scaled else None
        given = self.general
        return {
            "transformers_version": version,
            **{name: given.get(name, value) for name, value in GENERAL_KEYS.items()},
            **own,
            "_name_or_path": given.get("_name_or_path", ""),
            **self.extra,
            "output_attentions": given.get("output_attentions", False),
        }


def rope_of(config: Any) -> dict[str, Any]:
    """Return base `rope_theta` and kind `rope_type` of the rotary position embedding, and its more.

    Args:
        config: a config of this module or of transformers, whose version 4 keeps them elsewhere.
    """
    rope: dict[str, Any] = LlamaConfig.from_dict(config.to_dict()).rope_parameters or {}
    return rope


def load_config(path: str | Path) -> LlamaConfig:
    """Read a model config.

    Args:
        path: a JSON file as in configs/, or the config.json of a checkpoint.

    Raises:
        UserError: the file is missing or malformed, or its sizes do not fit each other.
    """
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in Path(path.parent).glob("*.json"))) or "none"
        raise UserError(f"--model_config {path}: no such file; configs in {path.parent}: {known}")
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise UserError(f"--model_config {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "llama":
        raise UserError(
            f"--model_config {path} is not a LLaMA config: it must contain "
            '"model_type": "llama" (see configs/llama_60m.json)'
        )
    for key in SIZES:
        if not isinstance(values.get(key), int) or isinstance(values[key], bool) or values[key] < 1:
            raise UserError(
                f"--model_config {path}: {key} must be a whole number above 0, "
                f"not {values.get(key)!r}"
            )
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    kv_heads = values.get("num_key_value_heads") or heads
    if hidden % heads or (hidden // heads) % 2 or heads % kv_heads:
        raise UserError(
            f"--model_config {path}: hidden_size {hidden} must be an even multiple of "
            f"num_attention_heads {heads}, and that a multiple of num_key_value_heads {kv_heads}"
        )
    _check_values(path, values)
    _check_keys(path, values)
    # The published configs say pad_token_id -1. torch would read it as the last row of the
    # embedding and keep word 31999 at zero. An id outside the vocabulary could not be loaded.
    if not 0 <= (values.get("pad_token_id") or 0) < values["vocab_size"]:
        values["pad_token_id"] = None
    return LlamaConfig.from_dict(values)


def _check_values(path: Path, values: dict[str, Any]) -> None:
    """Raise UserError for a value that transformers would refuse when the checkpoint is loaded."""
    for key in NUMBERS:
        value = values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"--model_config {path}: {key} must be a number, not {value!r}")
    for key in BOOLEANS:
        if not isinstance(values.get(key, False), bool):
            raise UserError(
                f"--model_config {path}: {key} must be true or false, not {values[key]!r}"
            )
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key), dict | None):
            raise UserError(
                f"--model_config {path}: {key} must be a JSON object or null, not {values[key]!r}"
            )
    if values.get("sliding_window") is not None:
        raise UserError(
            f"--model_config {path}: sliding_window {values['sliding_window']} is not implemented, "
            "attention is to all tokens before; remove the key or set it to null"
        )


def _check_keys(path: Path, values: dict[str, Any]) -> None:
    """Remove what a new model cannot have, and name the keys that nothing reads.

    Raises:
        UserError: A key looks like a known one that was mistyped.
    """
    if values.pop("quantization_config", None) is not None:
        logger.warning(
            f"{path}: quantization_config is left out, because the model is trained unquantized"
        )
    known = {f.name for f in fields(LlamaConfig)} - {"general", "extra"}
    known |= {*GENERAL_KEYS, *LAST_KEYS, *REPLACED_KEYS, *HARMLESS_KEYS}
    for key in sorted(values.keys() - known):
        similar = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if similar:
            raise UserError(
                f"--model_config {path}: {key} is no key of a LLaMA config; did you mean "
                f"{similar[0]}?"
            )
        logger.warning(f"{path}: {key} has no effect; it is kept in the checkpoints' config.json")
