"""A copy of weights and optimizer state in host memory, which is written while training goes on.

The training thread and the writer thread of rank 0 use it like this:

    training thread                              writer thread
    request(files, states)
    next forward and backward passes, which      copy()
    only read weights and optimizer state
    wait(), then the optimizer step              writes the copy to the disk

For a sharded model, copying needs collectives, which only the training thread may start. It then
calls `copy_sharded` in place of `request`, and `copy` only returns the result.
"""

import threading
from collections.abc import Iterable

import torch
from torch import Tensor

from peft_pretraining.parallel.fsdp import full_tensor

Tensors = dict[str, dict[str, Tensor]]  # by file and name, or by parameter and name


class HostSnapshot:
    """A copy of tensors in host memory. The memory is used again for the next copy.

    The memory is pinned for tensors of a CUDA device, which torch rounds up to a power of two bytes
    for each tensor.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._files: Tensors | None = None
        self._states: Tensors | None = None
        self._stream: torch.cuda.Stream | None = None
        self._source_ready: torch.cuda.Event | None = None
        # Set unless a copy is outstanding. On CUDA: all copies are queued on the side stream.
        self._copy_queued = threading.Event()
        self._copy_queued.set()
        # Recorded after the last copy; None once the training stream waits for it.
        self._copy_done: torch.cuda.Event | None = None
        self._already_copied = False
        # The error of `copy_sharded`, which `copy` raises in the writer thread.
        self._failure: Exception | None = None

    def request(self, files: Tensors, states: Tensors) -> None:
        """Record what `copy` shall copy. Called by the training thread.

        Args:
            files: Weights by file name and name.
            states: Optimizer state by parameter name and name.
        """
        self._files, self._states = files, states
        self._already_copied, self._failure = False, None
        self._source_ready = None
        if any(tensor.is_cuda for tensor in _flatten(files)):
            self._stream = self._stream or torch.cuda.Stream()
            self._source_ready = torch.cuda.current_stream().record_event()
        self._copy_queued.clear()

    def copy_sharded(self, files: Tensors, states: Tensors, keep: bool) -> None:
        """Gather and copy sharded tensors now, one at a time. Called by the training thread.

        All ranks must call this together, in place of `request`.

        Args:
            files: Weights by file name and name.
            states: Optimizer state by parameter name and name.
            keep: Whether this rank keeps the copy.
        """
        sources = [*_flatten(files), *_flatten(states)]
        self._already_copied, self._failure = True, None
        try:
            self._allocate(sources if keep else [])
        except (RuntimeError, MemoryError) as error:
            # Take part in the collectives all the same: the other ranks wait for this one.
            self._failure, keep = error, False
        for i, source in enumerate(sources):
            whole = full_tensor(source)
            if keep:
                self._buffers[i].copy_(whole, non_blocking=True)
        self._files, self._states = (files, states) if keep else (None, None)
        self._source_ready = (
            torch.cuda.current_stream().record_event() if keep and sources[0].is_cuda else None
        )

    def copy(self) -> tuple[Tensors, Tensors]:
        """Make the requested copy and wait for it. Called by the writer thread.

        Returns:
            Copies of the `files` and `states` that were given to `request` or `copy_sharded`.
        """
        if self._failure is not None:
            raise self._failure
        if self._already_copied:
            return self._wait_and_label(self._source_ready)
        done = None
        try:
            assert self._files is not None and self._states is not None
            sources = [*_flatten(self._files), *_flatten(self._states)]
            self._allocate(sources)
            # One call for all tensors: it releases the interpreter lock, which training needs.
            if self._source_ready is None:
                torch._foreach_copy_(self._buffers, sources)
            else:
                assert self._stream is not None
                with torch.cuda.stream(self._stream):
                    self._stream.wait_event(self._source_ready)
                    torch._foreach_copy_(self._buffers, sources, non_blocking=True)
                    self._copy_done = done = self._stream.record_event()
        finally:
            self._copy_queued.set()
        return self._wait_and_label(done)

    def wait(self) -> None:
        """Wait for a requested copy, so that the copied tensors may change.

        On CUDA only the current stream of the device waits for the copies; this process goes on.
        """
        self._copy_queued.wait()
        if self._copy_done is not None:
            torch.cuda.current_stream().wait_event(self._copy_done)
            self._copy_done = None

    def _wait_and_label(self, done: torch.cuda.Event | None) -> tuple[Tensors, Tensors]:
        if done is not None:
            done.synchronize()
        assert self._files is not None and self._states is not None
        buffers = iter(self._buffers)
        files, states = (
            {name: {key: next(buffers) for key in part} for name, part in tensors.items()}
            for tensors in (self._files, self._states)
        )
        # Drop the references, so that parameters that training replaces can be freed.
        self._files = self._states = None
        return files, states

    def _allocate(self, sources: list[Tensor]) -> None:
        if [(t.shape, t.dtype) for t in sources] != [(t.shape, t.dtype) for t in self._buffers]:
            self._buffers = []  # free the old memory before the new is allocated
            self._buffers = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in sources
            ]


def _flatten(tensors: Tensors) -> Iterable[Tensor]:
    return (tensor for part in tensors.values() for tensor in part.values())
