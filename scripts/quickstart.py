"""Helper of the quickstart scripts: the sample of text, progress lines, and the table at the end.

    python scripts/quickstart.py sample PREPARED OUTPUT
    python scripts/quickstart.py step FOLDER MEASURED NAME TITLE PRODUCT COMMAND...
    python scripts/quickstart.py results FOLDER MEASURED
    python scripts/quickstart.py measure OUTPUT FOLDER...

`sample` draws a training and a validation file from the gathered docstrings. `step` prints a
progress line and runs a command. `results` prints the losses of the runs and, beside them, the
spread between seeds. `measure` writes the file MEASURED from quickstarts that differ in the seed;
`results/quickstart/measure.sh` calls it, and its files are beside it.
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
COMPARISONS = (("uniform", "wd0"), ("alphadecay", "uniform"))
SCORES = {"perplexity": "perplexity", "top1": "top-1 (%)"}  # what stands beside the loss
STATE = "quickstart.json"  # the steps that a quickstart has run, in its folder

# About 2.4 characters are a token. So little text can be repeated eight times in one minute.
TRAINING_CHARACTERS, VALIDATION_CHARACTERS = 600_000, 250_000


# ---------------------------------------------------------------------------------- the sample


def sample(prepared: Path, output: Path) -> None:
    """Write validation.jsonl and train.jsonl: documents of pydocs, none of them in both files.

    Documents are drawn by their hash, because the first documents of pydocs all come from the
    standard library. A machine with the same packages draws the same documents.

    Args:
        prepared: Folder that `prepare_data --dataset pydocs` wrote. Its index names the file with
            the gathered text.
        output: Folder for the two files.
    """
    (gathered, _), *_ = read_json(prepared / "index.json")["stamp"][0]
    with gzip.open(gathered, "rt", encoding="utf8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts.sort(key=lambda text: hashlib.blake2b(text.encode(), digest_size=16).digest())
    documents = iter(texts)
    output.mkdir(parents=True, exist_ok=True)
    for name, wanted in (("validation", VALIDATION_CHARACTERS), ("train", TRAINING_CHARACTERS)):
        lines, characters = [], 0
        while characters < wanted and (text := next(documents, None)) is not None:
            lines.append(json.dumps({"text": text}) + "\n")
            characters += len(text)
        write_text(output / f"{name}.jsonl", "".join(lines))


def read_json(path: Path) -> dict:
    """Return the content of a JSON file."""
    return json.loads(path.read_text(encoding="utf8"))


def write_text(path: Path, text: str) -> None:
    """Write a file under another name and rename it, so that it is never there in part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf8")
    partial.replace(path)


# ------------------------------------------------------------------------------------ progress


@dataclass
class Step:
    """One step of a quickstart.

    Attributes:
        name: Its name in the measured seconds; for a training run the name of the method.
        title: Its name in the progress line.
        product: A file that the command writes at its end.
        command: The words of the command line.
    """

    name: str
    title: str
    product: Path
    command: list[str]


def estimates(measured: dict[str, float], state: dict[str, dict]) -> dict[str, float]:
    """Return the seconds that each step is expected to take on this machine.

    These are the measured seconds, multiplied by how much longer the finished training runs took
    here. The other steps are not compared, because they are short where the text is gathered
    already.

    Args:
        measured: Seconds of each step where they were measured, in the order of the steps.
        state: Content of the file `STATE`.
    """
    trained = [name for name in METHODS if name in measured and is_finished(state, name)]
    here = sum(state[name]["seconds"] for name in trained)
    factor = here / sum(measured[name] for name in trained) if trained else 1.0
    return {name: seconds * factor for name, seconds in measured.items()}


def is_finished(state: dict[str, dict], name: str) -> bool:
    """Return whether a step has run to its end."""
    return state.get(name, {}).get("finished", False)


