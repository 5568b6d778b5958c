"""Shards: documents that can be read from the middle on, also over a network that breaks off now and then."""

from __future__ import annotations

import importlib.util
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from peft_pretraining.errors import UserError

# Seconds between two attempts, ten minutes in all: longer than the Hub, a router or a proxy takes to come back from a restart,
# shorter than anyone would like a job to hold its GPUs for nothing.
RETRY_DELAYS = (1, 2, 4, 8, 16, 32, *(60,) * 9)


class Shards(Protocol):
    """Documents in `n_shards` parts, each of which gives the same documents in the same order whenever it is read.

    `remote` says that reading may fail for a while for the network's sake: `read` then lets one of `network_errors()` through.
    """

    @property
    def n_shards(self) -> int: ...

    @property
    def remote(self) -> bool: ...

    def read(self, shard: int, skip: int) -> Iterator[str]:
        """The documents of one shard without the first `skip`."""


def network_errors() -> tuple[type[Exception], ...]:
    """What the Hub's libraries let through when a connection fails, or breaks off in the middle of a compressed file."""
    import huggingface_hub.errors

    # An OSError are the timeouts and connection errors of Python and of requests as well.
    errors = (OSError, EOFError, zlib.error, huggingface_hub.errors.HfHubHTTPError)
    if (
        importlib.util.find_spec("httpx") is None
    ):  # huggingface_hub 0.x: its network errors are OSErrors
        return errors
    import httpx

    return (*errors, httpx.HTTPError)


def read_with_retries(
    documents: Shards, shard: int, skip: int = 0, pauses: Sequence[float] = RETRY_DELAYS
) -> Iterator[str]:
    """`documents.read(shard, skip)`, opened again at the document it had reached where the network broke off.

    Waits `pauses` seconds between attempts, from the first pause on again after every document. UserError when all of them were
    in vain; what a source raises that is not remote, or not for the network's sake, comes through as it is.
    """
    if not documents.remote:
        yield from documents.read(shard, skip)
        return
    reached, failures = skip, 0
    while True:
        try:
            for text in documents.read(shard, reached):
                reached, failures = reached + 1, 0
                yield text
            return
        except network_errors() as error:
            failures += 1
            _wait(error, f"document {reached:,} of shard {shard}", failures, pauses)


def _wait(error: Exception, where: str, failures: int, pauses: Sequence[float]) -> None:
    from loguru import logger

    reason = " ".join(str(error).split()) or type(error).__name__
    if failures > len(pauses):
        raise UserError(
            f"The network did not give {where} of the data in {sum(pauses) / 60:.0f} minutes of trying ({reason}); "
            "connect to it and continue from the last checkpoint."
        ) from error
    pause = pauses[failures - 1]
    logger.warning(f"The network broke off at {where} ({reason}): trying again in {pause} s")
    time.sleep(pause)
