"""A new key space in torchrun's store after a restart."""

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

pass


def new_store_namespace(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of the store that no earlier life of the run has written to; all ranks call it and get the same.

    Processes that torchrun starts again find the store of those that died, and would connect to their addresses. The restart count does
    not tell the lives apart: of several nodes only those count where a process died. So rank 0 makes up a name, and tells it each rank that
    asks under a name of its own, which nobody dead can have had. Raises TimeoutError where a rank does not come.
    """
    me = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks {rank}", me)
        life = store.get(f"answer to {me}").decode()  # waits for it
        store.set(f"{life} reached {rank}", "")
        return dist.PrefixStore(life, store)
    deadline = time.monotonic() + INIT_TIMEOUT.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for other in missing:
            if store.check(
                [f"asks {other}"]
            ):  # it may still be the question of the dead: so ask again until the living one is reached
                store.set(f"answer to {store.get(f'asks {other}').decode()}", me)
        missing = [other for other in missing if not store.check([f"{me} reached {other}"])]
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"rank {missing[0]} did not come within {INIT_TIMEOUT}")
        time.sleep(0.01)
    return dist.PrefixStore(me, store)


INIT_TIMEOUT = timedelta(hours=2)  # ranks wait so long while rank 0 tokenises a corpus