def duration(seconds: float) -> str:
    """Return seconds as text, for instance "1 min 10 s"."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def run_step(folder: Path, measured: dict[str, float], step: Step) -> int:
    """Print a progress line, run the command unless it is finished, and record its seconds.

    The output of the command goes to FOLDER/NAME.log.

    Args:
        folder: Folder of the quickstart.
        measured: Seconds of each step where they were measured; empty before the measurement.
        step: The step.

    Returns:
        The exit code of the command; 0 if it was finished before, 130 if it was interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = read_json(folder / STATE) if (folder / STATE).exists() else {}
    earlier = state.get(step.name, {})
    if earlier.get("command") != step.command:
        earlier = {}
    names, left = list(measured), None
    line = step.title
    if step.name in names:
        position = names.index(step.name)
        line = f"[{position + 1} of {len(names)}] {step.title}"
    if earlier.get("finished") and step.product.exists():
        print(f"{line}: finished before", flush=True)
        return 0
    if step.name in names:
        expected = list(estimates(measured, state).values())[position:]
        left = sum(expected)
        line += f", about {duration(expected[0])}; {duration(left)} left"
    print(line, flush=True)

    log, start = folder / f"{step.name}.log", time.monotonic()
    code = run_logged(step.command, log, left)
    state[step.name] = {
        "command": step.command,
        "seconds": round(earlier.get("seconds", 0) + time.monotonic() - start, 1),
        "finished": code == 0,
    }
    write_text(folder / STATE, json.dumps(state, indent=1) + "\n")
    if code == 130:
        print("interrupted: start the same command again to continue", file=sys.stderr)
    elif code:
        lines = log.read_text(encoding="utf8", errors="replace").splitlines()[-20:]
        print(*lines, f"error: this step failed; {log} has its output", sep="\n", file=sys.stderr)
    return code


