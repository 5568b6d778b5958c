"""Kill runs of two ranks at random moments, continue them, and compare with an undisturbed run.

    python benchmarks/bench_kill.py [--trials 100]

Each trial kills one rank or both, at a moment drawn uniformly from the time that the undisturbed
run takes, start-up and checkpoints included, and then lets it finish. Compared are the hashes of
weights and optimizer and the decays after every update, every logged loss and statistic, and the
SHA-256 of every file of the last checkpoint. Prints how many trials were equal.

The ranks are forked from a process that has imported everything, so that a trial takes seconds;
tests/end_to_end/test_faults.py kills runs that torchrun started.
"""

import argparse
import json
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from transformers import LlamaConfig, PreTrainedTokenizerFast  # noqa: E402, F401  loaded once, for all ranks

import torchrun_main  # noqa: E402, F401
from tests.end_to_end.common import FAULTY, comparable, exact, traced, write_config, write_text  # noqa: E402
from tests.support.fork_server import kill  # noqa: E402

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
        assert finish(start(inputs, "warm"))  # fills the cache
        begun = time.perf_counter()
        assert finish(start(inputs, "straight"))
        duration = time.perf_counter() - begun
        wanted = comparable(inputs / "straight", LAST)
        outcomes = []
        for number in range(args.trials):
            outcomes.append(trial(inputs, f"trial{number}", wanted, rng.random() * duration, rng))
            print(json.dumps(outcomes[-1]), flush=True)
            counts = {"equal": sum(o["equal"] for o in outcomes), "trials": len(outcomes)}
            result = counts | {"seconds_of_a_run": duration, "outcomes": outcomes}
            args.output.write_text(
                json.dumps(result, indent=1) + "\n"
            )  # each time: it runs for long
    print(summary(outcomes, duration))


def trial(inputs: Path, name: str, wanted: dict, seconds: float, rng: random.Random) -> dict:
    """One run, killed after so many seconds and continued to its end."""
    ranks = start(inputs, name)
    time.sleep(seconds)
    who = rng.choice(["rank 0", "rank 1", "both"])
    saving = bool(list((inputs / name).glob("checkpoints/*.tmp")))
    for rank, pid in enumerate(ranks):
        if who in ("both", f"rank {rank}"):
            kill(pid)
    finished = finish(
        ranks, patience=5
    )  # a rank that waits for a dead one is ended, as torchrun does it
    reached = newest(inputs / name)
    assert finish(start(inputs, name)), f"{name} did not finish when it was continued"
    equal = comparable(inputs / name, LAST) == wanted
    return {
        "who": who,
        "after": seconds,
        "killed": not finished,
        "during_a_save": saving,
        "newest_checkpoint": reached,
        "equal": equal,
    }


def start(inputs: Path, name: str) -> list[int]:
    """Fork the two ranks of a run; returns their process numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork_rank(inputs, name, rank, port) for rank in (0, 1)]


def _fork_rank(inputs: Path, name: str, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update(traced(inputs / name) | {key: str(value) for key, value in place.items()})
        os.chdir(ROOT)
        with open(inputs / f"{name}.log{rank}", "a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        arguments = exact(
            inputs,
            name,
            "--continue_from",
            "auto",
            save_every=2,
            num_training_steps=UPDATES,
            eval_every=UPDATES // 2,
        )
        sys.argv = [FAULTY, *map(str, arguments)]
        runpy.run_path(str(ROOT / FAULTY), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        for (
            thread
        ) in threading.enumerate():  # as an interpreter that ends: a save under way is finished
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        os._exit(code)


def finish(ranks: list[int], patience: float = 120) -> bool:
    """Whether all ranks end well; those that have not ended after so many seconds are killed."""
    codes, deadline = {}, time.monotonic() + patience
    while len(codes) < len(ranks):
        for pid in ranks:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for pid in set(ranks) - set(codes):
                os.kill(pid, signal.SIGKILL)
            deadline += 60
        time.sleep(0.01)
    return all(code == 0 for code in codes.values())


def newest(folder: Path) -> int:
    return max(
        (
            int(p.parent.name.removeprefix("model_"))
            for p in folder.glob("checkpoints/model_*[0-9]/manifest.json")
        ),
        default=0,
    )


def summary(outcomes: list[dict], duration: float) -> str:
    equal, killed, saving, between = (
        sum(bool(o[key]) for o in outcomes)
        for key in ("equal", "killed", "during_a_save", "newest_checkpoint")
    )
    return (
        f"{equal} of {len(outcomes)} runs equal to the undisturbed one ({duration:.1f} s); "
        f"{killed} were killed before their end, "
        f"{between} of all when they had a checkpoint, {saving} of all during a save"
    )


if __name__ == "__main__":
    main()
