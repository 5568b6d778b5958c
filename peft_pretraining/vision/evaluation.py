"""Accuracy on the validation images."""

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
    """Loss and accuracy over every image of the batches of all ranks.

    Args:
        model: images -> logits [n, classes], on any device.
        batches: this rank's share; batches may be of any sizes, and there may be none.

    Returns:
        eval_loss: mean cross-entropy (nats). top1, top5: per cent of the images whose class is the first, or among the first five.
        eval_images: how many there were.

    Raises UserError on all ranks where one of them cannot read its images, or none has any.
    """
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, right, among five, images
    problem, trains = None, model.training
    model.eval()
    try:
        for batch in batches:
            images, labels = (
                batch[key].to(device, non_blocking=True) for key in ("images", "labels")
            )
            if not len(labels):
                continue  # all of its images were bad
            with autocast:
                logits = model(images).float()
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack(
                [loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=device)]
            ).double()
    except UserError as error:
        problem = str(error)
    model.train(trains)
    ranks.raise_together(problem)
    loss, first, among_five, images = ranks.sum(totals.to(ranks.device)).tolist()
    if not images:
        raise UserError("no validation image can be read")
    return {
        "eval_loss": loss / images,
        "top1": 100 * first / images,
        "top5": 100 * among_five / images,
        "eval_images": int(images),
    }
