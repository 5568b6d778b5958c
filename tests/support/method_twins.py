"""Compare each method over 20 updates with a plain twin in NumPy, after every update.

Runs in one process (test_methods.py) and on every rank under torchrun (distributed_methods.py),
where each rank has a share of the batch and the twin all of it. Everything is float64, so that what
differs is the method and not rounding.
"""

import argparse
import copy
import math
import shlex

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import transformers

from alphadecay.cli.flags import add_flags, decay_from_flags, register_decay_hooks
from alphadecay.cli.presets import parse_arguments
from alphadecay.controls import permutation
from alphadecay.param_groups import split_hidden
from peft_pretraining.model.modeling_llama import build_model
from peft_pretraining.optim.optimizer import build_optimizer
from tests.support import reference

STEPS, EVERY, ETA, LR, PEAK = 20, 5, 0.1, 1e-2, 1.5e-2
BETAS, EPS = (0.9, 0.999), 1e-8
MULTIPLIERS = {"q_proj": 0.5, "down_proj": 2.0}
BOTH = (
    "wd0",
    "uniform",
    "awd",
    "adadecay",
    "adadecay-module",
    "alphadecay",
    "inverted",
    "shuffled",
    "one_shot",
    "quantile",
    "gradnorm",
    "farms",
    "type_constant --type_multipliers q_proj=0.5,down_proj=2",
    "alphadecay --iso_budget",
    "shuffled --iso_budget",
)
DECOUPLED = (
    "uniform --adamc",
    "uniform --cautious_decay",
    "alphadecay --adamc --cautious_decay",
    "gradnorm --iso_budget --adamc",
    "awd --cautious_decay",
)
CASES = [(method, optimizer) for method in BOTH for optimizer in ("adam", "adamw")] + [
    (method, "adamw") for method in DECOUPLED
]


def small_llama():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return build_model(transformers.LlamaConfig(**sizes, pad_token_id=None)).double()


def batch(step):
    return torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(step))


def learning_rate(step):
    return LR * (1 - 0.03 * step)


def parsed(method, optimizer):
    parser = argparse.ArgumentParser()
    parser.add_argument("--weight_decay", type=float, default=ETA)
    parser.add_argument("--lr", type=float, default=PEAK)
    parser.add_argument("--optimizer", default=optimizer)
    add_flags(parser)
    return parse_arguments(parser, shlex.split(f"--method {method} --unbalancedWD_every {EVERY}"))


def greatest_deviation(method, optimizer_name):
    """Between the weights of the method and of its twin, over all elements and updates."""
    args = parsed(method, optimizer_name)
    model = small_llama()
    twin = Twin(copy.deepcopy(model), method, optimizer_name)
    decay = decay_from_flags(args, model, awd_factor=100)
    groups = (
        decay.param_groups()
        if decay
        else [{"params": list(model.parameters()), "weight_decay": args.weight_decay}]
    )
    optimizer = build_optimizer(optimizer_name, split_hidden(groups, model), PEAK, BETAS, EPS)
    register_decay_hooks(args, optimizer)
    parallel = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    worst = 0.0
    for step in range(1, STEPS + 1):
        share = batch(step)
        if dist.is_initialized():
            share = share.chunk(dist.get_world_size())[dist.get_rank()]
        parallel(share, share).div(share[:, 1:].numel()).backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        if decay:
            decay.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        twin.step(step)
        pairs = zip(model.parameters(), twin.model.parameters(), strict=True)
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in pairs))
    return worst


class Twin:
    def __init__(self, model, method, optimizer):
        self.model, (self.name, *self.options), self.optimizer = model, method.split(), optimizer
        self.moments = {name: (0.0, 0.0) for name, _ in model.named_parameters()}
        self.average = 0.0
        self.by_module = {}
        self.analyse(0)

    def step(self, step):
        ids = batch(step)
        self.model.zero_grad()
        self.model(ids, ids).div(ids[:, 1:].numel()).backward()
        lr = learning_rate(step)
        if step % EVERY == 0 and not (self.name == "one_shot" and step > EVERY):
            self.analyse(step)
        if self.name == "awd":
            gradient, weight = (
                math.sqrt(sum(float((x**2).sum()) for x in xs))
                for xs in zip(
                    *((p.grad.numpy(), p.detach().numpy()) for p in self.model.parameters()),
                    strict=True,
                )
            )
            self.average = 0.1 * self.average + 0.9 * 100 * ETA * gradient / weight
        for name, parameter in self.model.named_parameters():
            self.update(name, parameter, step, lr)

    def update(self, name, parameter, step, lr):
        w, g = parameter.detach().numpy(), parameter.grad.numpy().copy()
        decay = self.decay_of(name, g)
        if self.optimizer == "adam":
            g = g + decay * w
        m, v = self.moments[name]
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        self.moments[name] = m, v
        move = m / (1 - BETAS[0] ** step) / (np.sqrt(v / (1 - BETAS[1] ** step)) + EPS)
        shrink = 0.0
        if self.optimizer == "adamw":
            hidden = name.startswith("model.layers") and w.ndim == 2
            shrink = lr * decay * (lr / PEAK if "--adamc" in self.options and hidden else 1)
            if "--cautious_decay" in self.options:
                shrink = shrink * (move * w > 0)
        w[...] = w - lr * move - shrink * w

    def decay_of(self, name, g):
        if self.name == "wd0":
            return 0.0
        if self.name == "awd":
            return self.average
        if self.name == "adadecay":
            size = np.abs(g)
            std = math.sqrt(((size - size.mean()) ** 2).mean())
            return ETA * 2 / (1 + np.exp(-4 * (size - size.mean()) / std))
        return self.by_module.get(name.removesuffix(".weight"), ETA)

    def analyse(self, step):
        if self.name in ("wd0", "uniform", "awd", "adadecay"):
            return
        modules = reference.balanced(self.model)
        names, sizes = [n for n, _ in modules], [w.numel() for _, w in modules]
        if self.name == "type_constant":
            given = [ETA * MULTIPLIERS.get(n.split(".")[-1], 1) for n in names]
        else:
            scores = [self.score(weight) for _, weight in modules]
            if self.name == "inverted":
                scores = reference.reverse(scores)
            mapping = {"quantile": "tb_quantile", "adadecay-module": "layerwise_sigmoid"}.get(
                self.name, "tb_linear_map"
            )
            if min(scores) == max(scores):  # no gradient yet
                given = [ETA * (1 if mapping == "layerwise_sigmoid" else (0.6666 + 3) / 2)] * len(
                    names
                )
            else:
                given = reference.decays(
                    scores, ETA, mapping, 0.6666, 3, [".".join(n.split(".")[:3]) for n in names]
                )
        if self.name == "shuffled":
            given = [given[source] for source in permutation(len(given), 0)]
        if "--iso_budget" in self.options:
            mean = sum(s * d for s, d in zip(sizes, given, strict=True)) / sum(sizes)
            given = [d * ETA / mean for d in given]
        self.by_module = dict(zip(names, given, strict=True))

    def score(self, weight):
        if self.name in ("gradnorm", "adadecay-module"):
            return (
                10.0 if weight.grad is None else math.sqrt(float((weight.grad.numpy() ** 2).sum()))
            )
        values = (
            reference.window_eigenvalues(weight)
            if self.name == "farms"
            else reference.eigenvalues(weight)
        )
        return reference.fit(values)[0]
