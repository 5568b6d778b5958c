"""torchrun, started again if it ends because a node was lost: scripts/cluster/multinode.sh runs it.

    python -m scripts.cluster.relaunch --max_restarts=3 ...    the arguments of torchrun

torchrun restarts processes that died, but not a node: if a machine is rebooted, its new torchrun
and the others wait for each other until a time-out, and then all of them end. Here each of them
starts again instead, in a new rendezvous, as often as --max_restarts says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, main

# How often this launcher has started torchrun again. The training scripts read it.
RESTARTS = "ALPHADECAY_RESTARTS"


def run(
    arguments: Sequence[str],
    start: Callable[[Sequence[str]], None] = main,
    again: Callable[[], None] | None = None,
) -> None:
    """Run torchrun, and replace this process by a new one if torchrun has lost a node.

    Args:
        arguments: those of torchrun.
        start: torchrun's main function.
        again: replaces the process; does not return.

    Raises:
        ChildFailedError: a process of this node has failed more often than torchrun restarts it.
        SignalException: torchrun was asked to stop.
        Exception: what torchrun raised, if the restarts are used up.
    """
    options = get_args_parser().parse_args(arguments)
    made = int(os.environ.get(RESTARTS, 0))
    try:
        start(arguments)
    except (ChildFailedError, SignalException):
        raise
    except Exception as error:
        if made >= options.max_restarts:
            raise
        print(
            f"a node was lost ({type(error).__name__}): starting torchrun again "
            f"({made + 1} of {options.max_restarts}), which waits at {options.rdzv_endpoint} until "
            f"all {options.nnodes} nodes are there",
            file=sys.stderr,
            flush=True,
        )
        os.environ[RESTARTS] = str(made + 1)
        (again or _replace_this_process)()


def _replace_this_process() -> None:
    """Start this command anew, so that nothing of the failed rendezvous is left."""
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the port of the rendezvous among them
    os.execv(sys.executable, [sys.executable, "-m", "scripts.cluster.relaunch", *sys.argv[1:]])


if __name__ == "__main__":
    run(sys.argv[1:])
