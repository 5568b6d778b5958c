"""BatchNorm statistics of updates that are kept and of updates that are skipped."""

import math

import torch
import torch.nn as nn

from peft_pretraining.vision.batchnorm import BatchNormSync
from tests.support.vision import ALONE


def test_a_skipped_update_leaves_the_statistics_unchanged():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    statistics = BatchNormSync(model, ALONE)
    model(torch.randn(8, 3, 4, 4))
    kept = model[1].running_mean.clone()
    statistics.commit_or_roll_back(torch.tensor(0.0))
    assert torch.equal(model[1].running_mean, kept) and kept.abs().sum() > 0
    model(torch.full((8, 3, 4, 4), math.nan))
    assert model[1].running_mean.isnan().all()
    statistics.commit_or_roll_back(torch.tensor(1.0))
    assert torch.equal(model[1].running_mean, kept) and model[1].running_var.isfinite().all()
