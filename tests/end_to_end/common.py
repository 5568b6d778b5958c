"""Starting the real scripts: small configs, generated text, torchrun on 2 CPU processes."""

import json
import os
import random
import shlex
import sys
from pathlib import Path

from tests.support import fork_server

ROOT = Path(__file__).resolve().parent.parent.parent
FINAL = "checkpoints/model_40"
FAULTY = "tests/end_to_end/faulty_main.py"


REFERENCE_COMMAND = (
    "torchrun --nproc_per_node=2 --master_port=20301 --master_addr=localhost torchrun_main.py "
    "--model_config configs/llama_130m.json "
    "--optimizer adam --seed 5 --lr 0.001 --batch_size 256 --total_batch_size 512 "
    "--num_training_steps 20000 --warmup_steps 2000 "
    "--weight_decay 0.00001 --use_modulewise_wd --alpha_positively_with_WD "
    "--unbalancedWD_every 500 --esd_metric_for_tb alpha "
    "--assign_func tb_linear_map --wd_min_ratio 0.6666 --wd_max_ratio 3 --dtype bfloat16 "
    "--eval_every 1000 "
    "--wandb_name ours-adam-1.5-3unb-130M-lr0.001-WD0.00001-repeat1 --target_eval_tokens "
    "10_000_000 --save_every 10000"
)


VIT_COMMAND = (
    "torchrun --nproc_per_node=2 --master_port=20023 --master_addr=localhost main_vit.py "
    "--model vit_deit_tiny_patch16_224 --drop_path 0.1 "
    "--batch_size 192 --lr 4e-3 --weight_decay 0.000005 --use_modulewise_wd "
    "--alpha_positively_with_WD --unbalancedWD_every 500 "
    "--esd_metric_for_tb alpha --assign_func tb_linear_map --wd_min_ratio 0.6666 "
    "--wd_max_ratio 3 --update_freq 1 --model_ema true "
    "--model_ema_eval true --data_path IMAGENET --output_dir OUT --wandb_name NAME"
)


def write_config(folder, **changes):
    """A LLaMA small enough for seconds, large enough that every module is balanced."""
    config = json.loads((ROOT / "configs/llama_9m.json").read_text())
    config |= {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        **changes,
    }
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(config))
    return path


def write_text(folder, documents=600, name="corpus.jsonl"):
    """Return documents of an artificial language, in which few words can follow each word."""
    rng = random.Random(0)
    words = [
        "".join(
            rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))
        )
        for _ in range(300)
    ]
    after = {word: rng.sample(words, 6) for word in words}
    path = Path(folder) / name
    with path.open("w") as file:
        for _ in range(documents):
            text = [rng.choice(words)]
            for _ in range(rng.randint(5, 120)):
                text.append(rng.choice(after[text[-1]]))
            file.write(json.dumps({"text": " ".join(text)}) + "\n")
    return path


def write_images(folder, train=40, val=11, size=32):
    """Write 160 training and 44 validation images of four classes that differ in their colour."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, colour in zip(
        ("blue", "green", "red", "white"),
        ((0, 0, 200), (0, 200, 0), (200, 0, 0), (200, 200, 200)),
        strict=True,
    ):
        for split, count in (("train", train), ("val", val)):
            place = Path(folder) / split / name
            place.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-120, 56, (size, size, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                    place / f"{i:02}.png"
                )
    return Path(folder)


def command(arguments, script="torchrun_main.py", processes=2, options=()):
    """How a user starts a script, from the repository's root."""
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *options,
    ]
    return [*(torchrun if processes > 1 else [sys.executable]), script, *map(str, arguments)]


def surroundings(changes=None):
    """Return the environment of a script, with W&B off unless a test asks for it."""
    return (
        os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
        | (changes or {})
    )


def run(
    arguments,
    script="torchrun_main.py",
    processes=2,
    check=True,
    environment=None,
    options=(),
    cold=False,
):
    """Run a script to its end and return the finished process with its output.

    With `cold` it runs in a new interpreter, see support/fork_server.py.
    """
    return fork_server.run(
        command(arguments, script, processes, options),
        cold,
        check,
        cwd=ROOT,
        env=surroundings(environment),
    )


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def reference_arguments(command=REFERENCE_COMMAND, script="torchrun_main.py", **changes):
    """A published command's arguments, some of them changed or added."""
    words = shlex.split(command)
    words = words[words.index(script) + 1 :]
    for flag, value in changes.items():
        if f"--{flag}" in words:
            words[words.index(f"--{flag}") + 1] = str(value)
        else:
            words += [f"--{flag}", str(value)]
    return words


def small(folder, **changes):
    sizes = {"max_length": 64, "batch_size": 4, "total_batch_size": 16, "warmup_steps": 4}
    inputs = {
        "model_config": folder / "config.json",
        "dataset": folder / "corpus.jsonl",
        "tokenizer": "bpe",
    }
    return reference_arguments(**inputs | sizes | changes)


def exact(inputs, name, *more, **changes):
    """A run of 40 updates in float32 with analyses and a checkpoint at its half."""
    settings = {
        "num_training_steps": 40,
        "unbalancedWD_every": 7,
        "eval_every": 20,
        "save_every": 20,
        "log_every": 1,
        "dtype": "float32",
    }
    return [*small(inputs, save_dir=inputs / name, **settings | changes), *more]


def vit(inputs, name, *more, **changes):
    """Return the published ViT command for a tiny model: 2 epochs of 20 updates of 8 images."""
    sizes = {
        "input_size": 32,
        "nb_classes": 4,
        "batch_size": 4,
        "epochs": 2,
        "warmup_epochs": 1,
        "num_workers": 1,
    }
    settings = {
        "data_path": inputs / "images",
        "output_dir": inputs / name,
        "unbalancedWD_every": 7,
        "log_every": 1,
    }
    small_model = ["--model_kwargs", "patch_size=8", "depth=2", "embed_dim=64", "num_heads=2"]
    words = reference_arguments(
        VIT_COMMAND, "main_vit.py", **sizes | settings | {"weight_decay_end": 1e-6} | changes
    )
    return [*words, *small_model, *more]


def traced(folder, **more):
    """Environment for FAULTY: a trace beside the run folder."""
    return {"TRACE": f"{folder}.trace", **more}


def trace(folder, rank=0):
    """What a rank held after each update; of updates made twice the last."""
    lines = map(json.loads, Path(f"{folder}.trace.rank{rank}").read_text().split())
    return {line.pop("update"): line for line in lines}


def comparable(folder, final=FINAL):
    """Everything of a run that must not depend on whether it was stopped."""
    timings = (
        "throughput_",
        "mfu",
        "useful_mfu",
        "seconds",
        "data_wait_seconds",
        "analysis_seconds",
        "eval_seconds",
        "peak_memory_bytes",
    )
    metrics = [
        {k: v for k, v in r.items() if not k.startswith(timings)}
        for r in read_lines(folder / "metrics.jsonl")
    ]
    return {
        "metrics": metrics,
        "modules": read_lines(folder / "modules.jsonl"),
        "trace": [trace(folder, rank) for rank in (0, 1)],
        "files": json.loads((folder / final / "manifest.json").read_text()),
    }
