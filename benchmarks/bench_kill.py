"""Runs on 2 processes that are killed (SIGKILL) at a random instant and continued with `--continue_from auto`, beside one that never was.

    python benchmarks/bench_kill.py [--trials 100]

Each trial kills one rank or the whole run, at a moment drawn uniformly from the time that the undisturbed run takes, start-up
and checkpoints included, and then lets it finish. Compared are the hashes of weights and optimizer and the decays after every update,
every logged loss and statistic, and the SHA-256 of every file of the last checkpoint. Prints how many trials were equal.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from end_to_end.common import (  # noqa: E402
    FAULTY,
    command,
    comparable,
    descendants,
    exact,
    kill,
    run,
    surroundings,
    traced,
    write_config,
    write_text,
)

UPDATES = 60
LAST = f"checkpoints/model_{UPDATES}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/kill_cpu.json")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        write_config(inputs)
        write_text(inputs)
        os.environ["ALPHADECAY_CACHE"] = str(inputs / "cache")
        run(settings(inputs, "warm"), FAULTY, environment=traced(inputs / "warm"))  # fills the cache
        start = time.perf_counter()
        run(settings(inputs, "straight"), FAULTY, environment=traced(inputs / "straight"))
        duration = time.perf_counter() - start
        wanted = comparable(inputs / "straight", LAST)
        outcomes = []
        for number in range(args.trials):
            outcomes.append(trial(inputs, f"trial{number}", wanted, rng.choice(["rank", "run"]), rng.random() * duration, rng))
            print(json.dumps(outcomes[-1]), flush=True)
            counts = {"equal": sum(o["equal"] for o in outcomes), "trials": len(outcomes)}
            result = counts | {"seconds_of_a_run": duration, "outcomes": outcomes}
            args.output.write_text(json.dumps(result, indent=1) + "\n")  # each time: it runs for long
    print(summary(outcomes, duration))


def settings(inputs: Path, name: str) -> list:
    return exact(inputs, name, "--continue_from", "auto", save_every=2, num_training_steps=UPDATES, eval_every=UPDATES // 2)


def trial(inputs: Path, name: str, wanted: dict, who: str, seconds: float, rng: random.Random) -> dict:
    """One run, killed after so many seconds."""
    words = command(settings(inputs, name), FAULTY)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(words, cwd=ROOT, env=surroundings(traced(inputs / name)), **quiet)
    time.sleep(seconds)
    below = descendants(running.pid)
    # The workers are torchrun's children; before it has any, the kill is of torchrun.
    victims = [rng.choice(below)] if who == "rank" and below else [*below, running.pid]
    killed = running.poll() is None
    saving = bool(list((inputs / name).glob("checkpoints/*.tmp")))
    reached = newest(inputs / name)
    for victim in victims:
        kill(victim)
    running.wait(timeout=120)
    run(settings(inputs, name), FAULTY, environment=traced(inputs / name))
    return {
        "who": who, "after": seconds, "killed": killed, "during_a_save": saving, "newest_checkpoint": reached,
        "equal": comparable(inputs / name, LAST) == wanted,
    }  # fmt: skip


def newest(folder: Path) -> int:
    return max((int(p.parent.name.removeprefix("model_")) for p in folder.glob("checkpoints/model_*[0-9]/manifest.json")), default=0)


def summary(outcomes: list[dict], duration: float) -> str:
    equal, killed = (sum(o[key] for o in outcomes) for key in ("equal", "killed"))
    saving, between = (sum(bool(o[key]) for o in outcomes) for key in ("during_a_save", "newest_checkpoint"))
    return (
        f"{equal} of {len(outcomes)} runs equal to the undisturbed one ({duration:.1f} s); {killed} were killed before their end, "
        f"{between} of all when they had a checkpoint, {saving} of all during a save"
    )


if __name__ == "__main__":
    main()
