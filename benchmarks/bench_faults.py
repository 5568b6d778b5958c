"""Cause faults in every phase of a run, start the same command again, and compare.

    python benchmarks/bench_faults.py --trials 1000 --output benchmarks/results/faults_cpu.json
    python benchmarks/bench_faults.py --trials 100 --settings dropout --phases training \
        --faults "kill a rank,kill all" --output benchmarks/results/faults_dropout_cpu.json
    python benchmarks/bench_faults.py --trials 160 --settings "llama,llama ddp,llama fsdp,vit ddp" \
        --phases training --faults "SIGINT to,SIGHUP to,SIGTERM to,SIGXCPU to" \
        --output benchmarks/results/faults_signals_cpu.json

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

A process that is stopped for ever and that nobody waits for keeps torchrun waiting. It is continued
after a minute, and the outcome says so ("continued"). After a signal, "saved" tells whether the
newest checkpoint is of the last update that was made.

The logs of other outcomes than exact are kept in a folder, with the stacks of what hung. Trials
that are in --output are not repeated, so that the script can be stopped and started again.
"""

import argparse
import collections
import concurrent.futures
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
from collections.abc import Callable, Iterable, Iterator
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
SECONDS_FOR_A_RUN, SECONDS_FOR_ORPHANS, SECONDS_UNTIL_CONTINUED = 150, 20, 60
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
    "llama dropout": ("torchrun_main", 1, ["--use_hf_model"]),
    "llama ddp dropout": ("torchrun_main", 2, ["--use_hf_model"]),
    "llama ddp 4 dropout": ("torchrun_main", 4, ["--use_hf_model"]),
    "llama fsdp dropout": ("torchrun_main", 2, ["--use_hf_model", "--parallel", "fsdp"]),
    "llama fsdp 4 dropout": ("torchrun_main", 4, ["--use_hf_model", "--parallel", "fsdp"]),
    "vit": ("main_vit", 1, []),
    "vit ddp": ("main_vit", 2, []),
}


class Run:
    """A started command.

    Args:
        inputs: folder of configs and data.
        setting: a name of SETTINGS.
        name: of the run; its folder is in `inputs`.
        wandb: WANDB_MODE.
        cold: start new interpreters instead of forks.
    """

    def __init__(
        self,
        inputs: Path,
        setting: str,
        name: str,
        wandb: str = "disabled",
        cold: bool = False,
    ):
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
                WANDB_MODE=wandb,
                TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5",
            )
        )
        self.log = inputs / f"{name}.log"
        self.continued = False
        with self.log.open("a") as output:
            self.process = fork_server.start(
                command(words, MAIN, self.processes),
                cold,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=environment,
            )

    def wait_for(self, phase: str) -> list[int]:
        """Return the process numbers of the ranks when a phase begins; [] if the run ends first."""
        while self.process.poll() is None:
            if any(line[0] == phase for line in self.announced()):
                return self.ranks()
            time.sleep(0.005)
        return []

    def finish(self) -> int | None:
        """Wait for the end of the run and its processes; return the exit code, None if it hung."""
        begun = time.monotonic()
        while self.process.poll() is None and time.monotonic() - begun < SECONDS_FOR_A_RUN:
            time.sleep(0.05)
            if time.monotonic() - begun > SECONDS_UNTIL_CONTINUED and not self.continued:
                self.continued = self.continue_stopped()
        code = self.process.poll()
        deadline = time.monotonic() + SECONDS_FOR_ORPHANS
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.05)
        left = self.living()
        for pid in left:
            if pid in self.ranks():
                with contextlib.suppress(OSError):  # the limit of "full disk"
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
                send(pid, signal.SIGQUIT)  # it writes the stacks of its threads to the log
                time.sleep(1)
        for pid in left:
            with self.log.open("a") as log:
                log.write(f"left behind: process {pid}, {words_of(pid)!r}\n")
            fork_server.kill(pid)
        return None if left else code

    def living(self) -> list[int]:
        """Return the processes of the run that have not ended.

        The ranks, which are forks, have announced their numbers. All others have a mark in their
        environment.
        """
        found = [self.process.pid, *self.ranks()]
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if self.mark.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                    found.append(int(entry))
        return [pid for pid in dict.fromkeys(found) if state_of(pid) not in ("", "Z")]

    def announced(self) -> list[list[str]]:
        """Return what the ranks have announced: phase, rank, process number."""
        with contextlib.suppress(FileNotFoundError):
            return [line.split() for line in self.phases.read_text().splitlines()]
        return []

    def ranks(self) -> list[int]:
        """Return the process numbers of the ranks that have begun."""
        return sorted({int(line[-1]) for line in self.announced()})

    def continue_stopped(self) -> bool:
        """Let stopped processes of the run go on. Return whether there was one."""
        stopped = [pid for pid in self.living() if state_of(pid) == "T"]
        for pid in stopped:
            send(pid, signal.SIGCONT)
        return bool(stopped)

    def reached(self) -> int:
        """Return the last update that rank 0 has made; 0 if none."""
        trace = Path(f"{self.folder}.trace.rank0")
        return max(trace_of(self, 0), default=0) if trace.exists() else 0

    def saved(self) -> int:
        """Return the update of the newest complete checkpoint; 0 if there is none."""
        found = self.folder.glob("checkpoints/model_*[0-9]/manifest.json")
        return max((int(path.parent.name.removeprefix("model_")) for path in found), default=0)


