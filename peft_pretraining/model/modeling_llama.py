"""Minimal LLaMA for pretraining, weight-compatible with transformers' LlamaForCausalLM.

Parameter names and outputs are those of transformers, so a checkpoint can be loaded with
`AutoModelForCausalLM.from_pretrained`. There is no key-value cache, no padding mask and no text
generation. Sequences are padded on the right, so with causal attention no real token attends to
padding.
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.errors import UserError
from peft_pretraining.model.config import LlamaConfig, load_config, rope_of  # noqa: F401
from peft_pretraining.model.linear_cross_entropy import LOSSES, Chunked, Loss

CAUSAL_ATTENTION = "causal_sdpa"  # name of an attention function of transformers' models


def check_supported(config: LlamaConfig) -> None:
    """Check that this model implements everything that the config asks for.

    Otherwise another model than the configured one would be trained without notice.

    Raises:
        UserError: the config asks for something that this model does not implement.
    """
    rope_type = rope_of(config)["rope_type"]
    reasons = [
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r} (only silu)"),
        (config.attention_bias or config.mlp_bias, "attention_bias or mlp_bias"),
        (bool(config.attention_dropout), "attention_dropout"),
        (rope_type != "default", f"rope_type {rope_type!r}"),
        (
            config.head_dim != config.hidden_size // config.num_attention_heads,
            "a head_dim other than hidden_size / heads",
        ),
    ]
    for unsupported, what in reasons:
        if unsupported:
            raise UserError(
                f"the model config asks for {what}, which the built-in LLaMA does not implement: "
                "add --use_hf_model"
            )


class Attention(nn.Module):
    """Causal grouped-query attention with rotary position embeddings."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        kv_heads = config.num_key_value_heads or heads
        self.head_dim = hidden // heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.grouped = kv_heads != heads

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = (
            projection(x)
            .view(batch, seq, -1, self.head_dim)
            .transpose(1, 2)  # [batch, heads, seq, head_dim]
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, *rotation), apply_rotary(k, *rotation)
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
    """A transformer block: attention and MLP, each with a norm before it and a residual around."""

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
    """Embedding, blocks and final norm: token ids [batch, seq] -> hidden states [batch, seq, d]."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.rope_theta = rope_of(config)["rope_theta"]
        self.gradient_checkpointing = False
        # The id that ends a document. If it is set, attention stays within documents.
        self.end_of_document: int | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        rotation = rotary_cos_sin(
            input_ids.shape[1], self.head_dim, self.rope_theta, x.device, x.dtype
        )
        mask = (
            None if self.end_of_document is None else document_mask(input_ids, self.end_of_document)
        )
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rotation, mask, use_reentrant=False)
            else:
                x = layer(x, rotation, mask)
        return self.norm(x)


class TrainableLlama(nn.Module):
    """The interface that the training loop needs, for any implementation of LLaMA.

    It adds the loss and the compilation of the blocks. The class that inherits from it has `model`,
    which returns hidden states, and `lm_head`, whose weight is [vocab, hidden].
    """

    model: Any
    lm_head: nn.Linear
    loss: Loss
    gradient_checkpointing_enable: Any

    def set_loss(self, name: str) -> None:
        """Set how the loss is computed: a name of `LOSSES`."""
        self.loss = LOSSES[name]()

    def summed_loss(self, hidden: Tensor, labels: Tensor, positions: Tensor | None) -> Tensor:
        """Return the summed negative log-likelihood of each label given the tokens before it.

        Args:
            hidden: hidden states [batch, seq, hidden].
            labels: [batch, seq], not shifted, -100 where there is no target.
            positions: `target_positions(labels)`, if the caller has computed it. Computing it here
                makes the host wait for the GPU.

        Returns:
            The sum in nats, a float32 scalar.
        """
        positions = target_positions(labels) if positions is None else positions
        return self.loss(
            hidden.flatten(0, 1).index_select(0, positions),
            self.lm_head.weight,
            labels.flatten().index_select(0, positions + 1),
        )

    def confine_attention(self, end_of_document: int) -> None:
        """Restrict the attention in packed sequences to the tokens of the same document.

        The rotary positions need no reset, because attention depends on relative positions only.

        Args:
            end_of_document: the token id that ends each document.
        """
        raise NotImplementedError("only the built-in model can do this")

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile; all blocks share one graph, for static shapes.

        The chunked loss is compiled, too. Otherwise only the blocks are, not the whole model, so
        that the gradients of a block can be summed over the ranks while those of the block below
        are computed. The names of modules and parameters do not change.
        """
        # Otherwise Dynamo splits a graph where DistributedDataParallel's buckets of gradients end,
        # so that a compiled whole model can communicate in between. A block is smaller than that.
        torch._dynamo.config.optimize_ddp = False
        for layer in self.model.layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
        if isinstance(self.loss, Chunked):
            self.loss.compile()


