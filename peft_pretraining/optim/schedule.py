"""Learning-rate schedules as functions of the update, so that a resumed run needs no state."""

import math

SCHEDULERS = ("linear", "cosine", "cosine_restarts")


def lr_factor(
    update: int, scheduler: str, total: int, warmup: int, min_ratio: float, cycle: int | None = None
) -> float:
    """Return the learning rate of an update, as a fraction of the peak.

    Args:
        update: The number of the update: 1 for the first, `total` for the last.
        scheduler: `linear` and `cosine` fall from 1 to `min_ratio` at the last update.
            `cosine_restarts` falls so in every `cycle` updates after the warm-up (SGDR, Loshchilov
            and Hutter 2017, arXiv 1608.03983).
        total: The number of updates of the run.
        warmup: The number of updates of linear warm-up. Update `warmup` is the first with the peak
            learning rate, and no update has a learning rate of 0.
        min_ratio: The fraction at the end of the fall.
        cycle: The length of a cycle of `cosine_restarts`, in updates.
    """
    if update <= warmup:
        return update / warmup
    if scheduler == "cosine_restarts":
        assert cycle is not None
        done = (update - warmup - 1) % cycle / cycle
    else:
        done = (update - warmup) / max(1, total - warmup)
    fall = done if scheduler == "linear" else (1 - math.cos(math.pi * done)) / 2
    return 1 - (1 - min_ratio) * fall
