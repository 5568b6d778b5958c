"""Loss and accuracy on the validation images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.vision.loader import Batch


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    ranks: DistributedContext,
    autocast: contextlib.AbstractContextManager,
) -> dict[str, float]:
    """Return loss and accuracy over every image of the batches of all ranks.

    Args:
        model: maps images to logits [n, classes], on any device.
        batches: this rank's batches, of any sizes; a rank may have none.
        ranks: the ranks of the run.
        autocast: context of the forward passes.

    Returns:
        eval_loss: mean cross-entropy in nats. top1, top5: percentage of the images whose class is
        the most probable one, or among the five most probable. eval_images: number of images.

    Raises:
        UserError: on all ranks, if one of them cannot read its images or if there are none at all.
    """
    device = next(model.parameters()).device
    # Sums of the loss, of correct images, and of images correct among five. The images are counted
    # on the host.
    sums, n_images = torch.zeros(3, dtype=torch.float64, device=device), 0
    problem, was_training = None, model.training
    model.eval()
    try:
        for batch in batches:
            images, labels = (
                batch[key].to(device, non_blocking=True) for key in ("images", "labels")
            )
            if not len(labels):
                continue  # every image of the batch was unreadable and skipped
            with autocast:
                logits = model(images).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()]).double()
            n_images += len(labels)
    except UserError as error:
        problem = str(error)
    model.train(was_training)
    ranks.raise_together(problem)
    n_images = int(ranks.sum(torch.tensor(n_images)))
    loss_sum, correct, correct_in_5 = ranks.sum(sums.to(ranks.device)).tolist()
    if not n_images:
        raise UserError("no validation image can be read")
    return {
        "eval_loss": loss_sum / n_images,
        "top1": 100 * correct / n_images,
        "top5": 100 * correct_in_5 / n_images,
        "eval_images": n_images,
    }
