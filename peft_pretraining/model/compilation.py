"""Whether torch.compile can be used on this machine."""

import torch
from loguru import logger

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.utils.determinism import use_deterministic_compilation

REMEDY = (
    "install a C++ compiler and Python's headers (apt install g++ python3-dev), "
    "or give --compile off"
)


def resolve_compile(choice: str, ranks: DistributedContext, deterministic: bool = False) -> str:
    """Return `on` or `off`: what --compile asks for, the same on all ranks.

    `auto` compiles on a GPU if that is possible: containers without a C compiler or without
    Python's headers cannot.

    Args:
        choice: the value of --compile: auto, on or off.
        deterministic: whether --deterministic is given.
        ranks: the processes of the run; all of them call this function together.

    Raises:
        UserError: --compile on, and a process cannot compile, or not deterministically.
    """
    if choice == "off" or (choice == "auto" and ranks.device.type != "cuda"):
        return "off"
    problem = None
    if deterministic and not use_deterministic_compilation():
        problem = f"torch {torch.__version__} has no deterministic mode of it"
    problem = problem or _compilation_problem(ranks.device)
    problems = ranks.broadcast_object(ranks.gather_objects(problem))
    found = next(filter(None, problems), None)
    if found is None:
        return "on"
    if choice == "on":
        raise UserError(f"--compile on: torch.compile does not work here ({found}): {REMEDY}")
    logger.warning(f"torch.compile does not work here ({found}), so training is slower: {REMEDY}")
    return "off"


def _compilation_problem(device: torch.device) -> str | None:
    """Compile and run a small function; return the reason if that fails, in one line."""
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of Triton, of the system
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else error}"[:200]
    return None


def _small(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2 + 1