def is_possible(fault: str, setting: str) -> bool:
    """Return whether a run of a setting can have a fault."""
    script, processes, flags = SETTINGS[setting]
    if "torchrun" in fault or fault == "stop a rank":  # nothing notices that one process stops
        return processes > 1
    return fault != "kill a reader" or script == "main_vit" or "--stream" in flags


def cause(fault: str, run: Run, ranks: list[int], rng: random.Random) -> bool:
    """Cause a fault. Return False if the run has nothing that it could hit."""
    rank = rng.choice(ranks)
    what, _, target = fault.partition(" to ")
    if target or fault == "kill torchrun":
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


def state_of(pid: int) -> str:
    """Return the state letter of a process; empty if it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


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
    newest = run.folder / f"checkpoints/model_{run.saved()}"
    return {
        "metrics": metrics,
        "modules": read_lines(run.folder / "modules.jsonl"),
        "traces": [trace_of(run, rank) for rank in range(run.processes)],
        "files": json.loads((newest / "manifest.json").read_text()),
        "report": (run.folder / "report.html").exists(),
    }


def trace_of(run: Run, rank: int) -> dict[int, Any]:
    """Return what a rank held after each update; of updates made twice the last.

    A line that a killed process was writing is left out.
    """
    lines = {}
    for line in Path(f"{run.folder}.trace.rank{rank}").read_text().split():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            lines[record.pop("update")] = record
    return lines


def trial(
    number: int, choices: list[list[str]], inputs: Path, wanted: dict[str, Any], logs: Path
) -> dict[str, Any] | None:
    """Make one trial; return None if its fault cannot be caused with its settings.

    Args:
        number: of the trial, which decides everything that is drawn.
        choices: the settings, the phases and the faults to draw from.
        inputs: folder of configs and data.
        wanted: results of the undisturbed run of each setting.
        logs: folder for the log of a trial that is not exact.
    """
    rng, begun = random.Random(number), time.monotonic()
    settings, phases, faults = choices
    # The faults in turn, the phases in turn, and a random setting in which the fault is possible.
    fault, phase = faults[number % len(faults)], phases[number // len(faults) % len(phases)]
    settings = [name for name in settings if is_possible(fault, name)]
    if not settings:
        return None
    setting = rng.choice(settings)
    wandb = "offline" if fault == "kill W&B" else rng.choice(("offline", "disabled"))
    # torchrun raises an exception in its handler of signals. Where it forks its workers, as here,
    # Python ignores an exception that comes during the fork; where it starts them, it does not.
    cold = "torchrun" in fault and phase == "start-up"
    run = Run(inputs, setting, f"trial{number}", wandb, cold)
    ranks = run.wait_for(phase)
    time.sleep(rng.random() * {"start-up": 1.0, "data": 1.0, "training": 1.0}.get(phase, 0.05))
    hit = bool(ranks) and run.process.poll() is None and cause(fault, run, ranks, rng)
    code = run.finish()
    if not hit:
        clean_up(inputs, run)
        return None
    outcome: dict[str, Any] = {"number": number, "setting": setting, "phase": phase}
    outcome |= {"fault": fault, "code": code}
    if run.continued:
        outcome["continued"] = True
    if (" to " in fault or fault == "kill torchrun") and run.reached():
        outcome["saved"] = run.saved() == run.reached()
    gone = run.folder.with_suffix(".gone")
    if gone.exists():
        shutil.rmtree(run.folder, ignore_errors=True)
        gone.rename(run.folder)
    again = run
    for _ in range(3):
        if code is None:
            break
        again = Run(inputs, setting, f"trial{number}", wandb)
        code = again.finish()
        if code == 0 and again.saved() == again.last_update:
            break
    outcome["result"] = judge(again, code, wanted[setting])
    if outcome["result"] == "different":
        found = results(again)
        outcome["differs"] = [name for name in found if found[name] != wanted[setting][name]]
    outcome["seconds"] = round(time.monotonic() - begun, 1)
    if outcome["result"] != "exact" or not outcome.get("saved", True):
        shutil.copy(again.log, logs / f"{number} {setting}, {phase}, {fault}.log")
    clean_up(inputs, run)
    return outcome


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


def in_parallel(
    done: dict[int, dict[str, Any] | None],
    count: int,
    jobs: int,
    one: Callable[[int], dict[str, Any] | None],
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield the numbers and outcomes of trials until there are `count`, those of `done` included.

    Args:
        done: outcomes by number; None: its fault could not be caused.
        count: how many outcomes are wanted.
        jobs: how many trials run at a time.
        one: makes a trial.
    """
    numbers = (number for number in itertools.count() if number not in done)
    found = sum(outcome is not None for outcome in done.values())
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running: dict[concurrent.futures.Future, int] = {}
        while found < count:
            while len(running) < min(jobs, count - found):
                number = next(numbers)
                running[pool.submit(one, number)] = number
            for ended in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                outcome = ended.result()
                found += outcome is not None
                yield running.pop(ended), outcome


