"""Everything that a run logs: progress, metrics.jsonl, modules.jsonl, run.json and W&B."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loguru import logger

from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records.environment import environment_info
from peft_pretraining.records.jsonl import METRICS, MODULES, RUN, append_json
from peft_pretraining.records.progress import Progress
from peft_pretraining.records.wandb import new_run_id, start_wandb
from peft_pretraining.utils.files import atomic_write

# Names under which the published runs log the mean alpha of each projection.
ALPHA_NAMES = {
    "q_proj": "alpha_Q",
    "k_proj": "alpha_K",
    "v_proj": "alpha_V",
    "o_proj": "alpha_O",
    "gate_proj": "alpha_MLPgate",
    "up_proj": "alpha_MLPup",
    "down_proj": "alpha_MLPdown",
}


class RunLog:
    """Writes the records of a run. Rank 0 writes; on other ranks every call does nothing.

    If the disk is full, training goes on without records, and one warning is logged.

    Args:
        folder: The run folder, which `run_lock` has created.
        ranks: All processes of the run.
        description: What run.json holds beside versions, device and commit: name, arguments, model
            config, number of parameters.
        wandb_name: The name of the W&B run.
        tags: The tags of the W&B run.
        project: The W&B project. None: do not use W&B.
        unit: What throughput counts: `tokens` or `images`.
        done: Updates that earlier processes made.
        source: The folder of the run that made them; None if there are none. run.json keeps what it
            says about them, and if it is this run's folder, the run in W&B goes on.

    Attributes:
        earlier_totals: Where the time of these updates went, as `checkpoint` recorded it; None if
            there are none, or if they were made by an earlier version.
    """

    def __init__(
        self,
        folder: Path,
        ranks: DistributedContext,
        description: dict[str, Any],
        wandb_name: str,
        tags: list[str],
        project: str | None = "alphadecay",
        unit: str = "tokens",
        done: int = 0,
        source: Path | None = None,
    ):
        self.folder, self.enabled, self.unit = folder, ranks.is_main, unit
        self._progress: Progress | None = None
        self._wandb: Any = None
        self._warned = False
        self.earlier_totals: dict[str, float] | None = None
        if not self.enabled:
            return
        before = _read_json(source / RUN) if source else {}
        totals = {
            update: numbers
            for update, numbers in before.get("totals", {}).items()
            if int(update) <= done
        }
        self.earlier_totals = totals.get(str(done))
        environment = environment_info(ranks)
        piece = {"first_update": done + 1} | environment
        self.description = description | environment
        self.description["pieces"] = [
            earlier for earlier in before.get("pieces", ()) if earlier["first_update"] <= done
        ] + [piece]
        self.description["totals"] = totals
        if project:
            known = before.get("wandb") or {} if source == folder else {}
            run_id = known["id"] if known.get("project") == project else new_run_id()
            self.description["wandb"] = {"project": project, "id": run_id}
        self._write_or_warn(_write_json, folder / RUN, self.description)
        if project:
            with self._keep_training("W&B"):
                self._wandb = start_wandb(
                    folder, project, wandb_name, tags, self.description, run_id
                )

    def start_progress(self, total: int, done: int) -> None:
        """Show the progress from now on.

        Args:
            total: Updates of the whole run.
            done: Updates that were made before.
        """
        if self.enabled:
            with self._keep_training("the progress"):
                self._progress = Progress(total, done, self.unit)

    def advance(self) -> None:
        """Count an update."""
        if self._progress is not None:
            with self._keep_training("the progress"):
                self._progress.advance()

    def checkpoint(self, update: int, totals: dict[str, float]) -> None:
        """Record in run.json that a checkpoint is saved after an update.

        Args:
            update: The update.
            totals: Where the time of the run went so far, see `ThroughputMeter.totals`. A process
                that continues the run counts from there.
        """
        if self.enabled:
            self.description["totals"][str(update)] = totals
            self._write_or_warn(_write_json, self.folder / RUN, self.description)

    def metrics(self, record: dict[str, Any]) -> None:
        """Log the metrics of an update or an evaluation to metrics.jsonl, W&B and the screen."""
        if not self.enabled:
            return
        self._write_or_warn(append_json, self.folder / METRICS, [record])
        # The published runs log the last evaluation under these names as well.
        last = ("eval_loss", "eval_tokens") if record.get("final") else ()
        final = {f"final_{name}": record[name] for name in last if name in record}
        self._log_to_wandb(record | final)
        if self._progress is not None and "loss" in record:
            with self._keep_training("the progress"):
                self._progress.show(record)

    def modules(self, records: list[dict[str, Any]]) -> None:
        """Log new records of `AlphaDecay.history` to modules.jsonl and W&B.

        W&B gets alpha and weight decay of each module, and the mean alpha of each projection.
        """
        if not (self.enabled and records):
            return
        self._write_or_warn(append_json, self.folder / MODULES, records)
        if self._wandb is not None:
            values = {
                f"{field}/{record['module']}": record[field]
                for record in records
                for field in ("alpha", "weight_decay")
                if record[field] is not None
            }
            self._log_to_wandb(values | mean_alphas(records) | {"update_step": records[0]["step"]})

    def finish(self, summary: dict[str, Any]) -> None:
        """Add the summary of the run to run.json, and close the progress and W&B."""
        if self.enabled:
            self.description["summary"] = summary
            self._write_or_warn(_write_json, self.folder / RUN, self.description)
            self.close()

    def close(self) -> None:
        """Close the progress and W&B."""
        if self._progress is not None:
            with self._keep_training("the progress"):
                self._progress.close()
        if self._wandb is not None:
            with self._keep_training("W&B"):
                self._wandb.finish()

    def _log_to_wandb(self, values: dict[str, Any]) -> None:
        if self._wandb is not None:
            with self._keep_training("W&B"):
                self._wandb.log(values)

    @contextlib.contextmanager
    def _keep_training(self, what: str) -> Iterator[None]:
        """Turn off what fails in this block, with one warning: no record may end a training.

        Args:
            what: `W&B` or `the progress`.
        """
        try:
            yield
        except Exception as error:
            # For instance W&B's helper process was killed, or the terminal was closed.
            if what == "W&B":
                self._wandb = None
                rest = "its records go on in the run folder only"
            else:
                self._progress = None
                rest = "it is not shown any more"
            logger.warning(
                f"{what} failed ({type(error).__name__}: {error}): {rest}, training goes on"
            )

    def _write_or_warn(self, write: Callable[[Path, Any], None], path: Path, content: Any) -> None:
        """Write records; on an error, log one warning for the whole run and go on."""
        try:
            write(path, content)
        except OSError as error:
            if not self._warned:
                logger.warning(
                    f"{path} cannot be written ({error.strerror}): records are lost until there "
                    "is room, training goes on"
                )
            self._warned = True


def mean_alphas(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean alpha of each projection of LLaMA, by its published name.

    Modules without an alpha do not count, and projections without any are left out.
    """
    alphas: dict[str, list[float]] = {}
    for record in records:
        name = ALPHA_NAMES.get(record.get("type", ""))
        if name is not None and record["alpha"] is not None:
            alphas.setdefault(name, []).append(record["alpha"])
    return {name: sum(values) / len(values) for name, values in alphas.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(content, indent=2, default=str) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty dictionary if it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
