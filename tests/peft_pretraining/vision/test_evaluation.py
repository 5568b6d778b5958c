"""Accuracy over all ranks, compared with a plain loop."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.vision.datasets import read_class_folders
from peft_pretraining.vision.evaluation import evaluate
from peft_pretraining.vision.loader import ValidationSamples, validation_batches
from peft_pretraining.vision.transforms import validation_transform
from tests.support.vision import arguments


class OneOfManyRanks(DistributedContext):
    """A rank that records its own part of the sums instead of adding up those of all ranks."""

    def sum(self, values):
        self.__dict__.setdefault("parts", []).append(values.clone())
        return values


@pytest.mark.parametrize("world_size", [1, 2, 3, 13])
@pytest.mark.parametrize("batch_size", [1, 5, 12, 64])
def test_accuracy_counts_every_image_once(folder, world_size, batch_size):
    """The sums over all ranks equal those of a plain loop over the 12 images.

    With 13 ranks one of them has no image.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 7))
    images, plain = read_class_folders(folder / "val"), validation_transform(arguments())
    with torch.no_grad():
        logits = torch.cat([model(plain(images.read(i))[None]) for i in range(12)])
    labels = torch.from_numpy(images.labels)
    correct = sum(int(logits[i].argmax() == labels[i]) for i in range(12))
    ranking = logits.argsort(dim=1, descending=True)
    correct_in_5 = sum(int(labels[i]) in ranking[i, :5].tolist() for i in range(12))
    total = torch.zeros(4, dtype=torch.float64)
    for rank in range(world_size):
        share = OneOfManyRanks(rank, rank, 1, torch.device("cpu"))
        batches = validation_batches(
            ValidationSamples(images, plain, False), batch_size, rank, world_size, 0, False
        )
        if rank < 12:
            evaluate(model, batches, share, torch.autocast("cpu", enabled=False))
            images_of_rank, sums = share.parts
            total += torch.cat([sums, images_of_rank[None]])
        else:
            assert list(batches) == []
    assert total[1:].tolist() == [correct, correct_in_5, 12]
    assert float(total[0]) == pytest.approx(
        float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-6
    )
