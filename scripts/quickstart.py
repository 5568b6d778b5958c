"""Helper of the quickstart scripts: the sample of text, progress lines, and the table at the end.

    python scripts/quickstart.py sample PREPARED OUTPUT       a training and a validation file, drawn from pydocs
    python scripts/quickstart.py step FOLDER MEASURED NAME TITLE PRODUCT COMMAND...
    python scripts/quickstart.py results FOLDER MEASURED      the losses, with the spread between seeds beside them
    python scripts/quickstart.py measure OUTPUT FOLDER...     write MEASURED from quickstarts that differ in the seed

MEASURED is `results/quickstart/llama.json` or `vit.json`: the seconds of each step and the results of several seeds, measured
once by `results/quickstart/measure.sh`. The standard library is enough for all but `measure`.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

METHODS = {"wd0": "no decay", "uniform": "uniform decay", "alphadecay": "AlphaDecay"}
SCORES = {"perplexity": ("perplexity", ".2f"), "top1": ("top-1 %", ".2f")}  # the second number of a run, with its format
STATE = "quickstart.json"  # in the folder of a quickstart: the finished steps

# Characters, about 2.4 of them to a token: few enough to train on them eight times in a minute.
TRAINING_CHARACTERS, VALIDATION_CHARACTERS = 600_000, 250_000


# ------------------------------------------------------------------------------------------------------------ the sample


def sample(prepared: Path, output: Path) -> None:
    """Write train.jsonl and validation.jsonl: documents of pydocs, drawn by their hash, none in both.

    The first documents of pydocs all come from the standard library. A draw by hash takes from every package alike, and
    takes the same documents on every machine that has the same packages.

    Args:
        prepared: Folder that `prepare_data --dataset pydocs` wrote. Its index says where the gathered text lies.
        output: Folder for the two files.
    """
    (gathered, _), *_ = json.loads((prepared / "index.json").read_text(encoding="utf8"))["stamp"][0]
    with gzip.open(gathered, "rt", encoding="utf8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts.sort(key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
    output.mkdir(parents=True, exist_ok=True)
    documents = iter(texts)
    for name, characters in (("validation", VALIDATION_CHARACTERS), ("train", TRAINING_CHARACTERS)):
        with (output / f"{name}.jsonl").open("w", encoding="utf8") as file:
            while characters > 0 and (text := next(documents, None)) is not None:
                file.write(json.dumps({"text": text}) + "\n")
                characters -= len(text)


# -------------------------------------------------------------------------------------------------------------- progress


@dataclass
class Step:
    """One step of a quickstart.

    Attributes:
        name: The key of its measured seconds; for a training run the name of the method.
        title: What the progress line calls it.
        product: A file that the step leaves. Without it the step is not finished.
        command: The words of the command line.
    """

    name: str
    title: str
    product: Path
    command: list[str]


def read_state(folder: Path) -> dict[str, dict]:
    """Return the finished steps of a quickstart, each with its command and its seconds."""
    path = folder / STATE
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}


def estimates(measured: dict[str, float], state: dict[str, dict]) -> dict[str, float]:
    """Return the seconds that each step will probably take on this machine.

    They are the measured seconds, times how much longer the training runs took here that are finished. Only training runs
    are compared: the other steps take less time where the gathered text is cached already.

    Args:
        measured: Seconds of each step on the machine of the measurement, in the order of the steps.
        state: The finished steps here.
    """
    trained = [name for name in state if name in METHODS and name in measured]
    ours = sum(state[name]["seconds"] for name in trained)
    factor = ours / sum(measured[name] for name in trained) if trained else 1.0
    return {name: seconds * factor for name, seconds in measured.items()}


def duration(seconds: float) -> str:
    """Return seconds as text, for instance "1 min 10 s"."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def run_step(folder: Path, measured: dict[str, float], step: Step) -> int:
    """Print the progress line, run the command unless it is finished, and remember its seconds.

    The output of the command goes to `FOLDER/NAME.log`. On a terminal the progress line counts down.

    Returns:
        The exit code of the command; 0 where the step was finished before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state, names = read_state(folder), list(measured)
    place = f"[{names.index(step.name) + 1} of {len(names)}] {step.title}" if step.name in names else step.title
    if state.get(step.name, {}).get("command") == step.command and step.product.exists():
        print(f"{place}: finished before", flush=True)
        return 0
    expected = estimates(measured, state)
    own = expected.get(step.name)
    left = sum(list(expected.values())[names.index(step.name) :]) if own is not None else None
    if own is not None:
        print(f"{place}, about {duration(own)}; {duration(left)} left", flush=True)
    else:
        print(place, flush=True)
    log, start = folder / f"{step.name}.log", time.monotonic()
    code = run_logged(step.command, log, start, left)
    if code:
        if code in (130, -signal.SIGINT, -signal.SIGTERM):
            print("interrupted: the same command continues from here", file=sys.stderr)
            return 130
        lines = log.read_text(encoding="utf8", errors="replace").splitlines()[-20:]
        print("\n".join([*lines, f"error: this step failed; all of its output is in {log}"]), file=sys.stderr)
        return code
    state[step.name] = {"command": step.command, "seconds": round(time.monotonic() - start, 1)}
    partial = folder / f"{STATE}.partial"
    partial.write_text(json.dumps(state, indent=1) + "\n", encoding="utf8")
    partial.replace(folder / STATE)
    return 0


def run_logged(command: list[str], log: Path, start: float, left: float | None) -> int:
    """Run a command with its output in a file, counting down on a terminal, and return its exit code."""
    with log.open("a", encoding="utf8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    interrupted = False
    while True:
        try:
            code = process.wait(timeout=1)
            break
        except subprocess.TimeoutExpired:
            if sys.stdout.isatty() and left is not None:
                remaining = left - (time.monotonic() - start)
                print(f"\r\033[K    {duration(remaining)} left", end="", flush=True)
        except KeyboardInterrupt:  # the command has the signal too: a training run writes a checkpoint first
            interrupted = True
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
    return 130 if interrupted else code


# --------------------------------------------------------------------------------------------------------------- results


def final_evaluation(run: Path) -> dict:
    """Return the record of a run's last evaluation. Exits with a message where the run is not finished."""
    with (run / "metrics.jsonl").open(encoding="utf8") as file:
        final = [record for record in map(json.loads, file) if record.get("final") is True]
    if not final:
        sys.exit(f"error: {run} is not finished; start the quickstart again, it continues")
    return final[-1]


