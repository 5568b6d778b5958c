"""Cause faults in every phase of a run, start the same command again, and compare.

    python benchmarks/bench_faults.py --trials 1000 --output benchmarks/results/faults_cpu.json

A trial starts a run (LLaMA or a vision transformer, on one or two processes, with one of several
settings), waits for a phase, causes a fault, and waits for the end. Then the same command is
started until it has finished. Compared with an undisturbed run are the hashes of weights and
optimizer and the decays after every update, every logged loss and statistic, and the SHA-256 of
every file of the last checkpoint. Outcomes:

    exact      all of that is equal, and no process was left behind
    different  something is not equal
    refused    the command does not finish, but ends with one sentence
    failed     the command does not finish, and ends in another way
    hung       a run did not end, or a process of it was left behind for 20 s

Trials that are in --output are not repeated, so that the script can be stopped and started again.
"""

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.end_to_end.common import (  # noqa: E402
    ROOT,
    command,
    exact,
    read_lines,
    surroundings,
    traced,
    vit,
    write_config,
    write_images,
    write_text,
)
from tests.support import fork_server  # noqa: E402

MAIN = "benchmarks/faults_main.py"
SECONDS_FOR_A_RUN, SECONDS_FOR_ORPHANS = 90, 20
PHASES = ("start-up", "data", "training", "evaluation", "saving", "exporting", "report", "exit")
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
FAULTS = (
    "kill a rank", "kill all", "kill torchrun", "kill a reader", "kill W&B", "stop a rank",
    "slow", "full disk", "folder gone", *(f"{name} to a rank" for name in SIGNALS),
    *(f"{name} to torchrun" for name in SIGNALS),
)  # fmt: skip
# Name -> script, processes, more flags.
SETTINGS: dict[str, tuple[str, int, list[str]]] = {
    "llama": ("torchrun_main", 1, []),
    "llama ddp": ("torchrun_main", 2, []),
    "llama fsdp": ("torchrun_main", 2, ["--parallel", "fsdp"]),
    "llama stream": ("torchrun_main", 1, ["--stream", "--workers", "2"]),
    "llama ddp stream": ("torchrun_main", 2, ["--stream", "--workers", "1"]),
    "llama ddp async": ("torchrun_main", 2, ["--esd_async", "--esd_lag", "2"]),
    "llama ddp dropout": ("torchrun_main", 2, ["--use_hf_model"]),
    "vit": ("main_vit", 1, []),
    "vit ddp": ("main_vit", 2, []),
}


class Run:
    """A started command.

    Args:
        inputs: folder of configs and data.
        setting: a name of SETTINGS.
        name: of the run; its folder is in `inputs`.
    """

    def __init__(self, inputs: Path, setting: str, name: str):
        script, self.processes, flags = SETTINGS[setting]
        self.last_update = 24 if script == "torchrun_main" else 40
        self.folder, self.phases = inputs / name, inputs / f"{name}.phases"
        self.mark = f"{inputs}/{name}.mark"
        if script == "main_vit":
            words = vit(inputs, name, *flags, "--save_every", "9")
        else:
            source = inputs / "dropout" if "dropout" in setting else inputs
            sizes = {"num_training_steps": 24, "save_every": 8, "eval_every": 8}
            more = ["--dataset", inputs / "corpus.jsonl", "--save_dir", inputs / name, *flags]
            words = exact(source, name, *more, **sizes)
        words += ["--timeout_minutes", "0.3"]
        environment = surroundings(
            traced(
                self.folder,
                SCRIPT=script,
                PHASES=str(self.phases),
                MARK=self.mark,
                WANDB_MODE="offline",
                TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5",
            )
        )
        self.log = inputs / f"{name}.log"
        with self.log.open("a") as output:
            self.process = fork_server.start(
                command(words, MAIN, self.processes),
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=environment,
            )

    def wait_for(self, phase: str) -> list[int]:
        """Return the process numbers of the ranks when a phase begins; [] if the run ends first."""
        while self.process.poll() is None:
            if self.phases.exists():
                lines = [line.split() for line in self.phases.read_text().splitlines()]
                if any(line[0] == phase for line in lines):
                    return sorted({int(line[-1]) for line in lines})
            time.sleep(0.005)
        return []

    def finish(self) -> int | None:
        """Wait for the end of the run and its processes; return the exit code, None if it hung."""
        deadline = time.monotonic() + SECONDS_FOR_A_RUN
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        code = self.process.poll()
        deadline = time.monotonic() + SECONDS_FOR_ORPHANS
        while living(self.mark) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = living(self.mark)
        for pid in left:
            fork_server.kill(pid)
        return None if left else code


