"""Save checkpoints in the background. Their format is described in checkpoint/format.py."""

import io
import json
import threading
import time
from pathlib import Path
from typing import Any, cast

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
from peft_pretraining.checkpoint.retention import delete_old_or_warn, remove_leftovers
from peft_pretraining.checkpoint.snapshot import HostSnapshot, Tensors
from peft_pretraining.checkpoint.state import (
    optimizer_state_by_name,
    state_dict_without_tied_weights,
)
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.fsdp import is_fsdp
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.utils.files import atomic_directory, reason_of, sha256_file


class Checkpoints:
    """Saves the checkpoints of a run in the background.

    A thread of rank 0 copies the state into host memory during the forward and backward passes of
    the next update, which only read it. It then writes the copy while training goes on. The memory
    of the copy, the size of weights and optimizer state, is kept for the next save.

    The thread is not a daemon, so an ordinary exit of the process waits for it.

    Args:
        run_folder: The folder of the run; checkpoints are saved as checkpoints/model_<step> in it.
            What a killed run left there half written is removed.
        ranks: All processes of the run.
        keep: How many of the newest checkpoints stay after each save. None: all.
        milestone_every: Checkpoints of an update that is a multiple of this stay as well.
        every_minutes: A checkpoint is due when the last one is that old; 0: never.
        on_error: What happens if a save fails, because the disk is full for example. `continue`
            logs a warning, and the next save tries again. `stop` makes `failure` return the error.
            Older checkpoints stay complete either way.
    """

    def __init__(
        self,
        run_folder: Path,
        ranks: DistributedContext,
        keep: int | None = None,
        milestone_every: int | None = None,
        on_error: str = "continue",
        every_minutes: float = 0.0,
    ):
        self._run_folder, self._ranks = run_folder, ranks
        self._keep, self._milestone_every, self._on_error = keep, milestone_every, on_error
        self._every_seconds = 60 * every_minutes
        self._saved_at = time.monotonic()
        self._thread: threading.Thread | None = None
        self._snapshot = HostSnapshot()
        self._last_error: str | None = None
        self._error_unreported = False
        self._other_failure: str | None = None
        if ranks.is_main:
            remove_leftovers(run_folder)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        trainer: dict[str, Any],
        tokenizer: Any = None,
        config: dict[str, Any] | None = None,
        extra: dict[str, nn.Module] | None = None,
        changes: dict[str, Any] | None = None,
        temporary: bool = False,
    ) -> None:
        """Start saving the current state. All ranks must call this together.

        Waits for the previous save, and returns before the files are written. If the model is
        sharded, it returns when the copy in host memory is complete. Call `before_update` before
        weights or optimizer state change.

        Args:
            step: The number of updates made so far.
            model: The model, not wrapped in DistributedDataParallel.
            optimizer: Its optimizer.
            trainer: Further state, which must be representable in JSON.
            tokenizer: An object with `save_pretrained`, or None.
            config: The content of config.json. By default `model.config`, as transformers reads it.
            extra: Further modules whose weights a resumed run needs, by name.
            changes: Keys of config.json that have other values than in `config`, such as the ids of
                the tokenizer.
            temporary: Delete the checkpoint as soon as there is a newer one.
        """
        self._saved_at = time.monotonic()
        trainer = trainer | ({"temporary": True} if temporary else {})
        random_file = io.BytesIO()
        torch.save(random_states(self._ranks.device), random_file)
        randoms = self._ranks.gather_objects(random_file.getvalue())
        sharded = is_fsdp(model)
        if not (self._ranks.is_main or sharded):
            return
        self._wait()
        if config is None:
            config = cast(Any, model).config.to_dict() | {
                "architectures": ["LlamaForCausalLM"],
                "dtype": str(next(model.parameters()).dtype)[6:],
            }
        config = config | (changes or {})
        weights = state_dict_without_tied_weights(model)
        # The next forward pass changes buffers (statistics of BatchNorm), so copy them now.
        weights |= {
            name: buffer.clone() for name, buffer in model.named_buffers() if name in weights
        }
        files = {WEIGHTS: weights} | {
            EXTRA.format(name): state_dict_without_tied_weights(module)
            for name, module in (extra or {}).items()
        }
        documents = {CONFIG: _json(config), TRAINER: _json(trainer)}
        self._last_error, self._error_unreported = None, False
        states = optimizer_state_by_name(model, optimizer)
        if sharded:
            self._snapshot.copy_sharded(files, states, keep=self._ranks.is_main)
        else:
            self._snapshot.request(files, states)
        if not self._ranks.is_main:
            return
        folder = self._run_folder / "checkpoints" / f"model_{step}"
        self._thread = threading.Thread(
            target=self._write_in_background,
            args=(folder, documents, randoms, tokenizer),
            name=f"checkpoint {step}",
            daemon=False,
        )
        self._thread.start()

    def before_update(self) -> None:
        """Wait until the state of the last `save` is copied, so that it may change."""
        self._snapshot.wait()

    def is_due(self) -> bool:
        """Return True on rank 0 if the last `save` was more than `every_minutes` ago."""
        age = time.monotonic() - self._saved_at
        return self._ranks.is_main and bool(self._every_seconds) and age >= self._every_seconds

    def note_failure(self, what: str, error: Exception) -> None:
        """Note on rank 0 that something besides a checkpoint could not be saved.

        As for a checkpoint, `on_error` decides between a warning and the end of the run.

        Args:
            what: The file or folder.
            error: What was raised.
        """
        problem = f"{what} could not be saved ({reason_of(error)}): make room or make it writable"
        if self._on_error == "stop":
            self._other_failure = problem
        else:
            logger.warning(f"{problem}; training goes on")

    def failure(self) -> str | None:
        """Return why the last save failed, on rank 0 and with on_error `stop`.

        Each error is returned once. Returns None if there is nothing for which to end the run.
        """
        unreported, self._error_unreported = self._error_unreported, False
        other, self._other_failure = self._other_failure, None
        return self._last_error if unreported else other

    def finish(self) -> None:
        """Wait on all ranks until the last save is written; call it at the end of a run.

        All ranks wait, because torchrun ends the other ranks when one of them fails.

        Raises:
            UserError: The last save failed, whatever `on_error` is: the run would end without its
                last checkpoint. Or `note_failure` has noted something with on_error `stop`.
        """
        self._wait()
        error = self._ranks.broadcast_object(self._last_error or self._other_failure)
        if error:
            raise UserError(error)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write_in_background(
        self, folder: Path, documents: dict[str, str], randoms: list[bytes], tokenizer: Any
    ) -> None:
        """Write a checkpoint and delete old ones. Runs in the thread; every error is reported."""
        try:
            files, states = self._snapshot.copy()
            remove_leftovers(self._run_folder)
            write_checkpoint(folder, files, states, documents, randoms, tokenizer)
        except Exception as error:
            self._last_error = (
                f"{folder} could not be saved ({reason_of(error)}): make room or make it writable; "
                "older checkpoints are untouched"
            )
            self._error_unreported = self._on_error == "stop"
            if not self._error_unreported:
                logger.warning(
                    f"{self._last_error}, training goes on and the next save tries again"
                )
            return
        logger.info(f"saved {folder}")
        delete_old_or_warn(self._run_folder, self._keep, self._milestone_every)


