"""torchrun_main.py, and beside each checkpoint a file for each rank with hashes of what that rank holds.

With KILL_AT_UPDATE in the environment, every rank kills itself in that update."""

import hashlib
import json
import os
import signal
import sys

import torch

import torchrun_main
from peft_pretraining.checkpoint import optimizer_state_by_name
from peft_pretraining.distributed import run_script

save_checkpoint, lr_factor = torchrun_main.save_checkpoint, torchrun_main.lr_factor


def save_with_hashes(folder, model, optimizer, trainer, tokenizer, ranks):
    save_checkpoint(folder, model, optimizer, trainer, tokenizer, ranks)
    hashes = {
        "weights": digest(model.state_dict()),
        "optimizer": digest({f"{n}.{k}": v for n, s in optimizer_state_by_name(model, optimizer).items() for k, v in s.items()}),
        "decays": {g["module"]: g["weight_decay"] for g in optimizer.param_groups},
        "decay_state": trainer["decay"],
    }
    (folder.parent / f"{folder.name}.rank{ranks.rank}.json").write_text(json.dumps(hashes))


def lr_factor_or_death(update, *arguments):
    if str(update) == os.environ.get("KILL_AT_UPDATE"):
        os.kill(os.getpid(), signal.SIGKILL)
    return lr_factor(update, *arguments)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode())
        content.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor).encode())
    return content.hexdigest()


if __name__ == "__main__":
    torchrun_main.save_checkpoint = save_with_hashes
    torchrun_main.lr_factor = lr_factor_or_death
    sys.exit(run_script(torchrun_main.main))
