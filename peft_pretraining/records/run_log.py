"""What a run tells: log lines, one progress bar, metrics.jsonl, modules.jsonl, run.json and Weights & Biases."""

import contextlib
import fcntl
import functools
import importlib.metadata
import json
import logging
import math
import netrc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch
from loguru import logger
from tqdm import tqdm

from peft_pretraining.parallel.process_group import Ranks
from peft_pretraining.errors import UserError


METRICS, MODULES, RUN, LOCK = "metrics.jsonl", "modules.jsonl", "run.json", ".lock"
# The published names of the mean alpha of a projection's modules.
ALPHA_NAMES = {
    "q_proj": "alpha_Q", "k_proj": "alpha_K", "v_proj": "alpha_V", "o_proj": "alpha_O", "gate_proj": "alpha_MLPgate",
    "up_proj": "alpha_MLPup", "down_proj": "alpha_MLPdown",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "timm", "wandb")


def start_logging(ranks: Ranks) -> None:
    """Log lines through loguru: rank 0 tells all, the others warnings only; they do not break the progress bar."""
    logger.remove()
    form = "<dim>{time:HH:mm:ss}</dim> <level>{level: <7}</level> {message}"
    form = form if ranks.is_main else f"<dim>rank {ranks.rank}</dim> " + form
    level = "INFO" if ranks.is_main else "WARNING"
    logger.add(lambda line: tqdm.write(line, end="", file=sys.stderr), format=form, level=level, colorize=sys.stderr.isatty())
    logging.getLogger("alphadecay").handlers = [_ToLoguru()]


class _ToLoguru(logging.Handler):
    """The standard library's log records, passed on to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        logger.log(record.levelname, record.getMessage())


class RunLog:
    """The run folder's records, kept by rank 0; on other ranks every call does nothing.

    Args:
        folder: the run folder, which is there (`run_lock`).
        description: what goes into run.json beside versions, device and commit: name, arguments, model_config, parameters.
        wandb_name, tags, project: of the W&B run; without a project there is none.
        unit: what throughput is counted in.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, description: dict, wandb_name: str, tags: list[str], project: str | None = "alphadecay",
        unit: str = "tokens",
    ):  # fmt: skip
        self.folder, self.enabled, self.unit = folder, ranks.is_main, unit
        self._bar, self._wandb, self._warned = None, None, False
        if not self.enabled:
            return
        self.description = description | _surroundings(ranks)
        self._keep(_write_json, folder / RUN, self.description)
        self._wandb = _start_wandb(folder, project, wandb_name, tags, self.description) if project else None

    def start_bar(self, total: int, done: int) -> None:
        """Show a progress bar of updates, where a person watches."""
        if self.enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="update", dynamic_ncols=True)

    def advance(self) -> None:
        """One update made."""
        if self._bar is not None:
            self._bar.update(1)

    def metrics(self, record: dict) -> None:
        """A logged step or an evaluation: a line of metrics.jsonl, W&B, and the bar."""
        if not self.enabled:
            return
        self._keep(append_json, self.folder / METRICS, [record])
        if self._wandb is not None:
            last = ("eval_loss", "eval_tokens") if record.get("final") else ()  # the published names of the last evaluation
            self._wandb.log(record | {f"final_{name}": record[name] for name in last if name in record})
        if self._bar is not None and "loss" in record:
            self._bar.set_postfix_str(f"loss {record['loss']:.3f}, {record[f'throughput_{self.unit}']:,.0f} {self.unit}/s")

    def modules(self, records: list[dict]) -> None:
        """New rows of `AlphaDecay.history`: lines of modules.jsonl, and alpha and decay of each module in W&B."""
        if not (self.enabled and records):
            return
        self._keep(append_json, self.folder / MODULES, records)
        if self._wandb is not None:
            values = {f"{what}/{r['module']}": r[what] for r in records for what in ("alpha", "weight_decay") if r[what] is not None}
            self._wandb.log(values | mean_alphas(records) | {"update_step": records[0]["step"]})

    def finish(self, summary: dict) -> None:
        """Add the run's summary to run.json and close the bar and W&B."""
        if self.enabled:
            self.description["summary"] = summary
            self._keep(_write_json, self.folder / RUN, self.description)
            self.close()

    def close(self) -> None:
        """Close the bar and W&B."""
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _keep(self, write: Callable[[Path, object], None], path: Path, content: object) -> None:
        """Write records; where the disk is full the training goes on without them, and one warning says so."""
        try:
            write(path, content)
        except OSError as error:
            if not self._warned:
                logger.warning(f"{path} cannot be written ({error.strerror}): records are lost until there is room, training goes on")
            self._warned = True


