"""Change single expressions of the code, and count how many of these mutants the tests notice.

    python benchmarks/mutants.py alphadecay [--sample 300] [--seed 0] [--output FILE.json]
    python benchmarks/mutants.py peft_pretraining

mutmut makes the mutants of the numerical parts of a package, and finds the fast tests that run each
function. A random sample of the mutants is tried, each in a process of its own: mutmut itself would
fork one process for all of them, and a fork cannot use the threads of the linear algebra library.
A mutant whose tests take three times as long as usual, and 30 s more, counts as noticed.
"""

import argparse
import concurrent.futures
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Package -> its numerical parts, and the folders of tests that cover them.
PARTS = {
    "alphadecay": (
        [
            "alphadecay/assignment.py",
            "alphadecay/balancer.py",
            "alphadecay/baselines/*.py",
            "alphadecay/controls.py",
            "alphadecay/decay_hooks.py",
            "alphadecay/distributed.py",
            "alphadecay/modules.py",
            "alphadecay/norms.py",
            "alphadecay/spectral/*.py",
        ],
        ["tests/alphadecay"],
    ),
    "peft_pretraining": (
        [
            "peft_pretraining/data/sequences.py",
            "peft_pretraining/data/shuffle.py",
            "peft_pretraining/model/*.py",
            "peft_pretraining/optim/*.py",
            "peft_pretraining/train/evaluation.py",
            "peft_pretraining/train/flops.py",
            "peft_pretraining/train/step.py",
        ],
        [
            "tests/peft_pretraining/data/test_sequences.py",
            "tests/peft_pretraining/data/test_shuffle.py",
            "tests/peft_pretraining/model",
            "tests/peft_pretraining/optim",
            "tests/peft_pretraining/train",
        ],
    ),
}
COPIED = ("tests", "configs", "scripts", "benchmarks", "alphadecay", "peft_pretraining")
FILES = ("pyproject.toml", "torchrun_main.py", "main_vit.py", "README.md")


def generate(folder: Path, package: str) -> Path:
    """Copy the repository, make all mutants and find their tests; return the folder of mutants."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    files, tests = PARTS[package]
    others = [name for name in (*COPIED, *FILES) if name != package]
    settings = {
        "source_paths": [package],
        "only_mutate": files,
        "pytest_add_cli_args_test_selection": tests,
        "pytest_add_cli_args": ["-m", "not slow"],
        "also_copy": others,
    }
    lines = ["[mutmut]"]
    for name, values in settings.items():
        lines += [f"{name} =", *(f"    {value}" for value in values)]
    (folder / "setup.cfg").write_text("\n".join(lines) + "\n")
    # It makes the mutants and finds the tests, and then has nothing to try.
    subprocess.run(["mutmut", "run", "no_such_mutant"], cwd=folder, capture_output=True)
    return folder / "mutants"


def mutants_of(mutants: Path, package: str) -> list[str]:
    """Return the names of all mutants."""
    metas = sorted((mutants / package).rglob("*.meta"))
    return [name for meta in metas for name in json.loads(meta.read_text())["exit_code_by_key"]]


def outcome(mutants: Path, mutant: str, statistics: dict) -> str:
    """Return `killed`, `timeout`, `survived` or `no test` for a mutant."""
    tests = statistics["tests_by_mangled_function_name"].get(mutant.rpartition("__mutmut_")[0], [])
    if not tests:
        return "no test"
    seconds = statistics["duration_by_test"]
    tests = sorted(tests, key=lambda test: seconds.get(test, 0.0))
    limit = 30 + 3 * (10 + sum(seconds.get(test, 0.0) for test in tests))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command,
            cwd=mutants,
            env=os.environ | {"MUTANT_UNDER_TEST": mutant, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    return "survived" if done.returncode == 0 else "killed"


def difference(mutants: Path, mutant: str) -> str:
    """Return the lines that a mutant changes, as mutmut shows them."""
    command = ["mutmut", "show", mutant]
    shown = subprocess.run(command, cwd=mutants.parent, capture_output=True, text=True).stdout
    changed = [line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in "+++---"]
    return "\n".join(changed)


def main() -> None:
    """Try a sample of mutants; print and write the outcomes and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", choices=PARTS)
    parser.add_argument("--sample", type=int, default=300, help="mutants to try (default 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--output", type=Path, help="a JSON file for the outcomes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mutants = generate(Path(folder), args.package)
        names = mutants_of(mutants, args.package)
        statistics = json.loads((mutants / "mutmut-stats.json").read_text())
        chosen = random.Random(args.seed).sample(names, min(args.sample, len(names)))
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            outcomes = list(pool.map(lambda name: outcome(mutants, name, statistics), chosen))
        counts = {
            kind: outcomes.count(kind) for kind in ("killed", "timeout", "survived", "no test")
        }
        survivors = {
            name: difference(mutants, name)
            for name, result in zip(chosen, outcomes, strict=True)
            if result in ("survived", "no test")
        }
    result = {
        "package": args.package,
        "mutants": len(names),
        "tried": len(chosen),
        "seed": args.seed,
        **counts,
        "survivors": survivors,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
