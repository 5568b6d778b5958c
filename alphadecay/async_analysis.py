"""An analysis that runs on a background thread while training goes on."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class AsyncAnalysis:
    """An analysis that runs on a thread of its own. update: the one whose weights it sees; table: its result on all ranks."""

    def __init__(self, update: int, table: Tensor | None = None):
        self.update, self.table = update, table
        self._result: list[Tensor] = []
        self._thread: threading.Thread | None = None

    def start(
        self,
        analyze: Callable[[], Tensor],
        copies: list[Tensor],
        stream: "torch.cuda.Stream | None",
    ) -> None:
        """Run `analyze`; on a GPU on the side stream, which first waits for the copies to be made."""

        def run() -> None:
            if stream is None:
                self._result.append(analyze())
                return
            with torch.cuda.stream(stream):
                self._result.append(analyze())

        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(copies[0].device))
            for copy in copies:
                copy.record_stream(stream)
        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self) -> Tensor:
        """This rank's table. It comes: each module has its timeout, and an error marks its rows."""
        self._thread.join()
        return self._result[0]
