"""Save on several ranks, damage a file, and search: each rank writes what it saw.

Started under torchrun by checkpoint/test_save.py, with a folder as its argument.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import transformers

from peft_pretraining.checkpoint import format as format_module
from peft_pretraining.checkpoint import save as save_module
from peft_pretraining.checkpoint.find import find_checkpoint
from peft_pretraining.checkpoint.load import load_checkpoint
from peft_pretraining.checkpoint.random_state import seed_random_generators
from peft_pretraining.cli.main import end, run_script
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext, process_group


def find(source: str | Path, run_folder: Path, ranks: DistributedContext) -> str:
    """Return the path of the checkpoint that is found, or the message of the error."""
    try:
        return str(find_checkpoint(str(source), run_folder, ranks))
    except UserError as error:
        return str(error)


def main() -> None:
    run_folder = Path(sys.argv[1])
    hashed = []
    sha256_file, write_checkpoint = format_module.sha256_file, save_module.write_checkpoint
    format_module.sha256_file = lambda path: hashed.append(str(path)) or sha256_file(path)
    with process_group() as ranks:
        model = nn.Linear(3, 4)
        model.config = transformers.PretrainedConfig()
        optimizer = torch.optim.Adam(model.parameters())
        seed_random_generators(ranks.rank)
        checkpoints = save_module.Checkpoints(run_folder, ranks)
        result = {"random": []}
        for step in (10, 20):
            checkpoints.save(step, model, optimizer, {}, None)
            result["random"].append(float(torch.rand(())))
        checkpoints.finish()
        ranks.barrier()
        if ranks.is_main:
            (run_folder / "checkpoints/model_20/training_state/random_1.pt").write_bytes(b"")
        result["newest"] = find("auto", run_folder, ranks)
        result["named"] = find(run_folder / "checkpoints/model_20", run_folder, ranks)
        result["hashed"] = len(hashed)
        load_checkpoint(run_folder / "checkpoints/model_10", model, optimizer, ranks)
        result["restored"] = float(torch.rand(()))
        ranks.barrier()
        if ranks.is_main:
            (run_folder / "checkpoints/model_10/manifest.json").unlink()
        result["none"] = find("auto", run_folder, ranks)
        (run_folder / f"rank{ranks.rank}.json").write_text(json.dumps(result))
        # `finish` is not called, so it is the end of the process that must wait for this save.
        save_module.write_checkpoint = lambda *arguments: (
            time.sleep(1) or write_checkpoint(*arguments)
        )
        checkpoints.save(30, model, optimizer, {}, None)


if __name__ == "__main__":
    end(run_script(main))
