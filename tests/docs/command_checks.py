"""Check a documented command without running a training.

A script's own parser reads the arguments. Launchers and table scripts run with --dry_run, and the
commands that they print are checked in the same way.
"""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from peft_pretraining.errors import UserError
from tests.docs.pages import ROOT
from tests.support import fork_server
from tests.support.launch import launch_variables, set_launch

MULTINODE, SLURM = "scripts/cluster/multinode.sh", "scripts/cluster/slurm.sbatch"
GPUS_OF_A_NODE = 8  # where the command does not say
SBATCH_OPTIONS = {"--nodes", "--gpus-per-node", "--cpus-per-task", "--time"}
TRAINING_SCRIPTS = ("torchrun_main.py", "main_vit.py")
WITH_DRY_RUN = re.compile(r"scripts/(run|tables/\w+)\.sh")
WITHOUT_ARGUMENTS = re.compile(r"(scripts|benchmarks)/\w+\.sh")
_modules: dict[str, ModuleType] = {}
_folder: Path | None = None  # where the command that is being checked is started


class Parsed(Exception):
    """Raised in place of the work that a script would do after it has parsed its arguments."""


def check(command: str, folder: Path | None = None) -> None:
    """Raise an error if this command would be refused. The command must be of a known kind.

    A training script is started with --dry_run in a copy of the repository.

    Args:
        command: the command.
        folder: see `documented_folder`. None: training scripts only parse their arguments.
    """
    global _folder
    _folder = folder
    words = shlex.split(command)
    while words[0] == "env" or re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    checker = CHECKERS.get(words[0])
    assert checker, f"no check for {words[0]!r}: add one to tests/docs/command_checks.py"
    checker(words[1:])


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    names = words[2:] if words[1] == "-r" else words[1:]
    assert len(names) == 1 and (ROOT / names[0]).exists(), names


