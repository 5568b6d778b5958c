"""Weight decays that are scaled for one update."""

import torch.nn as nn

from peft_pretraining.optim.optimizer import build_optimizer, scaled_decays


def test_scaled_decays_are_restored_after_each_update():
    layers = [nn.Linear(2, 2) for _ in range(2)]
    optimizer = build_optimizer(
        "adamw",
        [
            {"params": [m.weight], "weight_decay": d}
            for m, d in zip(layers, (0.1, 0.4), strict=True)
        ],
        1e-3,
    )
    for _ in range(3):
        with scaled_decays(optimizer, 0.5):
            assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.2]
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.4]
