"""Gradient clipping, and the mean weight decay."""

import pytest
import torch

from peft_pretraining.optim.gradients import clip_gradients, mean_decay


def test_clipping():
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.zeros(2))
    model.without_gradient = torch.nn.Parameter(torch.zeros(2))
    model.p.grad = torch.tensor([3.0, 4.0])
    assert float(clip_gradients(model, 0.0)) == 5 and model.p.grad.tolist() == [3, 4]
    assert float(clip_gradients(model, 1.0)) == 5
    assert model.p.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-4)


def test_the_mean_decay_counts_parameters():
    groups = [
        {"params": [torch.zeros(n, requires_grad=True)], "weight_decay": d}
        for n, d in ((1, 1.0), (3, 5.0))
    ]
    assert mean_decay(torch.optim.SGD(groups)) == 4.0