def _source(words: list[str]) -> None:
    """The environment is where scripts/environment.sh makes it."""
    text = (ROOT / "scripts/environment.sh").read_text()
    definition = next(line for line in text.splitlines() if line.startswith("venv="))
    clean = {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"]}
    shown = subprocess.run(
        ["bash", "-c", f'{definition}; echo "$venv/bin/activate"'],
        env=clean, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.strip() == os.path.expanduser(words[0]) and len(words) == 1


def _bash(words: list[str]) -> None:
    script, arguments = words[0], words[1:]
    assert (ROOT / script).is_file(), script
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    if WITH_DRY_RUN.fullmatch(script):
        _check_printed([script, *(word for word in arguments if word != "--dry_run"), "--dry_run"])
    elif script == MULTINODE:
        own = arguments[: arguments.index("--")]
        _check_printed([script, *own, "--dry_run", *arguments[arguments.index("--") :]])
    elif script == SLURM:
        assert arguments[0] == "--dry_run"
        _slurm(script, arguments[1:])
    elif script == "scripts/test.sh":
        assert {word for word in arguments if word.startswith("-")} <= {"--fast", "--oldest", "-k"}
        assert all((ROOT / word).exists() for word in arguments if "/" in word)
    elif script.endswith("/study.sh"):
        text = (ROOT / script).read_text()
        usage = re.search(rf"bash {script} ([^\[\n]*?)(?:  |\[|$)", text, re.M)[1]
        assert len(arguments) == len(usage.split()), usage
    else:
        assert WITHOUT_ARGUMENTS.fullmatch(script) and not arguments, script


def _sbatch(words: list[str]) -> None:
    script = words.index(SLURM)
    assert set(words[:script:2]) <= SBATCH_OPTIONS
    _slurm(SLURM, words[script + 1 :])


def _slurm(script: str, arguments: list[str]) -> None:
    """The batch script starts multinode.sh on each node, with the arguments of the training."""
    (line,) = _output(["bash", script, "--dry_run", *arguments])
    words = shlex.split(line)
    assert words[0] == "srun"
    _bash(words[words.index(MULTINODE) :])


def _check_printed(words: list[str]) -> None:
    """Check the commands that a launcher prints; start the first one, and parse the others."""
    lines = _output(["bash", *words])
    assert lines
    for i, line in enumerate(lines):
        check(line, None if i else _folder)


def _output(words: list[str]) -> list[str]:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _torchrun(words: list[str]) -> None:
    args = torchrun_parser().parse_args(words)
    nodes = int(args.nnodes.split(":")[-1])
    processes = int(args.nproc_per_node) if args.nproc_per_node.isdigit() else GPUS_OF_A_NODE
    _script(args.training_script, args.training_script_args, nodes * processes)


def _python(words: list[str]) -> None:
    if words[:2] == ["-m", "scripts.cluster.relaunch"]:
        _torchrun(words[2:])
    elif words[0] == "-m":
        _script(words[1], words[2:], 1)
    else:
        _script(words[0], words[1:], 1)


def _script(name: str, arguments: list[str], world_size: int) -> None:
    """Have the script's own parser and checks read the arguments."""
    module = _module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        set_launch(patch, world_size)
        patch.setattr(os, "cpu_count", lambda: 64)
        try:
            _parse(module, patch)
        except Parsed:
            pass
        except SystemExit as end:
            assert end.code == 0 and "--help" in arguments, f"{name} {arguments}: refused"
        except UserError as error:
            raise AssertionError(f"{name} {' '.join(arguments)}: {error}") from None
    if name in TRAINING_SCRIPTS and _folder is not None and "--help" not in arguments:
        _dry_run(_folder, name, arguments, world_size)


def _dry_run(folder: Path, name: str, arguments: list[str], world_size: int) -> None:
    """Start the script with --dry_run, as rank 0 of its number of processes."""
    for flag, value in zip(arguments, arguments[1:], strict=False):
        if flag in ("--data_path", "--eval_data_path"):
            _make_images(folder / value, nested=flag == "--data_path")
    environment = os.environ | launch_variables(world_size)
    done = fork_server.run(
        [sys.executable, name, *arguments, "--dry_run"], cwd=folder, env=environment
    )
    assert done.returncode == 0, f"{name} {arguments}: {done.stderr}"
    assert "nothing is trained" in done.stdout and not (folder / "runs").exists()


def documented_folder(folder: Path) -> Path:
    """Return a folder with everything of the repository, and with the data that pages name."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "data", ".git"):
            (folder / path.name).symlink_to(path)
    text = folder / "text.jsonl"
    text.write_text("".join(f'{{"text": "This is document {i}."}}\n' for i in range(300)))
    subprocess.run(
        [
            sys.executable, "-m", "peft_pretraining.prepare_data", "--dataset", text,
            "--tokenizer", "bpe", "--vocab_size", "300", "--output", folder / "data/c4",
        ],
        cwd=ROOT, check=True, capture_output=True,
        env=os.environ | {"ALPHADECAY_CACHE": str(folder / "cache")},
    )  # fmt: skip
    return folder


def _make_images(folder: Path, nested: bool) -> None:
    """Make the class folders of ImageNet, with one empty file each, which a dry run only counts."""
    for part in ("train", "val") if nested else (".",):
        for i in range(1000):
            (folder / part / f"n{i:08d}").mkdir(parents=True, exist_ok=True)
            (folder / part / f"n{i:08d}/0.png").touch()


def _parse(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    if hasattr(module, "parse_arguments"):
        module.parse_arguments()
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *rest):
        parse(parser, *rest)
        raise Parsed

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    module.main()
    raise AssertionError(f"{module.__name__} parsed no arguments")


def _module(name: str) -> ModuleType:
    if name not in _modules:
        if name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(
                f"documented_{len(_modules)}", ROOT / name
            )
            _modules[name] = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = _modules[name]
            spec.loader.exec_module(_modules[name])
        else:
            package = importlib.util.find_spec(name).submodule_search_locations is not None
            _modules[name] = importlib.import_module(name + ".__main__" * package)
    return _modules[name]


CHECKERS: dict[str, Callable[[list[str]], None]] = {
    "pip": _pip,
    "source": _source,
    "bash": _bash,
    "sbatch": _sbatch,
    "torchrun": _torchrun,
    "python": _python,
}