# ----------------------------------------------------------------------------------------- writing


def write_checkpoint(
    folder: Path,
    weights: Tensors,
    states: Tensors,
    documents: dict[str, str],
    randoms: list[bytes],
    tokenizer: Any,
) -> None:
    """Write a checkpoint so that it is complete or absent.

    The files are written into a temporary folder, flushed to the disk, and the folder is renamed.
    After an error nothing of the checkpoint remains.

    Args:
        folder: The checkpoint, named model_<step>.
        weights: Tensors by file name and name: contiguous, and none twice in the same file.
        states: Optimizer state by parameter name.
        documents: Texts by file name.
        randoms: The content of the random-state file of each rank.
        tokenizer: An object with `save_pretrained`, or None.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    with atomic_directory(folder) as temporary:
        (temporary / OPTIMIZER).parent.mkdir()
        for name, tensors in weights.items():
            save_file(tensors, temporary / name, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for name, text in documents.items():
            (temporary / name).write_text(text, encoding="utf8")
        for rank, content in enumerate(randoms):
            (temporary / RANDOM.format(rank)).write_bytes(content)
        # Opened by Python: torch.save to a path reports a full disk without the system's reason.
        with (temporary / OPTIMIZER).open("wb") as file:
            torch.save(states, file)
        manifest = {
            p.relative_to(temporary).as_posix(): {
                "size": p.stat().st_size,
                "sha256": sha256_file(p),
            }
            for p in sorted(temporary.rglob("*"))
            if p.is_file()
        }
        (temporary / MANIFEST).write_text(_json(manifest), encoding="utf8")


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"
