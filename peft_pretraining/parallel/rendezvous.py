"""A new key space in the store of torchrun after a restart."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist


class HungRank(RuntimeError):
    """Another process of the run did not answer in time."""


def new_store_namespace(
    store: dist.Store, rank: int, world_size: int, timeout: timedelta
) -> dist.Store:
    """Return a part of the store that no previous attempt of the run has written to.

    Processes that torchrun restarts find the store with the keys of the previous attempt, and would
    connect to the addresses of processes that have ended. The restart count cannot serve as a
    prefix: with several nodes, only the node on which a process ended counts the restart. So rank 0
    generates a UUID as prefix and answers each other rank under a UUID of that rank's own, which
    no previous attempt can have used.

    All ranks must call this together.

    Args:
        store: The store of torchrun.
        rank: The rank of this process.
        world_size: The number of ranks.
        timeout: How long rank 0 waits for the others. They wait as long as the store allows.

    Raises:
        HungRank: A rank did not arrive in time.
    """
    own_id = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks {rank}", own_id)
        prefix = store.get(f"answer to {own_id}").decode()  # waits until it is set
        store.set(f"{prefix} reached {rank}", "")
        return dist.PrefixStore(prefix, store)
    deadline = time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for other in missing:
            # The question may come from the previous attempt, whose rank never confirms. So answer
            # again until the rank of this attempt has asked and confirmed.
            if store.check([f"asks {other}"]):
                store.set(f"answer to {store.get(f'asks {other}').decode()}", own_id)
        missing = [other for other in missing if not store.check([f"{own_id} reached {other}"])]
        if missing and time.monotonic() > deadline:
            raise HungRank(f"rank {missing[0]} did not arrive within {timeout}")
        time.sleep(0.01)
    return dist.PrefixStore(own_id, store)
