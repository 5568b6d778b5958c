"""--profile: a torch profiler trace of a few updates."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from loguru import logger

from peft_pretraining.parallel.process_group import DistributedContext

# In the first updates caches are filled and kernels are chosen. The profiler itself warms up in the
# last of them.
UNPROFILED_UPDATES = 3
PROFILED_UPDATES = 3


def profiled(
    updates: Iterable[int], enabled: bool, run_folder: Path, ranks: DistributedContext
) -> Iterable[int]:
    """Yield the updates unchanged, and write a trace of the 4th to the 6th of them.

    Rank 0 writes RUN/profile/rank0.json.gz and replaces an existing file.

    Args:
        updates: the numbers of the updates.
        enabled: the value of --profile; without it nothing is recorded.
        run_folder: the run folder, RUN.
        ranks: the processes of the run.
    """
    if not (enabled and ranks.is_main):
        return updates
    return _profiled(iter(updates), run_folder / "profile" / "rank0.json.gz", ranks.device)


def _profiled(updates: Iterator[int], path: Path, device: torch.device) -> Iterator[int]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(
        wait=UNPROFILED_UPDATES - 1, warmup=1, active=PROFILED_UPDATES, repeat=1
    )
    finished = 0
    # The context also writes a started trace if the run ends early.
    with torch.profiler.profile(
        activities=activities,
        schedule=schedule,
        on_trace_ready=lambda profiler: _write_trace(profiler, path),
    ) as profiler:
        for update in itertools.islice(updates, UNPROFILED_UPDATES + PROFILED_UPDATES):
            yield update
            profiler.step()
            finished += 1
    if finished <= UNPROFILED_UPDATES:
        logger.warning(
            f"no profile: the run made {finished} updates, but profiling starts with the "
            f"{UNPROFILED_UPDATES + 1}th"
        )
    yield from updates


def _write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    """Write a trace. A full disk must not end the training, so a failure is only a warning."""
    try:
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info(
            f"profile: {path}; open it at https://ui.perfetto.dev or in Chrome at chrome://tracing"
        )
    except (OSError, RuntimeError) as error:
        logger.warning(f"{path} cannot be written ({error}): training goes on")
