"""How a run begins: at its start, or where a checkpoint stands."""

import argparse
import json
from pathlib import Path

import torch
import torch.nn as nn
from loguru import logger
from torch.optim import Optimizer

from peft_pretraining.checkpoint.find import archive_newer_checkpoints, find_checkpoint
from peft_pretraining.checkpoint.format import TRAINER, checkpoints_of, step_of
from peft_pretraining.checkpoint.load import load_checkpoint
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.records.run_dir import check_no_existing_run, copy_records_up_to
from peft_pretraining.train.signals import was_restarted


def resolve_checkpoint(
    place: str | None, run_folder: Path, ranks: DistributedContext
) -> tuple[str | None, Path | None]:
    """What to continue from, and the checkpoint that this means; None: the start.

    place: see `find_checkpoint`. A run that torchrun starts again after a failure goes on from its own checkpoints whatever it was.
    Raises UserError where the run would begin in a folder that holds another.
    """
    # Of several nodes only those count a restart where a process died.
    restarted = int(ranks.sum(torch.tensor(int(was_restarted())))) > 0
    if restarted and (checkpoints_of(run_folder) or not place):
        place = "auto"
    checkpoint = find_checkpoint(place, run_folder, ranks) if place else None
    if ranks.is_main:
        # A folder without a checkpoint of its own has nothing to lose but the records of a run that must begin again.
        begun_again = bool(place) and not checkpoints_of(run_folder)
        own = place == "auto" or checkpoint and checkpoint.parents[1] == run_folder.resolve()
        if not (own or begun_again):
            check_no_existing_run(run_folder)
        if place == "auto" and not checkpoint:
            logger.info(f"no checkpoint in {run_folder} yet: training from the start")
    return place, checkpoint


def resume(
    checkpoint: Path,
    args: argparse.Namespace,
    total_updates: int,
    model: nn.Module,
    optimizer: Optimizer,
    decay,
    data_fingerprint: str,
    ranks: DistributedContext,
    config: dict | None = None,
    extra: dict[str, nn.Module] | None = None,
) -> dict:
    """Load a checkpoint into everything that decides the future; returns the counters. config, extra: see `load_checkpoint`."""
    trainer = load_checkpoint(checkpoint, model, optimizer, ranks, config, extra)
    if trainer["data"] != data_fingerprint:
        raise UserError(
            f"{checkpoint} was trained on other data: give the flags of group 'model and data' (see --help) it was trained with"
        )
    if (decay is None) != (trainer["decay"] is None):
        raise UserError(
            f"{checkpoint} was trained with another kind of weight decay: give the decay flags it was trained with"
        )
    if decay:
        try:
            decay.load_state_dict(trainer["decay"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{checkpoint} does not fit the decay flags: {error}") from error
        decay.history.clear()  # the decays of construction are of weights that were just replaced
    for name, value in trainer["arguments"].items():
        if getattr(args, name, value) != value:
            logger.warning(
                f"--{name} is {getattr(args, name)}, was {value} in the checkpoint: the run will not be the one it continues"
            )
    if trainer["progress"]["update_step"] >= total_updates:
        raise UserError(
            f"{checkpoint} has made all {total_updates} updates already: give more --num_training_steps or --epochs"
        )
    logger.info(f"continue from {checkpoint}")
    return trainer["progress"]


def saved_argument(checkpoint: Path, name: str):
    """An argument of the run that made a checkpoint, None where it had none of that name. The file is whole: see `find_checkpoint`."""
    return json.loads((checkpoint / TRAINER).read_text(encoding="utf8"))["arguments"].get(name)


def truncate_records_after(checkpoint: Path | None, run_folder: Path) -> None:
    """Leave of the run folder what lies before the checkpoint; rank 0 calls it.

    A run that went on past its checkpoint, or never had one, has records and checkpoints that will be made again.
    """
    done = step_of(checkpoint) if checkpoint else 0
    copy_records_up_to(
        checkpoint.parents[1] if checkpoint else run_folder, run_folder, done if checkpoint else -1
    )
    for newer in archive_newer_checkpoints(run_folder, done):
        logger.warning(
            f"{newer} is of the history that ends here: renamed to {newer.name}.abandoned"
        )
