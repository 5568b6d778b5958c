"""Starting the real scripts: small configs, generated text, torchrun on 2 CPU processes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def write_config(folder, **changes):
    """A LLaMA small enough for seconds, large enough that every module is balanced."""
    config = json.loads((ROOT / "configs/llama_9m.json").read_text())
    config |= {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, **changes}
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config))
    return path


def write_text(folder, documents=600, name="corpus.jsonl"):
    """Documents of a made-up language with structure to learn: each word goes before a few others."""
    rng = random.Random(0)
    words = ["".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))) for _ in range(300)]
    after = {word: rng.sample(words, 6) for word in words}
    path = Path(folder) / name
    with path.open("w") as file:
        for _ in range(documents):
            text = [rng.choice(words)]
            for _ in range(rng.randint(5, 120)):
                text.append(rng.choice(after[text[-1]]))
            file.write(json.dumps({"text": " ".join(text)}) + "\n")
    return path


def run(arguments, script="torchrun_main.py", processes=2, check=True, environment=None):
    """Run a script from the repository's root; returns the finished process with its output."""
    start = TORCHRUN if processes == 2 else [sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | (environment or {})
    command = [*start, script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
