"""Validation loss and perplexity."""

import contextlib
import math
from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor

from peft_pretraining.model.modeling_llama import target_positions
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
        model: model(input_ids, labels, positions) returns the sum of the negative
            log-likelihoods; see `TrainableLlama.summed_loss`.
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
    # The targets are found and counted on the CPU, so that the host does not wait for the device.
    loss_sum, sum_of_means = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    n_targets = n_batches = 0
    model.eval()
    for batch in batches:
        positions = target_positions(batch["labels"])
        inputs = (batch["input_ids"], batch["labels"], positions)
        with autocast:
            loss = model(*(_on_device(x, ranks.device) for x in inputs)).double()
        loss_sum += loss
        sum_of_means += loss / max(len(positions), 1)
        n_targets += len(positions)
        n_batches += len(positions) > 0
    if is_fsdp(model):
        # Without a backward pass the parameters outside the blocks stay gathered. Free them, or
        # they would be mistaken for the sharded ones.
        model.reshard()
    model.train()
    reference_loss = ranks.sum(sum_of_means / (n_batches + 1)) / ranks.world_size
    counts = torch.tensor(n_targets, dtype=torch.float64, device=ranks.device)
    loss_of_all, targets_of_all = ranks.sum(torch.stack([loss_sum, counts])).tolist()
    mean = loss_of_all / max(targets_of_all, 1)
    return {
        "eval_loss": mean,
        "perplexity": perplexity(mean),
        "reference_perplexity": perplexity(float(reference_loss)),
        "eval_tokens": int(targets_of_all),
    }


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device; the host does not wait for the copy to a GPU."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity where that overflows. loss: nats per token."""
    return math.inf if loss > MAX_EXPONENT else math.exp(loss)
