"""Run a script's main function: a user error ends it with one line and exit code 2."""

import os
import sys
import time
from collections.abc import Callable

from peft_pretraining.errors import UserError


def run_script(main: Callable[[], None]) -> int:
    """Run a script's main; what the user can put right ends it with one sentence and exit code 2, not with a traceback."""
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        if rank:
            # Rank 0 speaks for all: torchrun ends this process as soon as rank 0 has. What only this rank met, it says itself.
            time.sleep(5)
        print(
            f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}",
            file=sys.stderr,
            flush=True,
        )
        return 2
    return 0
