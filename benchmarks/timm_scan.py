"""Try every classifier of timm: does main_vit.py build it, train one update and analyse it?

    python benchmarks/timm_scan.py --output benchmarks/results/timm_scan.json

Every model is built without memory for its weights (on torch's meta device), its operations are
counted, and its balanced modules are listed. An update with two images is made for each model with
fewer parameters than --train_below, and for the smallest model of each class of timm. The images
are as small as the model accepts. Each model has a process of its own, which is ended after
--seconds. Finished models in --output are not repeated.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch

import alphadecay
from alphadecay.cli.flags import add_flags
from alphadecay.modules import balanced_modules
from peft_pretraining.cli.vit import vit_parser
from peft_pretraining.vision.models import build_model, forward_flops

SIZES = (64, 96, 128, 224)  # pixels; the size that the model was made for is tried last
MEMORY = 10 * 2**30  # bytes of a process


def arguments(name: str, size: int) -> argparse.Namespace:
    """Return the flags of main_vit.py for a model and an image size."""
    parser = vit_parser()
    add_flags(parser)
    return parser.parse_args(["--model", name, "--input_size", str(size), "--nb_classes", "10"])


def smallest_size(name: str) -> tuple[int, torch.nn.Module, int]:
    """Return the smallest images that a model takes, the model without weights, and its FLOPs.

    Raises:
        Exception: what the largest size gives, if the model takes none.
    """
    cfg = timm.get_pretrained_cfg(name)
    made_for = int(cfg.input_size[-1]) if cfg else 224
    sizes = [size for size in SIZES if size < made_for] + [made_for]
    for size in sizes:
        try:
            with torch.device("meta"):
                model = build_model(arguments(name, size))
            return size, model, forward_flops(model, size)
        except Exception:
            if size == sizes[-1]:
                raise
    raise AssertionError("there is at least one size")


def look_at(name: str) -> dict[str, Any]:
    """Return parameters, class, operations and balanced modules of a model without weights."""
    size, model, flops = smallest_size(name)
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "size": size,
        "flops": flops,
        "balanced": len(balanced_modules(model)),
    }


def train(name: str, size: int) -> dict[str, Any]:
    """Make one update with AlphaDecay, as main_vit.py does it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model(arguments(name, size))
    forward_flops(model, size)
    decay = alphadecay.AlphaDecay(model, 1e-5, every=1)
    optimizer = torch.optim.AdamW(decay.param_groups(), lr=1e-3)
    model.train()
    loss = torch.nn.functional.cross_entropy(
        model(torch.randn(2, 3, size, size)), torch.tensor([0, 1])
    )
    loss.backward()
    decay.step(optimizer)
    optimizer.step()
    found = [row for row in decay.history if row["step"] == 1]
    return {
        "trained": bool(torch.isfinite(loss)),
        "analysed": sum(row["reason"] is None for row in found),
    }


def in_a_process(function: Callable[..., dict], seconds: float, *words: Any) -> dict[str, Any]:
    """Return what a function returns in a process of its own, or {"error": a sentence}."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            sender.send(function(*words))
        except BaseException as error:
            sender.send({"error": f"{type(error).__name__}: {error}".split("\n")[0][:200]})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    answered = receiver.poll(seconds)
    try:
        result = receiver.recv() if answered else {"error": f"longer than {seconds:g} s"}
    except EOFError:
        result = {"error": "the process died"}
    process.kill()
    process.join()
    return result


def main() -> None:
    """Scan all models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--train_below", type=float, default=12e6, metavar="PARAMETERS")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="as in timm.list_models")
    options = parser.parse_args()
    found = json.loads(options.output.read_text())["models"] if options.output.exists() else {}
    start = time.time()
    for name in timm.list_models(options.only):
        if name not in found:
            found[name] = in_a_process(look_at, options.seconds, name)
            if len(found) % 50 == 0:
                print(f"{len(found)} models, {time.time() - start:.0f} s", flush=True)
                write(options, found)
    built = {name: record for name, record in found.items() if "class" in record}
    smallest = {}
    for name, record in sorted(built.items(), key=lambda item: -item[1]["parameters"]):
        smallest[record["class"]] = name
    for name, record in built.items():
        small = record["parameters"] < options.train_below or name in smallest.values()
        if small and "trained" not in record and "error" not in record and record["balanced"]:
            record |= in_a_process(train, options.seconds, name, record["size"])
            write(options, found)
    write(options, found)
    print(json.dumps(summary(found), indent=1))


def summary(found: dict[str, dict]) -> dict[str, Any]:
    """Return the counts, and the models that fail with their errors."""
    built = [record for record in found.values() if "class" in record]
    tried = [record for record in built if "trained" in record or "error" in record]
    return {
        "models": len(found),
        "classes": len({record["class"] for record in built}),
        "built_and_counted": len(built),
        "two_balanced_modules_or_more": sum(record["balanced"] >= 2 for record in built),
        "tried_to_train": len(tried),
        "trained": sum(record.get("trained", False) for record in tried),
        "analysed": sum(record.get("analysed", 0) >= 2 for record in tried),
        "failures": {name: r["error"] for name, r in found.items() if "error" in r},
        "fewer_than_two_balanced": [n for n, r in found.items() if r.get("balanced", 2) < 2],
    }


def write(options: argparse.Namespace, found: dict[str, dict]) -> None:
    """Write the results so far."""
    content = {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "train_below": options.train_below,
        "summary": summary(found),
        "models": found,
    }
    options.output.write_text(json.dumps(content, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
