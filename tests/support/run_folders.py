"""Made-up runs of all kinds, and a parser that checks the pages of the report."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np

from peft_pretraining.report.plots import BACKGROUND, FOREGROUND

LLAMA_TYPES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
ETA = 1e-5


def llama_modules(blocks):
    """Return (module, type, block) of a LLaMA, in the order of named_modules()."""
    owner = {kind: "self_attn" if kind in LLAMA_TYPES[:4] else "mlp" for kind in LLAMA_TYPES}
    return [
        (f"model.layers.{b}.{owner[kind]}.{kind}", kind, f"model.layers.{b}")
        for b in range(blocks)
        for kind in LLAMA_TYPES
    ]


def resnet_modules():
    """Return (module, type, block) with the names of a ResNet and a ViT.

    A stem and a head are outside of the blocks, and not every block has every type.
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
    """Return records of modules.jsonl. The first module is not balanced.

    The alphas start near those of Gaussian matrices and separate during training.
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
            lines.append(
                {
                    "step": step,
                    "module": name,
                    "type": kind,
                    "block": block,
                    "balanced": i > 0,
                    "alpha": float(alpha[i]),
                    "D": 0.05,
                    "spectral_norm": 3.1,
                    "score": float(alpha[i]),
                    "weight_decay": float(decay[i]) if i else ETA,
                    "reason": None,
                }
            )
    return lines


def metrics(steps, log_every, eval_every, floor=3.3, seed=0, tokens=131072, mean_decay=1.4 * ETA):
    """Return records of metrics.jsonl of a finished run, with a final evaluation.

    The loss is a noisy power law; the learning rate has a warm-up and a cosine schedule.
    """
    rng, lines = np.random.default_rng(seed), []
    for step in range(log_every, steps + 1, log_every):
        true = floor + 7 * (1 + step / (0.004 * steps)) ** -0.6
        rate = 1e-3 * min(step / (0.1 * steps), 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        lines.append(
            {
                "update_step": step,
                "loss": true + rng.normal(0, 0.05),
                "lr": rate,
                "weight_decay": mean_decay,
                "tokens_seen": step * tokens,
                "throughput_tokens": 5000 + rng.normal(0, 50),
                "grad_norm": 0.7,
                "seconds": step * 26.0,
            }
        )
        if step % eval_every == 0 or step == steps:
            lines.append(evaluation(step, true + 0.02, final=step == steps))
    return lines


def evaluation(step, loss, final):
    """Return the record of an evaluation over 100 batches."""
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
    """Write the three files of a run and return its folder."""
    folder.mkdir(parents=True)
    info = {
        "name": name,
        "arguments": {
            "model_config": "configs/llama_9m.json",
            "optimizer": "adam",
            "weight_decay": ETA,
            "wd_min_ratio": 0.6666,
            "wd_max_ratio": 3,
            "esd_metric_for_tb": "alpha",
            "assign_func": "tb_linear_map",
            **(arguments or {}),
        },
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


def small_run(folder, name="llama 9m"):
    """Write a run of 4 blocks and 1000 updates, with an analysis every 50."""
    return write_run(
        folder, name, metrics(1000, 10, 100), history(llama_modules(4), range(0, 1001, 50), 1000)
    )


def tiny_run(folder, name="tiny"):
    """Write a run of 1 block and 100 updates, with one analysis, which is drawn quickly."""
    return write_run(folder, name, metrics(100, 20, 50), history(llama_modules(1), [0], 100))


def nulls_and_flags(folder):
    """Write a run with undefined alphas and their reasons, missing fields, and a NaN loss."""
    modules = history(llama_modules(4), range(0, 1001, 100), 1000)
    for i, line in enumerate(modules):
        if line["module"].endswith("2.self_attn.k_proj") or i % 23 == 5:
            line.update(
                alpha=None,
                D=None,
                score=None,
                weight_decay=ETA,
                reason="spectrum is <degenerate> & flat",
            )
        if i % 31 == 7:
            del line["D"], line["spectral_norm"]
    lines = metrics(1000, 10, 100)
    lines[50]["loss"] = None
    lines[53]["loss"] = math.nan
    return write_run(folder, "flagged", lines, modules)


def large_run(folder):
    """Write a run of 24 blocks, 168 modules and 60,000 updates, with an analysis every 500."""
    return write_run(
        folder,
        "llama 350m",
        metrics(60000, 20, 1000),
        history(llama_modules(24), range(0, 60001, 500), 60000),
    )


def gradnorm_run(folder):
    """Write a run whose score is the norm of the gradient, without any alpha."""
    modules = history(llama_modules(4), range(0, 1001, 100), 1000)
    for line in modules:
        line.update(alpha=None, score=line["score"] / 10)
    return write_run(
        folder, "by gradient", metrics(1000, 10, 100), modules, {"esd_metric_for_tb": "gradnorm"}
    )


def resnet_run(folder):
    modules = history(resnet_modules(), range(0, 501, 50), 500)
    return write_run(folder, "resnet", metrics(500, 10, 100), modules)


def uniform_run(folder):
    lines = metrics(1000, 10, 100, floor=3.4, seed=1, mean_decay=ETA)
    return write_run(folder, "uniform", lines)


def vit_run(folder, name="vit", ema=True):
    """Write a run of an image classifier, with the accuracies of its validations."""
    lines = metrics(1000, 10, 100)
    for line in lines:
        if "eval_loss" in line:
            top1 = 60 * line["update_step"] / 1000
            line |= {"top1": top1, "top5": top1 + 20}
            line |= {"ema_top1": top1 + 2, "ema_top5": top1 + 22} if ema else {}
            del line["perplexity"], line["reference_perplexity"]
        elif "tokens_seen" in line:
            line["images_seen"] = line.pop("tokens_seen")
            line["throughput_images"] = line.pop("throughput_tokens")
    return write_run(folder, name, lines)


def one_evaluation_run(folder):
    modules = history(llama_modules(4), [0], 3)
    return write_run(folder, "one", [evaluation(3, 9.5, True)], modules, summary=False)


def one_line_run(folder):
    modules = history(llama_modules(4), [0], 3)
    return write_run(folder, "line", metrics(10, 10, 99)[:1], modules, summary=False)


def one_module_run(folder):
    modules = [line | {"balanced": True} for line in history(llama_modules(1)[:1], [0, 10], 20)]
    return write_run(folder, "tiny", metrics(20, 10, 10), modules)


RUNS = {
    # Name: (function that writes it, number of figures on the page)
    "small": (small_run, 5),
    "large": (large_run, 5),
    "resnet": (resnet_run, 5),
    "uniform": (uniform_run, 1),
    "flagged": (nulls_and_flags, 5),
    "gradnorm": (gradnorm_run, 5),
    "one evaluation": (one_evaluation_run, 4),
    "one line": (one_line_run, 4),
    "one module": (one_module_run, 5),
    "vit": (vit_run, 2),
}


class WellFormed(HTMLParser):
    """Checks that tags are closed in order, and collects ids, references and text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.note(attributes)

    def handle_startendtag(self, tag, attributes):
        self.note(attributes)

    def note(self, attributes):
        for key, value in attributes:
            self.ids += [value] if key == "id" else []
            self.references += re.findall(r"url\(#([^)]+)\)", value or "") + (
                [value[1:]] if key.endswith("href") else []
            )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parsed(path):
    """Return source and text of a page, after checks that hold for every page.

    Tags are closed, ids are unique, references exist, and nothing is fetched from elsewhere.
    """
    text = path.read_text(encoding="utf-8")
    reader = WellFormed()
    reader.feed(text)
    assert not reader.open
    assert len(reader.ids) == len(set(reader.ids))
    assert set(reader.references) <= set(reader.ids)
    assert "<script" not in text and "<image" not in text and "@import" not in text
    assert re.findall(r'https?://(?!www\.w3\.org/)[^"\s<]+', text) == []
    assert FOREGROUND not in text and BACKGROUND not in text
    return text, " ".join(" ".join(reader.words).split())
