"""Run folders with made-up records, for tests of reports, figures and tables."""

from __future__ import annotations

import json
import math

import numpy as np

LLAMA_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
ETA = 1e-5


def llama_modules(blocks):
    """Return (module, type, block) of a LLaMA's Linears, in the order of named_modules()."""
    owner = {kind: "self_attn" if kind in LLAMA_TYPES[:4] else "mlp" for kind in LLAMA_TYPES}
    return [
        (f"model.layers.{b}.{owner[kind]}.{kind}", kind, f"model.layers.{b}")
        for b in range(blocks)
        for kind in LLAMA_TYPES
    ]


def resnet_modules():
    """Return (module, type, block) with the names of a ResNet and a ViT.

    A stem and a head lie outside the blocks, and not every block has every type.
    """
    names = [("conv1", "conv1", None)]
    for stage in range(1, 5):
        for i in range(3):
            block = f"layer{stage}.{i}"
            names += [(f"{block}.conv{c}", f"conv{c}", block) for c in (1, 2, 3)]
            names += [(f"{block}.downsample.0", "downsample", block)] if i == 0 else []
    for i in range(3):
        names += [
            (f"blocks.{i}.{part}", part.split(".")[-1], f"blocks.{i}")
            for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ]
    return [*names, ("fc", "fc", None)]


def history(modules, steps, last, seed=0):
    """Return lines of modules.jsonl.

    The alphas start near that of a Gaussian matrix and spread during training. The first module is
    not balanced.
    """
    rng = np.random.default_rng(seed)
    kinds = list(dict.fromkeys(kind for _, kind, _ in modules))
    offset = rng.normal(0, 0.12, len(modules))
    lines = []
    for step in steps:
        learnt = 1 - math.exp(-3 * step / max(last, 1))
        depth = np.linspace(-1, 1, len(modules))
        start = np.array([2.12 if kinds.index(kind) < 4 else 2.99 for _, kind, _ in modules])
        end = (
            np.array([1.9 + 0.28 * kinds.index(kind) for _, kind, _ in modules])
            + 0.35 * depth**2
            + offset
        )
        alpha = start + learnt * (end - start) + rng.normal(0, 0.015, len(modules))
        decay = ETA * (0.6666 + (alpha - alpha.min()) / (np.ptp(alpha) or 1) * (3 - 0.6666))
        for i, (name, kind, block) in enumerate(modules):
            line = {"step": step, "module": name, "type": kind, "block": block, "balanced": i > 0}
            line |= {"alpha": float(alpha[i]), "D": 0.05, "spectral_norm": 3.1}
            line |= {"score": float(alpha[i]), "weight_decay": float(decay[i]) if i else ETA}
            lines.append(line | {"reason": None})
    return lines


def metrics(steps, log_every, eval_every, floor=3.3, seed=0, tokens=131072, mean_decay=1.4 * ETA):
    """Return lines of metrics.jsonl of a finished run.

    The loss falls as a noisy power law, the learning rate has warm-up and cosine decay, and the
    last line is a final evaluation.
    """
    rng, lines = np.random.default_rng(seed), []
    for step in range(log_every, steps + 1, log_every):
        true = floor + 7 * (1 + step / (0.004 * steps)) ** -0.6
        rate = 1e-3 * min(step / (0.1 * steps), 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        line = {"update_step": step, "loss": true + rng.normal(0, 0.05), "lr": rate}
        line |= {"weight_decay": mean_decay, "tokens_seen": step * tokens}
        line |= {"throughput_tokens": 5000 + rng.normal(0, 50), "grad_norm": 0.7}
        lines.append(line | {"seconds": step * 26.0})
        if step % eval_every == 0 or step == steps:
            lines.append(evaluation(step, true + 0.02, final=step == steps))
    return lines


def evaluation(step, loss, final):
    """Return a line of metrics.jsonl with an evaluation over 100 batches."""
    return {
        "update_step": step,
        "eval_loss": loss,
        "perplexity": math.exp(loss),
        "reference_perplexity": math.exp(loss * 100 / 101),
        "eval_tokens": 200000,
        "eval_seconds": 3.2,
        "final": final,
    }


def write_run(folder, name, lines, modules=(), arguments=None, summary=True):
    """Write run.json, metrics.jsonl and modules.jsonl, and return the folder."""
    folder.mkdir(parents=True)
    defaults = {
        "model_config": "configs/llama_9m.json",
        "optimizer": "adam",
        "weight_decay": ETA,
        "wd_min_ratio": 0.6666,
        "wd_max_ratio": 3,
        "esd_metric_for_tb": "alpha",
        "assign_func": "tb_linear_map",
    }
    info = {
        "name": name,
        "arguments": defaults | (arguments or {}),
        "model_config": {"hidden_size": 128, "model_type": "llama"},
        "versions": {"torch": "2.9.0"},
        "device": "cpu",
        "git_commit": "abc123",
        "parameters": 9_612_345,
        "started": "2026-01-01T00:00:00",
    }
    if summary:
        info["summary"] = {
            "tokens_per_second": 5123.4,
            "analyses": 20,
            "analysis_seconds": 12.0,
            "analysis_share": 0.0123,
        }
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if modules:
        (folder / "modules.jsonl").write_text("".join(json.dumps(line) + "\n" for line in modules))
    return folder
