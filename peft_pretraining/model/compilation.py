"""Whether torch.compile can be used on this machine."""

import torch
from loguru import logger

from peft_pretraining.errors import UserError
from peft_pretraining.parallel.process_group import DistributedContext
from peft_pretraining.utils.determinism import use_deterministic_compilation


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
    problem = _compilation_problem(ranks.device, deterministic)
    problems = ranks.broadcast_object(ranks.gather_objects(problem))
    found = next(filter(None, problems), None)
    if found is None:
        return "on"
    if choice == "on":
        raise UserError(f"--compile on: {found}; or give --compile off")
    logger.warning(f"nothing is compiled, so training is slower: {found}")
    return "off"


def _compilation_problem(device: torch.device, deterministic: bool) -> str | None:
    """Compile and run a small function; return why that fails and what helps, in one line."""
    if deterministic and not use_deterministic_compilation():
        return (
            f"torch.compile of torch {torch.__version__} has no deterministic mode: "
            "install a newer torch"
        )
    try:
        torch.compile(_small)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of Triton, of the system
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else error}"[:200]
        return (
            f"torch.compile does not work here ({reason}): "
            "install a C++ compiler and Python's headers (apt install g++ python3-dev)"
        )
    return None


def _small(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2 + 1