class LlamaForCausalLM(TrainableLlama):
    """LLaMA with its output layer, randomly initialised.

    Args:
        config: sizes and constants.

    Raises:
        UserError: see `check_supported`.
    """

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
        """Keep only the inputs of the blocks for the backward pass and recompute the rest."""
        self.model.gradient_checkpointing = True

    def confine_attention(self, end_of_document: int) -> None:
        """Restrict the attention in packed sequences; see the base class."""
        self.model.end_of_document = end_of_document

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return logits [batch, seq, vocab], or the summed loss if there are labels.

        Args:
            input_ids: token ids [batch, seq].
            labels, positions: see `summed_loss`.
        """
        hidden = self.model(input_ids)
        if labels is None:
            return self.lm_head(hidden)
        return self.summed_loss(hidden, labels, positions)


def target_positions(labels: Tensor) -> Tensor:
    """Return the positions of the tokens that are followed by a target.

    Args:
        labels: [batch, seq], -100 where there is no target.

    Returns:
        Indices of the flattened labels, int64 [targets].
    """
    return F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1)).flatten().nonzero().squeeze(1)


def document_mask(input_ids: Tensor, end: int) -> Tensor:
    """Return which tokens each token attends to: itself and those before it in its document.

    Args:
        input_ids: token ids of packed documents [batch, seq].
        end: the id that ends each document.

    Returns:
        Boolean [batch, 1, seq, seq]: True where the token of the row attends to that of the column.
    """
    ends = input_ids == end
    # The end-of-document token belongs to the document that it ends.
    documents = ends.cumsum(1) - ends.int()
    seq = input_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=input_ids.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]


def rotary_cos_sin(
    seq: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [seq, head_dim] of the rotary angles, computed in float32.

    The rotary position embedding is that of Su et al. 2021 (arXiv 2104.09864).
    """
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(theta) / head_dim * exponents)
    positions = torch.arange(seq, device=device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (j, j + head_dim / 2) of x [batch, heads, seq, head_dim].

    Which entries form a pair is transformers' convention.
    """
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def build_model(config: LlamaConfig, use_hf_model: bool = False) -> TrainableLlama:
    """Build a randomly initialised LLaMA.

    Args:
        config: sizes and constants.
        use_hf_model: build transformers' implementation, with the loss of this module added. The
            parameter names are the same.

    Raises:
        UserError: see `check_supported`; only for the built-in implementation.
    """
    if not use_hf_model:
        return LlamaForCausalLM(config)
    # Imported only here: transformers' model takes seconds to import.
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # It is transformers' own attention. Under another name it gets no mask and is causal, and
    # transformers does not ask the device in every pass whether the sequences are packed, for which
    # the host would have to wait.
    transformers.AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)

    class TransformersLlamaWithLoss(TrainableLlama, transformers.LlamaForCausalLM):
        def forward(
            self,
            input_ids: Tensor,
            labels: Tensor | None = None,
            positions: Tensor | None = None,
        ) -> Tensor:
            hidden = self.model(input_ids, use_cache=False).last_hidden_state
            if labels is None:
                return self.lm_head(hidden)
            return self.summed_loss(hidden, labels, positions)

    values = config.to_dict() | {"attn_implementation": CAUSAL_ATTENTION}
    model = TransformersLlamaWithLoss(transformers.LlamaConfig(**values))
    model.set_loss("chunked")
    return model
