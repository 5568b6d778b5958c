"""Started under torchrun with a folder as its argument: save on several ranks, damage, find; each rank writes there what it saw."""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import transformers

from peft_pretraining import checkpoint, saving
from peft_pretraining.cli.main import run_script
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import process_group


def found(place: str, run_folder: Path, ranks) -> str:
    try:
        return str(checkpoint.find_checkpoint(place, run_folder, ranks))
    except UserError as error:
        return str(error)


def main() -> None:
    run_folder = Path(sys.argv[1])
    hashed = []
    sha256_file, write_checkpoint = checkpoint.sha256, saving.write_checkpoint
    checkpoint.sha256 = lambda path: hashed.append(str(path)) or sha256_file(path)
    with process_group() as ranks:
        model = nn.Linear(3, 4)
        model.config = transformers.PretrainedConfig()
        optimizer = torch.optim.Adam(model.parameters())
        checkpoint.seed_random_generators(ranks.rank)
        checkpoints = saving.Checkpoints(run_folder, ranks)
        result = {"random": []}
        for step in (10, 20):
            checkpoints.save(step, model, optimizer, {}, None)
            result["random"].append(float(torch.rand(())))
        checkpoints.finish()
        ranks.barrier()
        if ranks.is_main:
            (run_folder / "checkpoints/model_20/training_state/random_1.pt").write_bytes(b"")
        result["newest"] = found("auto", run_folder, ranks)
        result["named"] = found(str(run_folder / "checkpoints/model_20"), run_folder, ranks)
        result["hashed"] = len(hashed)
        checkpoint.load_checkpoint(run_folder / "checkpoints/model_10", model, optimizer, ranks)
        result["restored"] = float(torch.rand(()))
        ranks.barrier()
        if ranks.is_main:
            (run_folder / "checkpoints/model_10/manifest.json").unlink()
        result["none"] = found("auto", run_folder, ranks)
        (run_folder / f"rank{ranks.rank}.json").write_text(json.dumps(result))
        # The end of the process must wait for a save, though nobody called finish.
        saving.write_checkpoint = lambda *arguments: time.sleep(1) or write_checkpoint(*arguments)
        checkpoints.save(30, model, optimizer, {}, None)


if __name__ == "__main__":
    sys.exit(run_script(main))