def run_logged(command: list[str], log: Path, left: float | None) -> int:
    """Run a command and append its output to a file. On a terminal, count down meanwhile.

    Args:
        command: The words of the command line.
        log: File that takes standard output and standard error.
        left: Expected seconds until the end of the quickstart; None if unknown.

    Returns:
        The exit code, 130 if Ctrl-C ended the command.
    """
    countdown = left is not None and sys.stdout.isatty()
    start, interrupted, code = time.monotonic(), False, None
    with log.open("a", encoding="utf8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    while code is None:
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if countdown:
                remaining = duration(left - (time.monotonic() - start))
                print(f"\r\033[K    {remaining} left", end="", flush=True)
        except KeyboardInterrupt:
            # The command receives the signal too. A training run first writes a checkpoint.
            interrupted = True
    if countdown:
        print("\r\033[K", end="", flush=True)
    return 130 if interrupted or code in (-signal.SIGINT, -signal.SIGTERM) else code


# ------------------------------------------------------------------------------------- results


def final_evaluation(run: Path) -> dict:
    """Return the record of a run's last evaluation. Exit with a message if the run has none."""
    with (run / "metrics.jsonl").open(encoding="utf8") as file:
        final = [record for record in map(json.loads, file) if record.get("final") is True]
    if not final:
        sys.exit(f"error: {run} is not finished; start the quickstart again to continue it")
    return final[-1]


def score_of(record: dict) -> str:
    """Return the name of the score beside the loss: `perplexity`, or `top1` of a classifier."""
    return next(name for name in SCORES if name in record)


def table(finals: dict[str, dict], measured: dict) -> list[str]:
    """Return the lines that end a quickstart: results, spread, and what the differences mean.

    Args:
        finals: Record of the last evaluation for each method.
        measured: What `measure` returned.
    """
    score = score_of(finals["wd0"])
    heading = f"{len(measured['seeds'])} seeds, measured before: mean ± standard deviation"
    lines = [
        f"{'':<15}{'this validation':>20}    {heading}",
        f"{'':<15}{'loss':>8}{SCORES[score]:>12}    {'loss':<18}{SCORES[score]}",
    ]
    for method, name in METHODS.items():
        final, before = finals[method], measured["methods"][method]
        losses = "{mean:.4f} ± {sd:.4f}".format(**before["eval_loss"])
        scores = "{mean:.2f} ± {sd:.2f}".format(**before[score])
        this = f"{final['eval_loss']:>8.4f}{final[score]:>12.2f}"
        lines.append(f"{name:<15}{this}    {losses:<18}{scores}")
    limit = measured["limit"]
    lines += [
        "",
        "From seed to seed the difference in loss between two methods varies by up to "
        f"{limit:.4f} around its mean",
        "(95 %). A smaller difference between two single runs says nothing about their methods:",
    ]
    for one, other in COMPARISONS:
        difference = finals[one]["eval_loss"] - finals[other]["eval_loss"]
        verdict = "more than" if abs(difference) > limit else "within"
        names = f"{METHODS[one]} minus {METHODS[other]}"
        seeds = "{mean:+.4f} ± {sd:.4f}".format(
            **measured["paired_differences"][f"{one} - {other}"]
        )
        lines.append(f"  {names}: {difference:+.4f}, {verdict} the spread (all seeds: {seeds})")
    return lines


# --------------------------------------------------------------------------------- measurement


def measure(folders: list[Path]) -> dict:
    """Return the results of quickstarts that differ in the seed, and the spread between them.

    The three runs of a seed start from the same weights and see the data in the same order, so
    differences are taken seed by seed. `limit` bounds how far one such difference lies from its
    mean, in 95 % of seeds: Student's t times the standard deviation, pooled over `COMPARISONS`.
    `seconds` are those of the first folder.

    Args:
        folders: Folders of finished quickstarts.
    """
    from scipy.stats import t

    runs = []
    for folder in folders:
        for method in METHODS:
            final = final_evaluation(folder / method)
            run = {
                "method": method,
                "seed": read_json(folder / method / "run.json")["arguments"]["seed"],
                "seconds": read_json(folder / STATE)[method]["seconds"],
            }
            runs.append(run | {key: final[key] for key in ("eval_loss", score_of(final))})
    methods = {}
    for method in METHODS:
        mine = [run for run in runs if run["method"] == method]
        methods[method] = {
            key: spread([run[key] for run in mine]) for key in ("eval_loss", score_of(mine[0]))
        }
    losses = {(run["method"], run["seed"]): run["eval_loss"] for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    differences = {
        f"{one} - {other}": spread([losses[one, seed] - losses[other, seed] for seed in seeds])
        for one, other in COMPARISONS
    }
    variance = statistics.fmean(difference["sd"] ** 2 for difference in differences.values())
    freedom = len(COMPARISONS) * (len(seeds) - 1)
    return {
        "seeds": seeds,
        "limit": float(t.ppf(0.975, freedom)) * variance**0.5,
        "seconds": {name: step["seconds"] for name, step in read_json(folders[0] / STATE).items()},
        "methods": methods,
        "paired_differences": differences,
        "runs": runs,
        "commands": {name: step["command"] for name, step in read_json(folders[0] / STATE).items()},
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return mean and standard deviation (n - 1) of some values."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values)}


def processor() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# ------------------------------------------------------------------------------------- command


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    actions = parser.add_subparsers(dest="action", required=True)
    places = {
        "sample": ("prepared", "output"),
        "step": ("folder", "measured", "name", "title", "product"),
        "results": ("folder", "measured"),
        "measure": ("output",),
    }
    for action, names in places.items():
        added = actions.add_parser(action)
        for name in names:
            added.add_argument(name, type=str if name in ("name", "title") else Path)
        if action == "step":
            added.add_argument("command", nargs=argparse.REMAINDER)
        if action == "measure":
            added.add_argument("folders", nargs="+", type=Path)
    return parser.parse_args()


def main() -> int:
    """Run the action that the command line names, and return the exit code."""
    args = parse_arguments()
    if args.action == "sample":
        sample(args.prepared, args.output)
    elif args.action == "measure":
        write_text(args.output, json.dumps(measure(args.folders), indent=1) + "\n")
    else:
        # Before the first measurement there is no file. Then steps and results stand alone.
        measured = read_json(args.measured) if args.measured.exists() else {}
        if args.action == "step":
            step = Step(args.name, args.title, args.product, args.command)
            return run_step(args.folder, measured.get("seconds", {}), step)
        finals = {method: final_evaluation(args.folder / method) for method in METHODS}
        if measured:
            print("\n".join(table(finals, measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
