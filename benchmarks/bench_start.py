"""Seconds until the commands answer: --help of each, and the first update of a training run.

    python benchmarks/bench_start.py [CHECKOUT ...]

Each command runs in this checkout and in those that are given, in turn, so that noise of the
machine falls on all of them. Written: the median and the range of 7 rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 7
HELP = {
    "torchrun_main.py --help": ["torchrun_main.py", "--help"],
    "main_vit.py --help": ["main_vit.py", "--help"],
    "prepare_data --help": ["-m", "peft_pretraining.prepare_data", "--help"],
    "table.py --help": ["scripts/table.py", "--help"],
}
FIRST_UPDATE = (
    "torchrun_main.py --model_config configs/llama_2m.json --packing --max_length 64 "
    "--dtype float32 --batch_size 4 --total_batch_size 4 --num_training_steps 1 --no_wandb"
)


def seconds_until(command: list[str], checkout: Path, text: str | None) -> float:
    """Return the seconds from the start of a command until it prints a text, or until its end."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=checkout,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        seconds = None
        for line in process.stderr or ():
            if text and text in line and seconds is None:
                seconds = time.perf_counter() - start
    if process.returncode or (text and seconds is None):
        raise RuntimeError(f"{' '.join(command)} failed in {checkout}")
    return time.perf_counter() - start if seconds is None else seconds


def prepare(folder: Path) -> Path:
    """Tokenize a small text, so that the first update does not wait for it."""
    lines = [json.dumps({"text": f"Document {i} is about decay."}) for i in range(5_000)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    subprocess.run(
        [sys.executable, "-m", "peft_pretraining.prepare_data", "--vocab_size", "1024"]
        + ["--dataset", str(folder / "text.jsonl"), "--tokenizer", "bpe"]
        + ["--output", str(folder / "data")],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return folder / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, help="other checkouts to compare with")
    checkouts = [ROOT, *parser.parse_args().checkouts]
    with tempfile.TemporaryDirectory() as temporary:
        first_update = [*FIRST_UPDATE.split(), "--dataset", str(prepare(Path(temporary)))]
        commands = [(name, words, None) for name, words in HELP.items()]
        commands.append(("first update", first_update, "update 1:"))
        commands.append(("run of one update", first_update, None))
        print("| Command | " + " | ".join(str(checkout) for checkout in checkouts) + " |")
        print("|---|" + "---|" * len(checkouts))
        for name, words, text in commands:
            seconds: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
            for round_ in range(ROUNDS):
                for checkout in checkouts:
                    run = [*words]
                    if name.endswith("update"):
                        run += ["--save_dir", f"{temporary}/{checkout.name}-{name}-{round_}"]
                    seconds[checkout].append(seconds_until(run, checkout, text))
            cells = [
                f"{statistics.median(s):.2f} s ({min(s):.2f} to {max(s):.2f})"
                for s in seconds.values()
            ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
