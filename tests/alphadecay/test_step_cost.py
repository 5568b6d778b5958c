"""An update reads no number from the device, because the host would wait for it."""

import types

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import torchrun_main
from alphadecay import AlphaDecay
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.optim.gradients import clip_gradients
from peft_pretraining.optim.nonfinite import NonFiniteGuard
from peft_pretraining.optim.optimizer import build_optimizer
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.train.step import set_learning_rate, update_weight_decays


class Waits(TorchDispatchMode):
    """Notes operations whose result the host must wait for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if (
            name in ("_local_scalar_dense", "is_nonzero", "item", "equal")
            or name == "nonzero"
            and args[0].dtype != torch.bool
        ):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def an_update(device):
    """Return a function that makes one update without an analysis, with pads and accumulation."""
    ranks = DistributedContext(0, 0, 1, device)
    config = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = build_model(transformers.LlamaConfig(**config, pad_token_id=None)).to(device)
    decay = AlphaDecay(model, 0.1, every=1000)
    optimizer = build_optimizer("adamw", decay.param_groups(), 1e-3)
    guard = NonFiniteGuard(optimizer, ranks, 10)
    nothing = types.SimpleNamespace(
        add_analysis=lambda *_: None, modules=lambda *_: None
    )  # the meter and the records
    ids = torch.randint(256, (4, 20))
    labels = ids.clone()
    labels[:, 12:] = -100
    autocast = torch.autocast(device.type, torch.bfloat16)

    def update(number):
        batches = [{"input_ids": ids, "labels": labels}] * 2
        loss = torchrun_main.forward_backward(model, batches, number, 88, 0, autocast, ranks)
        norm = clip_gradients(model, 1.0)
        guard.check_update(number, loss, norm)
        set_learning_rate(optimizer, 1e-3)
        update_weight_decays(decay, optimizer, number, nothing, nothing)
        optimizer.step()
        optimizer.zero_grad()
        return norm, guard

    return update


def test_no_number_is_asked_for():
    update = an_update(torch.device("cpu"))
    update(1)
    with Waits() as waits:
        norm, guard = update(2)
    assert waits.seen == []
    with Waits() as waits:
        float(norm)
    assert waits.seen == ["_local_scalar_dense"]  # the test sees one
    assert guard.resolve_pending()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for():
    update = an_update(torch.device("cuda"))
    update(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