def score_name(record: dict) -> str:
    """Return the name of the score beside the loss: perplexity of a language model, top1 of a classifier."""
    return next(name for name in SCORES if name in record)


def table(finals: dict[str, dict], measured: dict) -> list[str]:
    """Return the lines of the final table and what the differences in it mean.

    Args:
        finals: The last evaluation of each method's run.
        measured: What `measure` wrote.
    """
    score = score_name(finals["wd0"])
    title, form = SCORES[score]
    seeds = len(measured["seeds"])
    head = f"{seeds} seeds, measured before:"
    lines = [f"{'validation':<15}{'loss':>8}{title:>12}   | {head} {'loss':>14}{title:>18}"]
    for method, name in METHODS.items():
        run, before = finals[method], measured["methods"][method]
        spreads = [f"{before[key]['mean']:{f}} ± {before[key]['sd']:{f}}" for key, f in (("eval_loss", ".4f"), (score, form))]
        lines.append(
            f"{name:<15}{run['eval_loss']:>8.4f}{run[score]:>12{form}}   | {'':{len(head)}} {spreads[0]:>14}{spreads[1]:>18}"
        )
    limit = measured["limit"]
    lines += [
        "± is the standard deviation between seeds.",
        f"Two runs that differ in nothing but the seed differ by up to {limit:.3f} in loss (95 % of such pairs). A smaller",
        "difference between two single runs is within the spread between seeds and shows nothing about the methods. Here:",
    ]
    for one, other in (("uniform", "wd0"), ("alphadecay", "uniform")):
        difference = finals[one]["eval_loss"] - finals[other]["eval_loss"]
        verdict = "larger than" if abs(difference) > limit else "within"
        lines.append(f"  {METHODS[one]} minus {METHODS[other]}: {difference:+.4f}, {verdict} the spread between seeds")
    return lines


