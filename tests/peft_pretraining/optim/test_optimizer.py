"""The optimizers: coupled and decoupled decay, decay in bfloat16, temporary decays."""

import pytest
import torch

from peft_pretraining.optim.optimizer import build_optimizer, scaled_decays


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_decay_is_not_rounded_away_in_bfloat16(name):
    """The decay acts although lr * weight_decay is below the resolution of bfloat16."""
    plain, decayed = (
        [torch.nn.Parameter(torch.linspace(0.5, 2, 512).to(torch.bfloat16))] for _ in range(2)
    )
    for parameters, decay in ((plain, 0.0), (decayed, 0.1)):
        optimizer = build_optimizer(name, [{"params": parameters, "weight_decay": decay}], lr=1e-2)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            parameters[0].grad = torch.randn(512, generator=generator).to(torch.bfloat16)
            optimizer.step()
    assert float(decayed[0].detach().float().norm()) < float(plain[0].detach().float().norm())


@pytest.mark.parametrize("name, after", [("adam", 1.99), ("adamw", 1.998)])
def test_adam_is_coupled_and_adamw_is_not(name, after):
    """With a gradient of 0, Adam treats the decay as a gradient, and AdamW shrinks the weight."""
    parameter = torch.nn.Parameter(torch.full((4,), 2.0))
    parameter.grad = torch.zeros(4)
    build_optimizer(name, [{"params": [parameter], "weight_decay": 0.1}], lr=0.01).step()
    assert parameter.tolist() == pytest.approx([after] * 4, rel=1e-6)


def test_scaled_decays_are_restored():
    """Also after an exception inside the block."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "weight_decay": d} for d in (1, 3)]
    optimizer = build_optimizer("adamw", groups, lr=0.1)

    def decays():
        return [group["weight_decay"] for group in optimizer.param_groups]

    with pytest.raises(KeyError), scaled_decays(optimizer, 0.5):
        assert decays() == [0.5, 1.5]
        raise KeyError
    assert decays() == [1, 3]
