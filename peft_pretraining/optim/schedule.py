"""Learning rate as a pure function of the update's number, so that a resumed run needs no state for it."""

import math

SCHEDULERS = ("linear", "cosine", "cosine_restarts")


def lr_factor(
    update: int, scheduler: str, total: int, warmup: int, min_ratio: float, cycle: int | None = None
) -> float:
    """Learning rate of an update over the peak.

    Args:
        update: 1 for the first update, `total` for the last.
        scheduler: `linear` and `cosine` fall from 1 to min_ratio at the last update; `cosine_restarts` does so in every
            `cycle` updates after the warm-up (SGDR, Loshchilov & Hutter 2017, arXiv 1608.03983).
        warmup: updates of linear warm-up; update `warmup` is the first at the peak, and none has a learning rate of 0.
        min_ratio: the end of the fall.
    """
    if update <= warmup:
        return update / warmup
    if scheduler == "cosine_restarts":
        done = (update - warmup - 1) % cycle / cycle
    else:
        done = (update - warmup) / max(1, total - warmup)
    fall = done if scheduler == "linear" else (1 - math.cos(math.pi * done)) / 2
    return 1 - (1 - min_ratio) * fall
