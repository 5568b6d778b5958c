"""Writing checkpoints beside the training: whole or not at all, one at a time, old ones deleted as asked."""

import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from loguru import logger
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from peft_pretraining.checkpoint import (
    MANIFEST,
    STATE,
    WEIGHTS,
    checkpoints_of,
    extra_file,
    optimizer_state_by_name,
    random_states,
    sha256,
    step_of,
    unshared,
)
from peft_pretraining.distributed import Ranks
from peft_pretraining.errors import UserError

ON_SAVE_ERROR = ("continue", "stop")
BEING_WRITTEN, BEING_DELETED = ".tmp", ".deleted"  # after a checkpoint's name


class Checkpoints:
    """The checkpoints of a run, run_folder/checkpoints/model_<step>.

    Rank 0 copies weights and optimizer state into buffers of its own, on a thread, while the next forward and backward pass read them; the
    update waits for the copy (`before_update`), not for the files. So saving costs rank 0 one more copy of that state in CPU memory.

    Args:
        keep: so many of the newest remain (None: all), and besides
        milestone_every: those whose step is a multiple of it.
        on_error: what a save that fails means: `continue` (the next one tries again) or `stop`.
    """

    def __init__(
        self, run_folder: Path, ranks: Ranks, keep: int | None = None, milestone_every: int | None = None, on_error: str = "continue"
    ):
        self.folder, self.ranks = run_folder / "checkpoints", ranks
        self.keep, self.milestone_every, self.on_error = keep, milestone_every, on_error
        self._buffers: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._problem: str | None = None  # of the newest save

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
        """Begin to save the state of now; all ranks call it together. Waits for the save before, if that is still being written.

        trainer: what JSON can hold. tokenizer: anything with `save_pretrained`. config: what goes into config.json, by default
        `model.config` as transformers reads it. extra: more modules whose weights decide the future, by name.
        """
        randomness = self.ranks.gather(_as_file(random_states(self.ranks.device)))
        if not self.ranks.is_main:
            return
        self._join()
        weights, states = unshared(model), optimizer_state_by_name(model, optimizer)
        # The next forward pass writes buffers (BatchNorm's statistics); they are small.
        weights |= {name: buffer.clone() for name, buffer in model.named_buffers() if name in weights}
        extra_weights = {name: unshared(module) for name, module in (extra or {}).items()}
        if config is None:
            config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": str(next(model.parameters()).dtype)[6:]}
        texts = {"config.json": config, f"{STATE}/trainer.json": trainer}
        texts = {name: json.dumps(content, indent=2) + "\n" for name, content in texts.items()}  # now, before any of it changes
        ready = torch.cuda.current_stream().record_event() if self.ranks.device.type == "cuda" else None

        def write(folder: Path) -> None:
            copied_weights, copied_states, copied_extra = self._copy(weights, states, extra_weights, ready)
            self._copied.set()
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf8")
            for rank, state in enumerate(randomness):
                (folder / STATE / f"random_{rank}.pt").write_bytes(state)
            save_file(copied_weights, folder / WEIGHTS, metadata={"format": "pt"})
            torch.save(copied_states, folder / STATE / "optimizer.pt")
            for name, tensors in copied_extra.items():
                save_file(tensors, folder / extra_file(name))
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)

        self._copied.clear()
        self._problem = None
        # Not a daemon: an interpreter that ends waits for it.
        self._thread = threading.Thread(target=self._save, args=(self.folder / f"model_{step}", write), name="checkpoint")
        self._thread.start()

    def before_update(self) -> None:
        """Call before weights or optimizer state change: waits until they are copied."""
        if self._thread is not None:
            self._copied.wait()

    def failure(self) -> str | None:
        """What the newest save failed of, where that is to stop the run."""
        return self._problem if self.on_error == "stop" else None

    def finish(self) -> None:
        """Wait for the save under way. Raises UserError where the newest save failed."""
        self._join()
        if self._problem:
            raise UserError(self._problem)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copy(self, weights: dict[str, Tensor], states: dict[str, dict], extra: dict[str, dict], ready) -> tuple[dict, dict, dict]:
        """The tensors as they are now, in this object's buffers, which every save uses again."""
        stream = torch.cuda.Stream(self.ranks.device) if ready else None
        with torch.cuda.stream(stream):  # None: nothing
            if stream:
                stream.wait_event(ready)
            copied_weights = {name: self._into_buffer(f"weights.{name}", tensor) for name, tensor in weights.items()}
            copied_states = {
                name: {k: self._into_buffer(f"{k}.{name}", v) if isinstance(v, Tensor) else v for k, v in state.items()}
                for name, state in states.items()
            }
            copied_extra = {
                name: {k: self._into_buffer(f"{name}.{k}", tensor) for k, tensor in tensors.items()} for name, tensors in extra.items()
            }
        if stream:
            stream.synchronize()
        return copied_weights, copied_states, copied_extra

    def _into_buffer(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def _save(self, folder: Path, write: Callable[[Path], None]) -> None:
        """On the thread: everything that can fail."""
        building = folder.with_name(folder.name + BEING_WRITTEN)
        try:
            self._remove_leftovers()
            (building / STATE).mkdir(parents=True)
            write(building)
            publish(building, folder)
        except Exception as error:
            self._copied.set()
            shutil.rmtree(building, ignore_errors=True)  # what a full disk has room for again
            reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else repr(error)
            self._problem = (
                f"{folder} could not be saved ({reason}): the checkpoints before it are whole; make room or correct the folder's rights"
            )
            logger.error(self._problem)
            return
        logger.info(f"saved {folder}")
        try:
            self._delete_old()
        except OSError as error:
            logger.warning(f"an old checkpoint could not be deleted ({error})")

    def _remove_leftovers(self) -> None:
        """Of a process that was killed while it wrote or deleted."""
        for ending in (BEING_WRITTEN, BEING_DELETED):
            for folder in self.folder.glob(f"model_*{ending}"):
                shutil.rmtree(folder)

    def _delete_old(self) -> None:
        steps = sorted(map(step_of, checkpoints_of(self.folder.parent)), reverse=True)
        for step in steps[self.keep :] if self.keep else ():
            if not (self.milestone_every and step % self.milestone_every == 0):
                folder = self.folder / f"model_{step}"
                doomed = folder.with_name(folder.name + BEING_DELETED)
                folder.rename(doomed)  # first, so that half a checkpoint is never found under its name
                shutil.rmtree(doomed)


def _as_file(state: object) -> bytes:
    """What `torch.save` would write."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def publish(building: Path, folder: Path) -> None:
    """Write the manifest, bring every file to the disk, and only then give the checkpoint its name."""
    files = sorted(p for p in building.rglob("*") if p.is_file())
    manifest = {p.relative_to(building).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
    (building / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf8")
    for path in (*files, building / MANIFEST, building / STATE, building):
        _sync(path)
    if folder.exists():  # of a history that was begun again
        shutil.rmtree(folder)
    building.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
