"""Writing checkpoints (their format is in checkpoint.py) while the training goes on."""

import io
import json
import os
import shutil
import threading
from pathlib import Path

import torch
import torch.nn as nn
from loguru import logger
from safetensors.torch import save_file
from torch.optim import Optimizer

from peft_pretraining.checkpoint.load import CONFIG, EXTRA, MANIFEST, OPTIMIZER, RANDOM, TRAINER, WEIGHTS, checkpoints_of, damage_of, optimizer_state_by_name, random_states, restore_replaced, sha256, step_of, unshared_state
from peft_pretraining.parallel.process_group import Ranks
from peft_pretraining.errors import UserError
from peft_pretraining.parallel.fsdp import FSDPModule, whole_tensor


Tensors = dict[str, dict[str, torch.Tensor]]  # by file and name, or by parameter and name


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
        self, run_folder: Path, ranks: Ranks, keep: int | None = None, milestone_every: int | None = None, on_error: str = "continue"
    ):
        self._run_folder, self._ranks = run_folder, ranks
        self._keep, self._milestone_every, self._on_error = keep, milestone_every, on_error
        self._thread: threading.Thread | None = None
        self._copy = _StateCopy()
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
            config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": str(next(model.parameters()).dtype)[6:]}
        weights = unshared_state(model)
        # The next forward pass writes buffers (BatchNorm's statistics); they are small.
        weights |= {name: buffer.clone() for name, buffer in model.named_buffers() if name in weights}
        files = {WEIGHTS: weights} | {EXTRA.format(name): unshared_state(module) for name, module in (extra or {}).items()}
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
        self._thread = threading.Thread(target=self._save, args=arguments, name=f"checkpoint {step}", daemon=False)
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

    def _save(self, folder: Path, documents: dict[str, str], randoms: list[bytes], tokenizer) -> None:
        """What the thread does. It must not fail in silence, whatever happens."""
        try:
            files, states = self._copy.make()
            remove_leftovers(self._run_folder)
            write_checkpoint(folder, files, states, documents, randoms, tokenizer)
        except Exception as error:
            remedy = "make room or make it writable; the checkpoints before it are untouched"
            self._problem = f"{folder} could not be saved ({_reason(error)}): {remedy}"
            self._untold = self._on_error == "stop"
            if not self._untold:
                logger.warning(f"{self._problem}, training goes on and the next save tries again")
            return
        logger.info(f"saved {folder}")
        if self._keep is not None:
            try:
                delete_old(self._run_folder, self._keep, self._milestone_every)
            except OSError as error:
                logger.warning(f"an old checkpoint could not be deleted ({_reason(error)}): the next save tries again")


