"""torchrun_main.py, and beside each checkpoint a file for each rank with hashes of what that rank holds.

With KILL_AT_UPDATE in the environment, every rank kills itself in that update, when what was saved before it is whole."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import torchrun_main
from peft_pretraining.checkpoint import optimizer_state_by_name
from peft_pretraining.distributed import run_script
from peft_pretraining.saving import Checkpoints

lr_factor = torchrun_main.lr_factor


class HashedCheckpoints(Checkpoints):
    saved: list[Path] = []

    def save(self, step, model, optimizer, trainer, tokenizer):
        super().save(step, model, optimizer, trainer, tokenizer)
        hashes = {
            "weights": digest(model.state_dict()),
            "optimizer": digest({f"{n}.{k}": v for n, s in optimizer_state_by_name(model, optimizer).items() for k, v in s.items()}),
            "decays": {g["module"]: g["weight_decay"] for g in optimizer.param_groups},
            "decay_state": trainer["decay"],
        }
        folder = self._run_folder / f"checkpoints/model_{step}"
        folder.parent.mkdir(exist_ok=True)
        (folder.parent / f"{folder.name}.rank{self._ranks.rank}.json").write_text(json.dumps(hashes))
        self.saved.append(folder)


def lr_factor_or_death(update, *arguments):
    if str(update) == os.environ.get("KILL_AT_UPDATE"):
        while not all(folder.exists() for folder in HashedCheckpoints.saved):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return lr_factor(update, *arguments)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        content.update(name.encode())
        content.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor).encode())
    return content.hexdigest()


if __name__ == "__main__":
    torchrun_main.Checkpoints = HashedCheckpoints
    torchrun_main.lr_factor = lr_factor_or_death
    sys.exit(run_script(torchrun_main.main))