# ----------------------------------------------------------------------------------------------------------- measurement


def measure(folders: list[Path]) -> dict:
    """Return the results of several quickstarts and their spread between seeds, as `results` and `step` read them.

    `limit` bounds the difference of two runs of one method with different seeds, in 95 % of all pairs: Student's t times
    the square root of 2 times the standard deviation within a method, pooled over the methods. The seconds are those of the
    first folder.
    """
    from scipy.stats import t

    runs = []
    for folder in folders:
        for method in METHODS:
            final = final_evaluation(folder / method)
            seed = json.loads((folder / method / "run.json").read_text(encoding="utf8"))["arguments"]["seed"]
            score = score_name(final)
            seconds = read_state(folder)[method]["seconds"]
            runs.append({"method": method, "seed": seed, "eval_loss": final["eval_loss"], score: final[score], "seconds": seconds})
    methods, variances = {}, []
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method]
        methods[method] = {
            key: {"mean": statistics.fmean(run[key] for run in mine), "sd": statistics.stdev(run[key] for run in mine)}
            for key in ("eval_loss", score)
        }
        variances.append(methods[method]["eval_loss"]["sd"] ** 2)
    freedom = len(METHODS) * (len(folders) - 1)
    arguments = json.loads((folders[0] / "alphadecay" / "run.json").read_text(encoding="utf8"))["arguments"]
    return {
        "seeds": sorted({run["seed"] for run in runs}),
        "limit": float(t.ppf(0.975, freedom)) * (2 * statistics.fmean(variances)) ** 0.5,
        "seconds": {name: step["seconds"] for name, step in read_state(folders[0]).items()},
        "methods": methods,
        "differences": {
            f"{one} - {other}": paired(runs, one, other) for one, other in (("uniform", "wd0"), ("alphadecay", "uniform"))
        },
        "runs": runs,
        "machine": {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "arguments_of_alphadecay": arguments,
    }


def paired(runs: list[dict], one: str, other: str) -> dict:
    """Return mean and standard deviation of the differences in loss between two methods, seed by seed."""
    losses = {(run["method"], run["seed"]): run["eval_loss"] for run in runs}
    pairs = [loss - losses[other, seed] for (method, seed), loss in losses.items() if method == one]
    return {"mean": statistics.fmean(pairs), "sd": statistics.stdev(pairs)}


def processor() -> str:
    """Return the name of the processor, as far as the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


# --------------------------------------------------------------------------------------------------------------- command


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    places = {
        "sample": ("prepared", "output"),
        "step": ("folder", "measured", "name", "title", "product"),
        "results": ("folder", "measured"),
        "measure": ("output",),
    }
    for action, names in places.items():
        command = commands.add_parser(action)
        for name in names:
            command.add_argument(name, type=str if name in ("name", "title") else Path)
        if action == "step":
            command.add_argument("command", nargs=argparse.REMAINDER)
        if action == "measure":
            command.add_argument("folders", nargs="+", type=Path)
    return parser.parse_args()


def main() -> int:
    """Run the command that the first argument names, and return its exit code."""
    args = parse_arguments()
    if args.action == "sample":
        sample(args.prepared, args.output)
    elif args.action == "step":
        # Before the first measurement there is no file: the steps run without estimates.
        measured = json.loads(args.measured.read_text(encoding="utf8"))["seconds"] if args.measured.exists() else {}
        return run_step(args.folder, measured, Step(args.name, args.title, args.product, args.command))
    elif args.action == "results":
        finals = {method: final_evaluation(args.folder / method) for method in METHODS}
        if args.measured.exists():
            print("\n".join(table(finals, json.loads(args.measured.read_text(encoding="utf8")))))
    else:
        args.output.write_text(json.dumps(measure(args.folders), indent=1) + "\n", encoding="utf8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