def table(outcomes: list[dict[str, Any]]) -> list[str]:
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
    return lines


def by_setting(outcomes: list[dict[str, Any]]) -> list[str]:
    """Return a table of settings: how many trials ended how."""
    lines = ["| setting | trials | outcomes | not saved |", "|---|---|---|---|"]
    for setting in SETTINGS:
        some = [outcome for outcome in outcomes if outcome["setting"] == setting]
        counts = collections.Counter(outcome["result"] for outcome in some)
        text = ", ".join(f"{n} {result}" for result, n in sorted(counts.items()))
        lost = sum(not outcome.get("saved", True) for outcome in some)
        lines.append(f"| {setting} | {len(some)} | {text} | {lost} |")
    return lines


def chosen(text: str, names: Iterable[str]) -> list[str]:
    """Return the names that contain one of the comma-separated words, or are equal to one."""
    words, known = text.split(","), list(names)
    exact = [name for name in known if name in words]
    return exact or [name for name in known if any(word in name for word in words)]


def main() -> None:
    """Make the trials."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time (default 2)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir(), "faults"))
    for name, names in (("settings", SETTINGS), ("phases", PHASES), ("faults", FAULTS)):
        parser.add_argument(
            f"--{name}", default="", help=f"comma-separated words of: {', '.join(names)}"
        )
    options = parser.parse_args()
    choices = [
        chosen(text, names)
        for text, names in (
            (options.settings, SETTINGS), (options.phases, PHASES), (options.faults, FAULTS),
        )
    ]  # fmt: skip
    options.logs.mkdir(parents=True, exist_ok=True)
    content = json.loads(options.output.read_text()) if options.output.exists() else {}
    done = dict.fromkeys(content.get("skipped", []))
    done |= {outcome["number"]: outcome for outcome in content.get("outcomes", [])}
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        wanted = undisturbed(inputs, choices[0])

        def one(number: int) -> dict[str, Any] | None:
            return trial(number, choices, inputs, wanted, options.logs)

        for number, outcome in in_parallel(done, options.trials, options.jobs, one):
            done[number] = outcome
            if outcome is not None:
                print(json.dumps(outcome), flush=True)
            write(done, options.output)
    print("\n".join(table([outcome for outcome in done.values() if outcome])))


def undisturbed(inputs: Path, settings: list[str]) -> dict[str, Any]:
    """Write configs and data, and return the results of an undisturbed run of each setting."""
    (inputs / "dropout").mkdir()
    write_config(inputs)
    write_config(inputs / "dropout", attention_dropout=0.2, num_attention_heads=4)
    write_text(inputs)
    write_images(inputs / "images")
    os.environ["ALPHADECAY_CACHE"] = str(inputs / "cache")
    wanted = {}
    for setting in settings:
        run = Run(inputs, setting, f"straight-{setting.replace(' ', '-')}")
        assert run.finish() == 0, run.log.read_text()[-3000:]
        wanted[setting] = results(run)
    return wanted


def write(done: dict[int, dict[str, Any] | None], path: Path) -> None:
    """Write outcomes and tables to a file, which is never half written."""
    outcomes = [outcome for _, outcome in sorted(done.items()) if outcome]
    content = {
        "outcomes_by_result": collections.Counter(outcome["result"] for outcome in outcomes),
        "table": table(outcomes),
        "by_setting": by_setting(outcomes),
        "outcomes": outcomes,
        "skipped": sorted(number for number, outcome in done.items() if outcome is None),
    }
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
