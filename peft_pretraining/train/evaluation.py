"""Validation loss and perplexity."""

import contextlib
import math
from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from peft_pretraining.constants import IGNORE_INDEX
from peft_pretraining.parallel.fsdp import is_fsdp
from peft_pretraining.parallel.process_group import DistributedContext

MAX_EXPONENT = 709  # exp of a larger number overflows a float


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    ranks: DistributedContext,
    autocast: contextlib.AbstractContextManager,
) -> dict[str, float]:
    """Compute the loss over every target token of the batches of all ranks; padding is left out.

    Args:
        model: model(input_ids, labels) returns the sum of the negative log-likelihoods.
        batches: this rank's share, each with input_ids and labels [sequences, length]. Every rank
            must have the same number of batches, because the ranks of a sharded model communicate
            in each forward pass. A batch may have no target.
        ranks: the processes that evaluate together.
        autocast: the context of the forward pass.

    Returns:
        A dictionary with these keys:

        * `eval_loss`: mean negative log-likelihood (nats) per target token.
        * `perplexity`: exp of eval_loss.
        * `reference_perplexity`: what the published code would print, for comparison with published
          tables only. It averages the means of the batches and starts counting at 1, so n batches
          of mean loss L give exp(L n / (n + 1)).
        * `eval_tokens`: number of target tokens.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, targets
    sum_of_means, n_batches = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    model.eval()
    for batch in batches:
        input_ids, labels = batch["input_ids"].to(ranks.device), batch["labels"].to(ranks.device)
        with autocast:
            loss = model(input_ids, labels).double()
        targets = (labels[:, 1:] != IGNORE_INDEX).sum()
        sums += torch.stack([loss, targets.double()])
        sum_of_means += loss / targets.clamp_min(1)
        n_batches += targets > 0
    if is_fsdp(model):
        # Without a backward pass the parameters outside the blocks stay gathered. Free them, or
        # they would be mistaken for the sharded ones.
        model.reshard()
    model.train()
    reference_loss = ranks.sum(sum_of_means / (n_batches + 1)) / ranks.world_size
    loss_sum, n_targets = ranks.sum(sums).tolist()
    mean = loss_sum / max(n_targets, 1)
    return {
        "eval_loss": mean,
        "perplexity": perplexity(mean),
        "reference_perplexity": perplexity(float(reference_loss)),
        "eval_tokens": int(n_targets),
    }


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that overflows. loss: nats per token."""
    return math.inf if loss > MAX_EXPONENT else math.exp(loss)