def living(mark: str) -> list[int]:
    """Return the processes that have a text in their environment."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and mark.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                found.append(int(entry))
    return found


def cause(fault: str, run: Run, ranks: list[int], rng: random.Random) -> bool:
    """Cause a fault. Return False if the run has nothing that it could hit."""
    rank = rng.choice(ranks)
    what, _, target = fault.partition(" to ")
    if target or fault == "kill torchrun":
        if "torchrun" in fault and run.processes == 1:
            return False
        pid = run.process.pid if "torchrun" in fault else rank
        send(pid, getattr(signal, what) if target else signal.SIGKILL)
    elif fault == "kill a rank":
        send(rank, signal.SIGKILL)
    elif fault == "kill all":
        for pid in (*fork_server.descendants(run.process.pid), run.process.pid):
            send(pid, signal.SIGKILL)
    elif fault in ("kill a reader", "kill W&B"):
        words = (b"spawn_main", b"pt_data_worker") if "reader" in fault else (b"wandb",)
        pids = [pid for parent in ranks for pid in fork_server.descendants(parent)]
        pids = [pid for pid in pids if any(word in words_of(pid) for word in words)]
        if not pids:
            return False
        send(rng.choice(pids), signal.SIGKILL)
    elif fault == "stop a rank":
        if run.processes == 1:
            return False  # nothing can notice that
        send(rank, signal.SIGSTOP)
    elif fault == "slow":
        send(rank, signal.SIGSTOP)
        time.sleep(2)
        send(rank, signal.SIGCONT)
    elif fault == "full disk":
        for pid in ranks:
            with contextlib.suppress(OSError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    elif fault == "folder gone":
        if not run.folder.exists():
            return False
        run.folder.rename(run.folder.with_suffix(".gone"))
    return True


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def words_of(pid: int) -> bytes:
    """Return the command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def results(run: Run) -> dict[str, Any]:
    """Return everything of a finished run that must not depend on whether it was disturbed."""
    timings = (
        "throughput_", "mfu", "useful_mfu", "seconds", "data_wait_seconds", "analysis_seconds",
        "eval_seconds", "peak_memory_bytes",
    )  # fmt: skip
    metrics = [
        {k: v for k, v in line.items() if not k.startswith(timings)}
        for line in read_lines(run.folder / "metrics.jsonl")
    ]
    checkpoints = (run.folder / "checkpoints").iterdir()
    newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("model_")))
    return {
        "metrics": metrics,
        "modules": read_lines(run.folder / "modules.jsonl"),
        "traces": [trace_of(run, rank) for rank in range(run.processes)],
        "files": json.loads((newest / "manifest.json").read_text()),
        "report": (run.folder / "report.html").exists(),
    }


def trace_of(run: Run, rank: int) -> dict[int, Any]:
    """Return what a rank held after each update; of updates made twice the last.

    A line that a killed process was writing is left out, with the one that follows it on its line.
    """
    lines = {}
    for line in Path(f"{run.folder}.trace.rank{rank}").read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            lines[record.pop("update")] = record
    return lines


