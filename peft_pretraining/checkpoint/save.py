"""Writing checkpoints (their format is in checkpoint.py) while the training goes on."""

import io
import json
import shutil
import threading
from pathlib import Path

import torch
import torch.nn as nn
from loguru import logger
from safetensors.torch import save_file
from torch.optim import Optimizer

from peft_pretraining.checkpoint.format import (
    CONFIG,
    EXTRA,
    MANIFEST,
    OPTIMIZER,
    RANDOM,
    TRAINER,
    WEIGHTS,
)
from peft_pretraining.checkpoint.random_state import random_states
from peft_pretraining.checkpoint.retention import delete_old, remove_folder, remove_leftovers
from peft_pretraining.checkpoint.snapshot import HostSnapshot, Tensors
from peft_pretraining.checkpoint.state import (
    optimizer_state_by_name,
    state_dict_without_tied_weights,
)
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.fsdp import FSDPModule
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.utils.files import fsync_path, reason_of, sha256_file


class Checkpoints:
    """Saves a run's checkpoints in the background: a thread of rank 0 copies the state while the next update's forward and backward
    passes run, which only read it, and then writes the copy while the training goes on.

    The copy is in CPU memory that is kept for the next save: weights and optimizer state once more on rank 0, pinned on a machine
    with CUDA (torch rounds each pinned tensor up to a power of two bytes). The thread is no daemon: an ordinary exit waits for it.

    Args:
        run_folder: gets checkpoints/model_<step>. What a killed run left there half done is removed.
        keep: how many of the newest checkpoints remain after each save, None: all.
        milestone_every: checkpoints of a step that is a multiple of this remain beside them.
        on_error: what a save that fails (a full disk) does to the run: `continue` logs it, and the next save tries again;
            `stop` makes `failure` tell it. The checkpoints before it stay whole either way.
    """

    def __init__(
        self,
        run_folder: Path,
        ranks: DistributedContext,
        keep: int | None = None,
        milestone_every: int | None = None,
        on_error: str = "continue",
    ):
        self._run_folder, self._ranks = run_folder, ranks
        self._keep, self._milestone_every, self._on_error = keep, milestone_every, on_error
        self._thread: threading.Thread | None = None
        self._copy = HostSnapshot()
        self._problem: str | None = None  # of the last save
        self._untold = False
        if ranks.is_main:
            remove_leftovers(run_folder)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        trainer: dict,
        tokenizer=None,
        config: dict | None = None,
        extra: dict[str, nn.Module] | None = None,
    ) -> None:
        """Begin to save the state as it is now; all ranks call it together. It waits for a save that is still in flight, and otherwise
        returns at once (where the model is sharded: once the copy is gathered): call `before_update` before weights or optimizer state
        change.

        trainer: what JSON can hold. tokenizer: anything with `save_pretrained`, or None. config: what goes into config.json, by default
        `model.config` as transformers reads it. extra: more modules whose weights decide the future, by name.
        """
        random_file = io.BytesIO()
        torch.save(random_states(self._ranks.device), random_file)
        randoms = self._ranks.gather(random_file.getvalue())
        sharded = isinstance(model, FSDPModule)
        if not (self._ranks.is_main or sharded):
            return
        self._wait()
        if config is None:
            config = model.config.to_dict() | {
                "architectures": ["LlamaForCausalLM"],
                "dtype": str(next(model.parameters()).dtype)[6:],
            }
        weights = state_dict_without_tied_weights(model)
        # The next forward pass writes buffers (BatchNorm's statistics); they are small.
        weights |= {
            name: buffer.clone() for name, buffer in model.named_buffers() if name in weights
        }
        files = {WEIGHTS: weights} | {
            EXTRA.format(name): state_dict_without_tied_weights(module)
            for name, module in (extra or {}).items()
        }
        documents = {CONFIG: _json(config), TRAINER: _json(trainer)}
        self._problem, self._untold = None, False
        states = optimizer_state_by_name(model, optimizer)
        if sharded:
            self._copy.gather(files, states, keep=self._ranks.is_main)
        else:
            self._copy.begin(files, states)
        if not self._ranks.is_main:
            return
        folder = self._run_folder / "checkpoints" / f"model_{step}"
        arguments = (folder, documents, randoms, tokenizer)
        self._thread = threading.Thread(
            target=self._save, args=arguments, name=f"checkpoint {step}", daemon=False
        )
        self._thread.start()

    def before_update(self) -> None:
        """Wait until the state of the last `save` is copied, so that weights and optimizer state may change."""
        self._copy.wait()

    def failure(self) -> str | None:
        """With on_error `stop`, on rank 0: why the last save failed, told once; None while there is nothing to end the run for."""
        untold, self._untold = self._untold, False
        return self._problem if untold else None

    def finish(self) -> None:
        """Wait, on all ranks, until the save in flight is on the disk: at the end of a run, which torchrun lets no rank finish after
        another has failed. Raises UserError where the last save failed, whatever `on_error` says: the run would end without its
        last checkpoint."""
        self._wait()
        problem = self._ranks.broadcast(self._problem)
        if problem:
            raise UserError(problem)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _save(
        self, folder: Path, documents: dict[str, str], randoms: list[bytes], tokenizer
    ) -> None:
        """What the thread does. It must not fail in silence, whatever happens."""
        try:
            files, states = self._copy.make()
            remove_leftovers(self._run_folder)
            write_checkpoint(folder, files, states, documents, randoms, tokenizer)
        except Exception as error:
            remedy = "make room or make it writable; the checkpoints before it are untouched"
            self._problem = f"{folder} could not be saved ({reason_of(error)}): {remedy}"
            self._untold = self._on_error == "stop"
            if not self._untold:
                logger.warning(f"{self._problem}, training goes on and the next save tries again")
            return
        logger.info(f"saved {folder}")
        if self._keep is not None:
            try:
                delete_old(self._run_folder, self._keep, self._milestone_every)
            except OSError as error:
                logger.warning(
                    f"an old checkpoint could not be deleted ({reason_of(error)}): the next save tries again"
                )


