"""Files of a checkpoint, and how they are verified."""

import json
import re
from pathlib import Path

from peft_pretraining.utils.files import sha256_file

MANIFEST = "manifest.json"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
OPTIMIZER, TRAINER, RANDOM = (
    "training_state/optimizer.pt",
    "training_state/trainer.json",
    "training_state/random_{}.pt",
)
EXTRA = "training_state/{}.safetensors"
REQUIRED = (WEIGHTS, CONFIG, TRAINER, OPTIMIZER, RANDOM.format(0))


def checkpoints_of(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, whole or damaged, in no order; not those that are being written or were set aside."""
    return [
        p for p in (run_folder / "checkpoints").glob("model_*") if step_of(p) >= 0 and p.is_dir()
    ]


def step_of(folder: Path) -> int:
    """The number of updates after which a checkpoint was made, -1 for a folder that is named otherwise."""
    match = re.fullmatch(r"model_([0-9]+)", folder.name)
    return int(match[1]) if match else -1


def find_corruption(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, naming the file; None where every file is as its manifest says.

    hashes: compare contents; False: only which files there are and their sizes.
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
                return f"{path} is damaged (its size is not the manifest's)"
            if hashes and sha256_file(path) != digest:
                return f"{path} is damaged (its SHA-256 is not the manifest's)"
        except (FileNotFoundError, NotADirectoryError):
            return f"{path} is missing"
        except (
            OSError,
            ValueError,
        ) as error:  # ValueError: a name that no file can have, from a damaged manifest
            return f"{path} cannot be read ({error})"
    return None
