"""Shards: documents that can be read from any one on, with retries after network errors."""

from __future__ import annotations

import importlib.util
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Protocol

from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import reason_of

# Seconds between two attempts, ten minutes in total: longer than the Hub, a router or a proxy takes
# to restart, and short enough not to waste much time of the GPUs.
RETRY_DELAYS = (1, 2, 4, 8, 16, 32, *(60,) * 9)


class Shards(Protocol):
    """Documents in `n_shards` shards.

    A shard gives the same documents in the same order whenever it is read. If `remote` is true,
    reading may fail for a while because of the network: `read` then raises one of
    `network_errors()`.
    """

    @property
    def n_shards(self) -> int: ...

    @property
    def remote(self) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def read(self, shard: int, skip: int) -> Iterator[str]:
        """Yield the documents of one shard without the first `skip`."""


def network_errors() -> tuple[type[Exception], ...]:
    """Return the errors that the Hub's libraries raise when a connection fails.

    They include those of a compressed file that breaks off in the middle.
    """
    import huggingface_hub.errors

    # OSError includes the timeouts and connection errors of Python and of requests.
    errors = (OSError, EOFError, zlib.error, huggingface_hub.errors.HfHubHTTPError)
    if importlib.util.find_spec("httpx") is None:
        return errors  # huggingface_hub 0.x does not use httpx.
    import httpx

    return (*errors, httpx.HTTPError)


def read_with_retries(
    documents: Shards, shard: int, skip: int = 0, delays: Sequence[float] = RETRY_DELAYS
) -> Iterator[str]:
    """Yield the documents of one shard without the first `skip`.

    After a network error the shard is opened again at the document that was reached. Other errors,
    and all errors of a source that is not remote, are raised unchanged.

    Args:
        documents: The shards.
        shard: Which of them to read.
        skip: Number of documents to leave out at the beginning.
        delays: Seconds to wait before each new attempt; start again with the first after every
            document that was read.

    Raises:
        UserError: All attempts failed.
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
            _wait_before_retry(error, f"document {reached:,} of shard {shard}", failures, delays)


def _wait_before_retry(
    error: Exception, where: str, failures: int, delays: Sequence[float]
) -> None:
    from loguru import logger

    reason = reason_of(error)
    if failures > len(delays):
        raise UserError(
            f"The network did not give {where} of the data in {sum(delays) / 60:.0f} minutes of "
            f"trying ({reason}); connect to it and continue from the last checkpoint."
        ) from error
    delay = delays[failures - 1]
    logger.warning(f"The network broke off at {where} ({reason}): trying again in {delay} s")
    time.sleep(delay)
