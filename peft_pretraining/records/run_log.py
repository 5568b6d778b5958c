"""What a run tells: log lines, one progress bar, metrics.jsonl, modules.jsonl, run.json and Weights & Biases."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from loguru import logger
from tqdm import tqdm

from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records.environment import environment_info
from peft_pretraining.records.jsonl import METRICS, MODULES, RUN, append_json
from peft_pretraining.records.wandb import start_wandb

# The published names of the mean alpha of a projection's modules.
ALPHA_NAMES = {
    "q_proj": "alpha_Q", "k_proj": "alpha_K", "v_proj": "alpha_V", "o_proj": "alpha_O", "gate_proj": "alpha_MLPgate",
    "up_proj": "alpha_MLPup", "down_proj": "alpha_MLPdown",
}  # fmt: skip


class RunLog:
    """The run folder's records, kept by rank 0; on other ranks every call does nothing.

    Args:
        folder: the run folder, which is there (`run_lock`).
        description: what goes into run.json beside versions, device and commit: name, arguments, model_config, parameters.
        wandb_name, tags, project: of the W&B run; without a project there is none.
        unit: what throughput is counted in.
    """

    def __init__(
        self, folder: Path, ranks: DistributedContext, description: dict, wandb_name: str, tags: list[str], project: str | None = "alphadecay",
        unit: str = "tokens",
    ):  # fmt: skip
        self.folder, self.enabled, self.unit = folder, ranks.is_main, unit
        self._bar, self._wandb, self._warned = None, None, False
        if not self.enabled:
            return
        self.description = description | environment_info(ranks)
        self._keep(_write_json, folder / RUN, self.description)
        self._wandb = (
            start_wandb(folder, project, wandb_name, tags, self.description) if project else None
        )

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
            last = (
                ("eval_loss", "eval_tokens") if record.get("final") else ()
            )  # the published names of the last evaluation
            self._wandb.log(
                record | {f"final_{name}": record[name] for name in last if name in record}
            )
        if self._bar is not None and "loss" in record:
            self._bar.set_postfix_str(
                f"loss {record['loss']:.3f}, {record[f'throughput_{self.unit}']:,.0f} {self.unit}/s"
            )

    def modules(self, records: list[dict]) -> None:
        """New rows of `AlphaDecay.history`: lines of modules.jsonl, and alpha and decay of each module in W&B."""
        if not (self.enabled and records):
            return
        self._keep(append_json, self.folder / MODULES, records)
        if self._wandb is not None:
            values = {
                f"{what}/{r['module']}": r[what]
                for r in records
                for what in ("alpha", "weight_decay")
                if r[what] is not None
            }
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
                logger.warning(
                    f"{path} cannot be written ({error.strerror}): records are lost until there is room, training goes on"
                )
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