def trial(number: int, inputs: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Make one trial; return None if its fault cannot be caused with its settings."""
    rng = random.Random(number)
    setting, phase, fault = (rng.choice(list(choices)) for choices in (SETTINGS, PHASES, FAULTS))
    run = Run(inputs, setting, f"trial{number}")
    ranks = run.wait_for(phase)
    time.sleep(rng.random() * {"start-up": 1.0, "data": 0.5, "training": 1.5}.get(phase, 0.05))
    hit = bool(ranks) and run.process.poll() is None and cause(fault, run, ranks, rng)
    code = run.finish()
    if not hit:
        clean_up(inputs, run)
        return None
    outcome: dict[str, Any] = {"number": number, "setting": setting, "phase": phase}
    outcome |= {"fault": fault, "code": code}
    gone = run.folder.with_suffix(".gone")
    if gone.exists():
        shutil.rmtree(run.folder, ignore_errors=True)
        gone.rename(run.folder)
    again = run
    for _ in range(3):
        if code is None:
            break
        again = Run(inputs, setting, f"trial{number}")
        code = again.finish()
        if code == 0 and has_finished(again):
            break
    outcome["result"] = judge(again, code, wanted[setting])
    if outcome["result"] != "exact":
        outcome["log"] = again.log.read_text()[-3000:]
    clean_up(inputs, run)
    return outcome


def has_finished(run: Run) -> bool:
    """Return whether a run has made its last update and saved it."""
    return (run.folder / f"checkpoints/model_{run.last_update}/manifest.json").exists()


def judge(run: Run, code: int | None, wanted: dict[str, Any]) -> str:
    """Return the outcome of a trial, see above."""
    if code is None:
        return "hung"
    if code == 0:
        return "exact" if results(run) == wanted else "different"
    last = run.log.read_text().rstrip().splitlines()[-1:]
    return "refused" if last and "error" in last[0] else "failed"


def clean_up(inputs: Path, run: Run) -> None:
    """Delete everything of a trial."""
    for path in inputs.glob(f"{run.folder.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def numbers_of_trials(done: list[dict[str, Any]], count: int) -> Iterator[int]:
    """Yield numbers of trials that have not been made, until `count` outcomes are known."""
    known = {outcome["number"] for outcome in done}
    for number in itertools.count():
        if len(done) >= count:
            return
        if number not in known:
            yield number


def table(outcomes: list[dict[str, Any]]) -> str:
    """Return a table of phases and faults: how many trials were exact, and the others by name."""
    cells: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        cells[outcome["phase"], outcome["fault"]][outcome["result"]] += 1
    lines = [f"| | {' | '.join(PHASES)} |", "|---" * (len(PHASES) + 1) + "|"]
    for fault in FAULTS:
        texts = []
        for phase in PHASES:
            counts = cells[phase, fault]
            texts.append(", ".join(f"{n} {result}" for result, n in sorted(counts.items())) or "–")
        lines.append(f"| {fault} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    """Make the trials."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    content = json.loads(options.output.read_text()) if options.output.exists() else {}
    outcomes, skipped = content.get("outcomes", []), set(content.get("skipped", []))
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        (inputs / "dropout").mkdir()
        write_config(inputs)
        write_config(inputs / "dropout", attention_dropout=0.2, num_attention_heads=4)
        write_text(inputs)
        write_images(inputs / "images")
        os.environ["ALPHADECAY_CACHE"] = str(inputs / "cache")
        wanted = {}
        for setting in SETTINGS:
            run = Run(inputs, setting, f"straight-{setting.replace(' ', '-')}")
            assert run.finish() == 0, run.log.read_text()[-3000:]
            wanted[setting] = results(run)
        for number in numbers_of_trials(outcomes, options.trials):
            if number in skipped:
                continue
            outcome = trial(number, inputs, wanted)
            if outcome is None:
                skipped.add(number)
                continue
            outcomes.append(outcome)
            text = {k: v for k, v in outcome.items() if k != "log"}
            print(json.dumps(text), flush=True)
            content = {"table": table(outcomes).splitlines(), "outcomes": outcomes}
            options.output.write_text(
                json.dumps(content | {"skipped": sorted(skipped)}, indent=1) + "\n"
            )
    print(table(outcomes))
    print(collections.Counter(outcome["result"] for outcome in outcomes))


if __name__ == "__main__":
    main()
