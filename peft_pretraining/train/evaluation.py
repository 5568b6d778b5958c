"""Perplexity on the validation rows."""

import contextlib
import math
from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.parallel.fsdp import FSDPModule
from peft_pretraining.parallel.process_group import DistributedContext


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    ranks: DistributedContext,
    autocast: contextlib.AbstractContextManager,
) -> dict[str, float]:
    """Loss over every non-pad target token of the batches of all ranks.

    Args:
        model: called as model(input_ids, labels), gives the sum of the negative log-likelihoods.
        batches: this rank's share: input_ids and labels, [rows, length], as many on every rank: those of a sharded model meet in each
            forward pass. There may be some without a target.

    Returns:
        eval_loss: mean negative log-likelihood (nats) per target token. perplexity: exp of it. reference_perplexity: what
        the published code would print: it averages the means of the batches and starts its count at 1, so n batches
        of mean loss L give exp(L n / (n + 1)); only for comparison with published tables. eval_tokens: target tokens.
    """
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, targets
    means, n_batches = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    model.eval()
    for batch in batches:
        input_ids, labels = batch["input_ids"].to(ranks.device), batch["labels"].to(ranks.device)
        with autocast:
            loss = model(input_ids, labels).double()
        targets = (labels[:, 1:] != IGNORE_INDEX).sum()
        total += torch.stack([loss, targets.double()])
        means += loss / targets.clamp_min(1)
        n_batches += targets > 0
    if isinstance(model, FSDPModule):
        model.reshard()  # without a backward pass the root's parameters stay whole, and would be taken for the model's own
    model.train()
    biased = ranks.sum(means / (n_batches + 1)) / ranks.world_size
    loss_sum, targets = ranks.sum(total).tolist()
    mean = loss_sum / max(targets, 1)
    return {
        "eval_loss": mean,
        "perplexity": perplexity(mean),
        "reference_perplexity": perplexity(float(biased)),
        "eval_tokens": int(targets),
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it overflows."""
    return math.inf if loss > 709 else math.exp(loss)