def mean_alphas(records: list[dict]) -> dict[str, float]:
    """Mean alpha of each of LLaMA's projections, under its published name; those that have none are left out."""
    alphas: dict[str, list[float]] = {}
    for record in records:
        if record.get("type") in ALPHA_NAMES and record["alpha"] is not None:
            alphas.setdefault(ALPHA_NAMES[record["type"]], []).append(record["alpha"])
    return {name: sum(values) / len(values) for name, values in alphas.items()}


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf8")
    temporary.replace(path)


def refuse_to_mix(folder: Path) -> None:
    """For a run that begins: raises UserError where its folder holds the records of another."""
    if (folder / METRICS).exists() and (folder / METRICS).stat().st_size:
        raise UserError(
            f"{folder} already holds a run: go on with it by --continue_from auto (main_vit.py: --auto_resume true), or use another"
        )


@contextlib.contextmanager
def run_lock(folder: Path, patience: float = 15.0) -> Iterator[None]:
    """Make the run folder and hold it for this process. Raises UserError where it cannot be written, or where another process holds it:
    two runs in one folder would mix.

    patience: seconds to wait for one that is about to end (torchrun may restart a run before its killed processes are gone).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")
    except OSError as error:
        raise UserError(f"the run folder {folder} cannot be written ({error.strerror}): give another --save_dir") from error
    with file:
        deadline = time.monotonic() + patience
        while not _locked(file):
            if time.monotonic() > deadline:
                raise UserError(
                    f"another process trains in {folder}: end it (its number is in {folder / LOCK}), or give another --save_dir"
                )
            time.sleep(0.2)
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        yield


def _locked(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        pass
    return True


def append_json(path: Path, records: list[dict]) -> None:
    """Append records to a file, a line each, all or (raising OSError) none; the file is made if need be."""
    lines = memoryview("".join(json.dumps(finite(record), allow_nan=False) + "\n" for record in records).encode())
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            while lines:
                lines = lines[file.write(lines) :]
        except OSError:
            file.truncate(end)  # no half line that the next record would run into
            raise


def finite(record: dict) -> dict:
    """The record with None for numbers that JSON has no word for."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def carry_records(source: Path, target: Path, step: int) -> None:
    """Keep of a run's records what lies before a checkpoint: copy the lines of `source` up to `step` to `target`.

    A run that went on past its last checkpoint, or was killed while it wrote a line, has more; it will be written again.
    """
    for name, key in ((METRICS, "update_step"), (MODULES, "step")):
        kept = []
        path = source / name
        for line in path.read_text(encoding="utf8").splitlines() if path.is_file() else ():
            try:
                if json.loads(line)[key] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill
        temporary = target / (name + ".tmp")
        try:
            target.mkdir(parents=True, exist_ok=True)
            temporary.write_text("".join(kept), encoding="utf8")
            temporary.replace(target / name)
        except OSError as error:
            raise UserError(f"{target / name} cannot be written ({error.strerror}): make room there or make it writable") from error


def _surroundings(ranks: Ranks) -> dict:
    cuda = ranks.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(ranks.device) if cuda else f"CPU, {torch.get_num_threads()} threads a process",
        "processes": ranks.world_size,
        "versions": {"python": sys.version.split()[0]} | {p: v for p in PACKAGES if (v := _version(p))},
        "git_commit": _git_commit(),
        "command": " ".join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    here = Path(__file__).parent
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return answer.stdout.strip() or None


def _start_wandb(folder: Path, project: str, name: str, tags: list[str], config: dict):
    """A W&B run: as WANDB_MODE says, else online where a key is known and offline where not; it never asks for one."""
    try:
        import wandb
    except ImportError:
        logger.info("wandb is not installed: the run is recorded in its folder only")
        return None
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    settings = wandb.Settings(silent=True, console="off", init_timeout=30)
    start = functools.partial(wandb.init, project=project, name=name, tags=tags, config=config, dir=folder, settings=settings)
    try:
        run = start(mode=mode)
    except wandb.errors.Error as error:  # a node without internet must train all the same
        logger.warning(f"W&B cannot be reached ({error}): this run is recorded offline, `wandb sync` sends it later")
        run = start(mode="offline")
    run.define_metric("*", step_metric="update_step")
    return run


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