class _StateCopy:
    """A copy of weights and optimizer state in CPU memory that is used again for the next one."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._made = threading.Event()  # on CUDA: every copy is in the stream, `_done` comes after the last
        self._made.set()
        self._done: torch.cuda.Event | None = None  # until the training's stream waits for it
        self._gathered = False
        self._failure: Exception | None = None  # of `gather`, for the thread that writes to raise

    def begin(self, files: Tensors, states: Tensors) -> None:
        """Note what to copy, weights by file and optimizer state; the thread that trains calls it."""
        self._files, self._states = files, states
        self._ready, self._gathered = None, False
        if any(tensor.is_cuda for tensor in files[WEIGHTS].values()):
            self._stream = self._stream or torch.cuda.Stream()
            self._ready = torch.cuda.current_stream().record_event()
        self._made.clear()

    def gather(self, files: Tensors, states: Tensors, keep: bool) -> None:
        """In place of `begin`, for sharded tensors: copy them now, whole, one at a time; all ranks call it together.

        keep: whether this rank is the one that makes the copy. Collectives belong to the thread that trains, hence not in `make`.
        """
        sources = [tensor for part in (*files.values(), *states.values()) for tensor in part.values()]
        self._gathered, self._failure = True, None
        try:
            self._allocate(sources if keep else [])
        except (RuntimeError, MemoryError) as error:  # the other ranks wait for this one all the same
            self._failure, keep = error, False
        for i, source in enumerate(sources):
            whole = whole_tensor(source)
            if keep:
                self._buffers[i].copy_(whole, non_blocking=True)
        self._files, self._states = (files, states) if keep else (None, None)
        self._ready = torch.cuda.current_stream().record_event() if keep and sources[0].is_cuda else None

    def make(self) -> tuple[Tensors, Tensors]:
        """Copy, and return weights by file and optimizer state as they were noted; the thread that writes calls it."""
        if self._failure is not None:
            raise self._failure
        if self._gathered:
            return self._result(self._ready)
        done = None
        try:
            sources = [tensor for part in (*self._files.values(), *self._states.values()) for tensor in part.values()]
            self._allocate(sources)
            # One call for all: it runs without the interpreter's lock, which the training needs.
            if self._ready is None:
                torch._foreach_copy_(self._buffers, sources)
            else:
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(self._ready)
                    torch._foreach_copy_(self._buffers, sources, non_blocking=True)
                    self._done = done = self._stream.record_event()
        finally:
            self._made.set()
        return self._result(done)

    def _result(self, done: "torch.cuda.Event | None") -> tuple[Tensors, Tensors]:
        if done is not None:
            done.synchronize()
        copies = iter(self._buffers)
        files, states = ({name: {key: next(copies) for key in part} for name, part in all.items()} for all in (self._files, self._states))
        self._files = self._states = None  # a parameter that the training drops shall not live on here
        return files, states

    def wait(self) -> None:
        """Until the copy is made. On CUDA it is the device's current stream that waits, not this process."""
        self._made.wait()
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
            self._done = None

    def _allocate(self, sources: list[torch.Tensor]) -> None:
        if [(t.shape, t.dtype) for t in sources] != [(t.shape, t.dtype) for t in self._buffers]:
            self._buffers = []  # never two copies at a time
            self._buffers = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in sources]


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
        with (building / OPTIMIZER).open("wb") as file:  # where the disk is full, Python's file says so and torch's own does not
            torch.save(states, file)
        files = sorted(p for p in building.rglob("*") if p.is_file())
        manifest = {p.relative_to(building).as_posix(): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (building / MANIFEST).write_text(_json(manifest), encoding="utf8")
        for path in (*building.rglob("*"), building):
            _sync(path)
        _give_name(building, folder)
    except Exception:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _json(thing: dict) -> str:
    return json.dumps(thing, indent=2) + "\n"


def _give_name(building: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        folder.rename(replaced)
    building.rename(folder)
    for parent in (folder.parent, folder.parent.parent):  # the latter has a new entry at the first save
        _sync(parent)
    if replaced.exists():
        _remove(replaced)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The operating system's words where it is the cause, under whatever a library raised because of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return f"{cause.strerror}: {cause.filename}" if cause.filename else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------------------------------------------------------- deleting


def delete_old(run_folder: Path, keep: int, milestone_every: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and those whose step is a multiple of `milestone_every`.

    A damaged one does not count, and stays: a person may want to see it. Raises OSError where one cannot be renamed.
    """
    whole = sorted((p for p in checkpoints_of(run_folder) if damage_of(p, hashes=False) is None), key=step_of)
    for folder in whole[:-keep]:
        if milestone_every and step_of(folder) % milestone_every == 0:
            continue
        # Under a name that is no checkpoint's first: a kill in between must not leave a damaged one.
        deleted = folder.with_name(folder.name + ".deleted")
        folder.rename(deleted)
        _sync(folder.parent)
        _remove(deleted)


def remove_leftovers(run_folder: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    restore_replaced(run_folder)
    for suffix in ("tmp", "deleted", "replaced"):
        for folder in (run_folder / "checkpoints").glob(f"model_*.{suffix}"):
            _remove(folder)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning(f"{folder} could not be deleted ({_reason(error)}): the next save tries again")
