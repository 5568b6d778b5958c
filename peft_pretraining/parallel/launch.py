"""What the launcher (torchrun, or nobody) told this process about its place among the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from peft_pretraining.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The place of this process.

    Args:
        rank: number of this process, from 0.
        local_rank: its number on this machine, from 0.
        world_size: number of processes.
        launcher: process number of the torchrun that started this process; None: nobody watches it.
    """

    rank: int
    local_rank: int
    world_size: int
    launcher: int | None = None


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Return what the environment variables of torchrun say.

    Without any of them a run has one process. srun, mpirun and pods of a cluster set some of them
    too, and a shell keeps what was exported earlier: a part of them, or numbers that contradict
    each other, would fail late or make two runs meet.

    Args:
        environment: the environment variables.

    Raises:
        UserError: the variables are incomplete or contradict each other. The message says which one
            to remove.
    """
    numbers = {name: _number(environment, name) for name in NAMES}
    rank, world_size, local_rank = (numbers[name] for name in NAMES)
    if world_size in (None, 1):
        for name in ("RANK", "LOCAL_RANK"):
            if numbers[name]:
                raise _unfit(
                    f"{name}={numbers[name]} is set, but WORLD_SIZE is "
                    f"{'not set' if world_size is None else 'only 1'}",
                    name,
                )
    else:
        missing = [name for name in (*NAMES, *ADDRESS) if not environment.get(name)]
        if missing:
            raise _unfit(f"WORLD_SIZE={world_size} is set, but {missing[0]} is not", "WORLD_SIZE")
        if not (rank or 0) < (world_size or 0):
            raise _unfit(f"RANK={rank} is not below WORLD_SIZE={world_size}", "RANK WORLD_SIZE")
    launcher = os.getppid() if environment.get("TORCHELASTIC_RUN_ID") else None
    return Launch(rank or 0, local_rank or 0, world_size or 1, launcher)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """Return a variable as a number that is not negative; None if it is not set."""
    text = environment.get(name)
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or (name == "WORLD_SIZE" and int(text) == 0):
        raise _unfit(f"{name}={text} is not a number of processes", name)
    return int(text)


def _unfit(problem: str, names: str) -> UserError:
    return UserError(
        f"the environment variable {problem}: start several processes with torchrun, or remove "
        f"what another program left there (unset {names})"
    )
