"""A copy of the training state in host memory."""

import threading

import torch

from peft_pretraining.checkpoint.format import WEIGHTS
from peft_pretraining.parallel.fsdp import full_tensor

Tensors = dict[str, dict[str, torch.Tensor]]  # by file and name, or by parameter and name


class HostSnapshot:
    """A copy of weights and optimizer state in CPU memory that is used again for the next one."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._made = (
            threading.Event()
        )  # on CUDA: every copy is in the stream, `_done` comes after the last
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
        sources = [
            tensor for part in (*files.values(), *states.values()) for tensor in part.values()
        ]
        self._gathered, self._failure = True, None
        try:
            self._allocate(sources if keep else [])
        except (
            RuntimeError,
            MemoryError,
        ) as error:  # the other ranks wait for this one all the same
            self._failure, keep = error, False
        for i, source in enumerate(sources):
            whole = full_tensor(source)
            if keep:
                self._buffers[i].copy_(whole, non_blocking=True)
        self._files, self._states = (files, states) if keep else (None, None)
        self._ready = (
            torch.cuda.current_stream().record_event() if keep and sources[0].is_cuda else None
        )

    def make(self) -> tuple[Tensors, Tensors]:
        """Copy, and return weights by file and optimizer state as they were noted; the thread that writes calls it."""
        if self._failure is not None:
            raise self._failure
        if self._gathered:
            return self._result(self._ready)
        done = None
        try:
            sources = [
                tensor
                for part in (*self._files.values(), *self._states.values())
                for tensor in part.values()
            ]
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
        files, states = (
            {name: {key: next(copies) for key in part} for name, part in all.items()}
            for all in (self._files, self._states)
        )
        self._files = self._states = (
            None  # a parameter that the training drops shall not live on here
        )
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
            self._buffers = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in sources
            ]
