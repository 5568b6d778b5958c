"""Files of a checkpoint, and their verification.

A checkpoint holds everything that a resumed run needs:

    model_<step>/
        config.json, model.safetensors      format of transformers: AutoModelForCausalLM reads them
        tokenizer files                     written by the tokenizer's save_pretrained
        training_state/optimizer.pt         optimizer state by parameter name
        training_state/trainer.json         updates, tokens, weight decays, fingerprint of the data
        training_state/random_<rank>.pt     states of the random generators of each rank
        manifest.json                       size and SHA-256 of every file

Only a folder with exactly this name is a checkpoint. A killed process can leave others behind:
model_<step>.tmp is half written, model_<step>.deleted is half deleted, and model_<step>.replaced is
the previous checkpoint of an update that was saved again.
"""

import json
import re
from pathlib import Path

from peft_pretraining.utils.files import sha256_file

MANIFEST = "manifest.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPTIMIZER = "training_state/optimizer.pt"
TRAINER = "training_state/trainer.json"
RANDOM = "training_state/random_{}.pt"  # filled with the rank
EXTRA = "training_state/{}.safetensors"  # filled with the name of a further module
REQUIRED = (WEIGHTS, CONFIG, TRAINER, OPTIMIZER, RANDOM.format(0))


def checkpoints_of(run_folder: Path) -> list[Path]:
    """Return all checkpoints of a run, complete or damaged, in no particular order.

    Folders of checkpoints that are being written, were archived or are being deleted do not count.
    """
    return [
        p for p in (run_folder / "checkpoints").glob("model_*") if step_of(p) >= 0 and p.is_dir()
    ]


def step_of(folder: Path) -> int:
    """Return the number of updates in the name of a checkpoint, or -1 for any other name."""
    match = re.fullmatch(r"model_([0-9]+)", folder.name)
    return int(match[1]) if match else -1


def find_corruption(folder: Path, compare_hashes: bool = True) -> str | None:
    """Compare the files of a checkpoint with its manifest.

    Args:
        folder: The checkpoint.
        compare_hashes: Also compare the SHA-256 of each file, which reads all of it. If False, only
            names and sizes are compared.

    Returns:
        What is wrong, with the path of the file; None if every file agrees with the manifest.
    """
    manifest = folder / MANIFEST
    try:
        expected = {
            name: (entry["size"], entry["sha256"])
            for name, entry in json.loads(manifest.read_bytes()).items()
        }
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{manifest} is damaged ({error})"
    for name in REQUIRED:
        if name not in expected:
            return f"{manifest} is damaged (it does not list {name})"
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{path} is damaged (its size differs from the manifest)"
            if compare_hashes and sha256_file(path) != digest:
                return f"{path} is damaged (its SHA-256 differs from the manifest)"
        except (FileNotFoundError, NotADirectoryError):
            return f"{path} is missing"
        except (OSError, ValueError) as error:
            # ValueError: a damaged manifest can list a name that no file can have.
            return f"{path} cannot be read ({error})"
    return None
