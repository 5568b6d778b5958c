"""LLaMA, lean: what pretraining needs and nothing else, with the weights of transformers' LlamaForCausalLM.

Parameter names and numbers are transformers' (a checkpoint loads with `AutoModelForCausalLM.from_pretrained`); there is no
cache, no mask and no generation. Rows are padded on the right, so causal attention alone keeps pads from real tokens.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.errors import UserError
from peft_pretraining.model.linear_cross_entropy import LOSSES


def load_config(path: str | Path) -> LlamaConfig:
    """Read a model config, a JSON file as in configs/. Raises UserError for what is missing, malformed or not supported."""
    path = Path(path)
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in Path(path.parent).glob("*.json"))) or "none"
        raise UserError(f"--model_config {path}: no such file; configs in {path.parent}: {known}")
    try:
        values = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"--model_config {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict) or values.get("model_type") != "llama":
        raise UserError(
            f'--model_config {path} is no LLaMA config: it must hold "model_type": "llama" (see configs/llama_60m.json)'
        )
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
    ):
        if not isinstance(values.get(key), int) or isinstance(values[key], bool) or values[key] < 1:
            raise UserError(
                f"--model_config {path}: {key} must be a whole number above 0, not {values.get(key)!r}"
            )
    heads, kv_heads = (
        values["num_attention_heads"],
        values.get("num_key_value_heads") or values["num_attention_heads"],
    )
    if values["hidden_size"] % heads or (values["hidden_size"] // heads) % 2 or heads % kv_heads:
        raise UserError(
            f"--model_config {path}: hidden_size {values['hidden_size']} must be an even multiple of num_attention_heads {heads}, "
            f"and that a multiple of num_key_value_heads {kv_heads}"
        )
    # The published configs say pad_token_id -1; torch reads it as "the last row", and freezes word 31999 at zero.
    if values.get("pad_token_id") is not None and values["pad_token_id"] < 0:
        values["pad_token_id"] = None
    return LlamaConfig(**values)


def check_supported(config: LlamaConfig) -> None:
    """Refuse what this lean model leaves out, so that it never silently trains another model than the config says."""
    rope = _rope_parameters(config)
    reasons = [
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r} (only silu)"),
        (config.attention_bias or config.mlp_bias, "attention_bias or mlp_bias"),
        (bool(config.attention_dropout), "attention_dropout"),
        (rope.get("rope_type", "default") != "default", f"rope_type {rope.get('rope_type')!r}"),
        (
            config.head_dim * config.num_attention_heads != config.hidden_size,
            "a head_dim other than hidden_size / heads",
        ),
    ]
    for unsupported, what in reasons:
        if unsupported:
            raise UserError(
                f"the model config asks for {what}, which the built-in LLaMA leaves out: add --use_hf_model"
            )


def _rope_parameters(config: LlamaConfig) -> dict:
    # transformers 5 keeps one dictionary; 4 a number and a dictionary for scaled variants.
    parameters = (
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    return {"rope_theta": getattr(config, "rope_theta", 10000.0), **parameters}


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.grouped = config.num_key_value_heads != config.num_attention_heads

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = (
            projection(x)
            .view(batch, seq, -1, self.head_dim)
            .transpose(1, 2)  # [batch, heads, seq, head_dim]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.o_proj(attended.transpose(1, 2).reshape(batch, seq, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: [batch, seq] token ids -> [batch, seq, hidden]."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = _rope_parameters(config)["rope_theta"]
        self.gradient_checkpointing = False
        self.end_of_document: int | None = None  # with this id attention stays within documents

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        rotation = rotation_of_positions(
            input_ids.shape[1], self.head_dim, self.rope_theta, x.device, x.dtype
        )
        mask = (
            None
            if self.end_of_document is None
            else within_documents(input_ids, self.end_of_document)
        )
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rotation, mask, use_reentrant=False)
            else:
                x = layer(x, rotation, mask)
        return self.norm(x)


class Trainable:
    """What the training loop asks of a model, beside transformers' parameter names. Of the class that mixes it in: `model` gives hidden
    states, `lm_head` holds the head's weight [vocab, hidden]."""

    def set_loss(self, name: str) -> None:
        """How the loss is computed: one of `LOSSES`."""
        self.loss = LOSSES[name]()

    def summed_loss(self, hidden: Tensor, labels: Tensor, rows: Tensor | None) -> Tensor:
        """Sum of the negative log-likelihoods (nats, float32) of each label given the tokens before it.

        Args:
            hidden: [batch, seq, hidden].
            labels: [batch, seq], unshifted, -100 where there is no target.
            rows: `target_rows(labels)`, where the caller knows them. Found here otherwise, and a GPU waited for.
        """
        rows = target_rows(labels) if rows is None else rows
        return self.loss(
            hidden.flatten(0, 1).index_select(0, rows),
            self.lm_head.weight,
            labels.flatten().index_select(0, rows + 1),
        )

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile: one graph, which all of them share, for static shapes.

        Not the whole model: gradients of a block are exchanged while those of the block below are computed. Names of modules and
        parameters stay as they are.
        """
        for layer in self.model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)


class LlamaForCausalLM(Trainable, nn.Module):
    """The whole model. `model(input_ids)` gives logits [batch, seq, vocab]; `model(input_ids, labels)` the summed loss."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        check_supported(config)
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.set_loss("chunked")

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    def gradient_checkpointing_enable(self) -> None:
        """Keep only the blocks' inputs for the backward pass and compute the rest again (slower, less memory)."""
        self.model.gradient_checkpointing = True

    def confine_attention(self, end_of_document: int) -> None:
        """Let no token of a packed row see the documents before its own; each document ends with this id.

        Rotary positions count: attention depends on distances alone, so they need no reset.
        """
        self.model.end_of_document = end_of_document

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Logits [batch, seq, vocab], or with labels [batch, seq] the summed loss, see `summed_loss`."""
        hidden = self.model(input_ids)
        return self.lm_head(hidden) if labels is None else self.summed_loss(hidden, labels, rows)


def target_rows(labels: Tensor) -> Tensor:
    """Where a token has a target after it: indices of the flattened labels [batch, seq], int64 [n]."""
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)


def within_documents(input_ids: Tensor, end: int) -> Tensor:
    """Which token may see which: itself and those before it in its document, which ends with the id `end`. Boolean [batch, 1, seq, seq]."""
    ends = input_ids == end
    documents = ends.cumsum(1) - ends.int()  # its end belongs to a document
    seq = input_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=input_ids.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def rotation_of_positions(
    seq: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [seq, head_dim] of the rotary angles (Su et al., arXiv 2104.09864), made in float32."""
    frequencies = torch.exp(
        -math.log(theta)
        / head_dim
        * torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    )
    angles = torch.outer(torch.arange(seq, device=device, dtype=torch.float32), frequencies).repeat(
        1, 2
    )
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + head_dim / 2) of x [batch, heads, seq, head_dim], transformers' convention."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def build_model(config: LlamaConfig, use_hf_model: bool = False) -> nn.Module:
    """Our LLaMA, or transformers' own behind the same interface and parameter names. Raises UserError, see `check_supported`."""
    if not use_hf_model:
        return LlamaForCausalLM(config)
    from transformers import LlamaForCausalLM as TransformersLlama

    class TransformersLlamaWithLoss(Trainable, TransformersLlama):
        def forward(
            self, input_ids: Tensor, labels: Tensor | None = None, rows: Tensor | None = None
        ) -> Tensor:
            hidden = self.model(input_ids, use_cache=False).last_hidden_state
            return (
                self.lm_head(hidden) if labels is None else self.summed_loss(hidden, labels, rows)
            )

    model = TransformersLlamaWithLoss(config)
    model.set_loss("chunked")
    return model
