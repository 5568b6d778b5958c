"""Validation loss and perplexity."""

import contextlib
import math

import pytest
import torch
import transformers

from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train.evaluation import evaluate, perplexity

ALONE = DistributedContext(0, 0, 1, torch.device("cpu"))


def small_model():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return build_model(transformers.LlamaConfig(**sizes, pad_token_id=None))


def test_perplexity_counts_every_target_once():
    """Pads, a short last batch, and the published code's count that starts at 1."""
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rows in (4, 4, 1):
        ids = torch.randint(64, (rows, 10), generator=generator)
        labels = ids.clone()
        for row in range(rows):
            labels[row, int(torch.randint(1, 11, (), generator=generator)) :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    losses, means = [], []
    with torch.no_grad():
        for batch in batches:
            log_p = model(batch["input_ids"]).log_softmax(-1)
            targets = [
                (r, t)
                for r, row in enumerate(batch["labels"])
                for t in range(1, 10)
                if row[t] != -100
            ]
            batch_losses = [-float(log_p[r, t - 1, batch["labels"][r, t]]) for r, t in targets]
            losses += batch_losses
            means.append(sum(batch_losses) / max(1, len(batch_losses)))
    result = evaluate(model, batches, ALONE, contextlib.nullcontext())
    assert result["eval_tokens"] == len(losses)
    assert result["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)
    assert result["reference_perplexity"] == pytest.approx(math.exp(sum(means) / 4), rel=1e-6)


def test_a_batch_without_targets():
    model = small_model()
    ids = torch.arange(10)[None]
    batches = [{"input_ids": ids, "labels": labels} for labels in (ids, torch.full_like(ids, -100))]
    result = evaluate(model, batches, ALONE, contextlib.nullcontext())
    assert model.training
    assert result["reference_perplexity"] == pytest.approx(
        math.exp(result["eval_loss"] / 2)
    )  # it counts for nothing
    assert perplexity(1e4) == math.inf and math.isnan(perplexity(math.nan))
