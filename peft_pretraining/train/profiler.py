"""`--profile`: a trace of a few updates."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from loguru import logger

from peft_pretraining.parallel.process_group import DistributedContext

# ---------------------------------------------------------------------------------------------------------------- --profile

UNPROFILED, PROFILED = (
    3,
    3,
)  # updates: caches fill and kernels are chosen in the first ones, and the profiler itself warms up in the last


def profiled(
    updates: Iterable[int], wanted: bool, run_folder: Path, ranks: DistributedContext
) -> Iterable[int]:
    """The same updates; where `wanted`, rank 0 writes a trace of the 4th to 6th to RUN/profile/rank0.json.gz (one there is replaced)."""
    if not (wanted and ranks.is_main):
        return updates
    return _profiled(iter(updates), run_folder / "profile" / "rank0.json.gz", ranks.device)


def _profiled(updates: Iterator[int], path: Path, device: torch.device) -> Iterator[int]:
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=UNPROFILED - 1, warmup=1, active=PROFILED, repeat=1)
    made = 0
    # A trace that has begun is written when the run ends early, too.
    with torch.profiler.profile(
        activities=kinds, schedule=schedule, on_trace_ready=lambda p: _write_trace(p, path)
    ) as profiler:
        for update in itertools.islice(updates, UNPROFILED + PROFILED):
            yield update
            profiler.step()
            made += 1
    if made <= UNPROFILED:
        logger.warning(
            f"no profile: the run made {made} updates, and the first to be profiled is number {UNPROFILED + 1}"
        )
    yield from updates


def _write_trace(profiler: torch.profiler.profile, path: Path) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info(
            f"profile: {path}; open it at https://ui.perfetto.dev or in Chrome at chrome://tracing"
        )
    except (OSError, RuntimeError) as error:  # a full disk must not end the training
        logger.warning(f"{path} cannot be written ({error}): training goes on")