# ----------------------------------------------------------------------------------------------------------------- writing


def write_checkpoint(
    folder: Path,
    weights: Tensors,
    states: Tensors,
    documents: dict[str, str],
    randoms: list[bytes],
    tokenizer,
) -> None:
    """Write a checkpoint beside its place and give it its name when all of it is on the disk.

    weights: by file name; contiguous, none twice in a file. states: the optimizer's, by parameter name. documents: texts by file name.
    randoms: the contents of each rank's file.
    On an error nothing of it remains, and it is raised.
    """
    building = folder.with_name(folder.name + ".tmp")
    try:
        (building / OPTIMIZER).parent.mkdir(parents=True)
        for name, tensors in weights.items():
            save_file(tensors, building / name, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(building)
        for name, text in documents.items():
            (building / name).write_text(text, encoding="utf8")
        for rank, content in enumerate(randoms):
            (building / RANDOM.format(rank)).write_bytes(content)
        with (building / OPTIMIZER).open(
            "wb"
        ) as file:  # where the disk is full, Python's file says so and torch's own does not
            torch.save(states, file)
        files = sorted(p for p in building.rglob("*") if p.is_file())
        manifest = {
            p.relative_to(building).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)}
            for p in files
        }
        (building / MANIFEST).write_text(_json(manifest), encoding="utf8")
        for path in (*building.rglob("*"), building):
            fsync_path(path)
        _commit(building, folder)
    except Exception:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _json(thing: dict) -> str:
    return json.dumps(thing, indent=2) + "\n"


def _commit(building: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        folder.rename(replaced)
    building.rename(folder)
    for parent in (
        folder.parent,
        folder.parent.parent,
    ):  # the latter has a new entry at the first save
        fsync_path(parent)
    if replaced.exists():
        remove_folder(replaced)
