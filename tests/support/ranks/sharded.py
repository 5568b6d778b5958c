"""Compare a model under fully_shard with the whole model, and cause faults on one rank.

Arguments: which of them, and the folder that each rank writes its result to.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import fully_shard

import alphadecay
from alphadecay.spectral import engine


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Linear(a, b)
            for a, b in ((96, 64), (64, 101), (101, 64), (64, 64), (64, 64), (64, 51))
        )
    )


def train(model: nn.Module, metric: str, **more) -> alphadecay.AlphaDecay:
    decay = alphadecay.AlphaDecay(model, 0.1, every=2, metric=metric, **more)
    optimizer = torch.optim.AdamW(decay.param_groups(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        model(torch.randn(8, 96, generator=generator)).square().mean().backward()
        decay.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return decay


def sharded() -> dict:
    """Return the history of a whole and of a sharded model, for alpha and for gradnorm."""
    results = {}
    for metric in ("alpha", "gradnorm"):
        whole = train(model_of(), metric)
        model = model_of()
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        results[metric] = {"whole": whole.history, "sharded": train(model, metric).history}
    awd = alphadecay.AWD(model, 1.0)
    model(torch.ones(1, 96)).sum().backward()
    awd.step(torch.optim.SGD(awd.param_groups(), lr=1))
    norms = [
        sum(float(t.full_tensor().square().sum()) for t in ts) ** 0.5
        for ts in ([p.grad for p in model.parameters()], model.parameters())
    ]
    assert abs(awd.average / (0.9 * norms[0] / norms[1]) - 1) < 1e-5
    return results


def fault(kind: str) -> dict:
    """One module's solve goes wrong on the rank that owns it."""
    model = model_of()
    decay = alphadecay.AlphaDecay(model, 0.1, every=1, timeout=2.0)
    optimizer = torch.optim.SGD(decay.param_groups(), lr=1e-2)
    before = dict(decay.weight_decays)
    bad, exact = model[3].weight, engine.exact_eigenvalues

    def broken(weight, *arguments):
        if weight.data_ptr() != bad.data_ptr():
            return exact(weight, *arguments)
        if kind == "raise":
            raise RuntimeError("injected")
        if kind == "hang":
            time.sleep(3600)
        return torch.full((64,), float("nan"), dtype=torch.float64)

    engine.exact_eigenvalues = broken
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    start = time.monotonic()
    with torch.no_grad():
        model[2].weight.mul_(1 + torch.rand(64, 101))
    decay.step(optimizer)
    rows = {row["module"]: row for row in decay.history if row["step"] == 1}
    return {
        "before": before,
        "after": decay.weight_decays,
        "reasons": {m: r["reason"] for m, r in rows.items()},
        "seconds": time.monotonic() - start,
    }


def disagree() -> str:
    """A rank whose model differs: an error on every rank, no deadlock."""
    layers = 5 if dist.get_rank() == 0 else 6
    try:
        alphadecay.AlphaDecay(nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers))), 0.1)
    except ValueError as error:
        return str(error)
    return "no error"


def main() -> None:
    dist.init_process_group("gloo")
    what = sys.argv[1]
    result = {"sharded": sharded, "disagree": disagree}.get(what, lambda: fault(what))()
    (Path(sys.argv[2]) / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
