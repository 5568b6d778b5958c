"""Train a little under torchrun, and write the final state of each rank to a folder."""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import alphadecay


def main() -> None:
    distributed = "RANK" in os.environ
    if distributed:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if distributed else 0
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(n, 64) for n in (96, 64, 64, 64, 64)))
    with torch.no_grad():
        model[2].weight.zero_()  # no alpha: it must keep eta on every rank
    decay = alphadecay.AlphaDecay(model, 0.1, every=2)
    optimizer = torch.optim.AdamW(decay.param_groups(), lr=1e-2)
    model = nn.parallel.DistributedDataParallel(model) if distributed else model
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        inputs = torch.randn(
            8, 96, generator=generator
        )  # the same on every rank, so that one process is the same run
        model(inputs).square().mean().backward()
        decay.step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    result = {
        "history": decay.history,
        "decays": decay.weight_decays,
        "weights": hashlib.sha256(weights).hexdigest(),
    }
    (Path(sys.argv[1]) / f"rank{rank}.json").write_text(json.dumps(result))
    if distributed:
        dist.barrier()  # gloo: none may leave while another one still talks to it
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
