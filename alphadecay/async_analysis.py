"""An analysis that runs on a background thread while training goes on."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class AsyncAnalysis:
    """An analysis on a background thread, or its result as a checkpoint saved it.

    Args:
        update: the update whose weights it analyses.
        table: [M, columns + 1], the statistics of all ranks; None until they are gathered.
    """

    def __init__(self, update: int, table: Tensor | None = None) -> None:
        self.update = update
        self.table = table
        self._result: list[Tensor] = []
        self._thread: threading.Thread | None = None

    def start(
        self,
        analyze: Callable[[], Tensor],
        copies: list[Tensor],
        stream: "torch.cuda.Stream | None",
    ) -> None:
        """Start the background thread.

        Args:
            analyze: computes this rank's rows of the table.
            copies: the weights that `analyze` reads, copied on the current stream.
            stream: the side stream to run on, which first waits for the copies. None on a CPU.
        """

        def run() -> None:
            if stream is None:
                self._result.append(analyze())
                return
            # A new thread starts on device 0. Entering the stream would make a context there, which
            # takes hundreds of megabytes from another rank's GPU.
            torch.cuda.set_device(stream.device)
            with torch.cuda.stream(stream):
                self._result.append(analyze())

        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(copies[0].device))
            for copy in copies:
                # The allocator must not reuse a copy's memory before the side stream is done.
                copy.record_stream(stream)
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self) -> Tensor:
        """Wait for the thread and return this rank's table.

        The thread always ends: each module has its timeout, and an error marks the rows as failed.

        Raises:
            RuntimeError: the analysis was never started.
        """
        if self._thread is None:
            raise RuntimeError("the analysis was not started: call start first")
        self._thread.join()
        return self._result[0]
