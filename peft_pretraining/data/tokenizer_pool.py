"""Documents to ids, in this process or on several, in the order of the documents."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection

import numpy as np

from peft_pretraining.data.tokenizer import Tokenizer, encode_documents, encoder_from_state
from peft_pretraining.errors import UserError

BATCH_DOCUMENTS, BATCH_CHARACTERS = (
    1000,
    1_000_000,
)  # bounds of a batch: a thousand books at once would not fit in memory


Encoded = Iterator[
    tuple[np.ndarray, np.ndarray]
]  # batches of documents, each as `Tokenizer.encode` gives it


@contextlib.contextmanager
def encoding(tokenizer: Tokenizer, processes: int) -> Iterator[Callable[[Iterable[str]], Encoded]]:
    """A function that encodes documents, nothing of whose result depends on `processes`.

    With 1 process this one encodes, on the tokenizer's own threads; with more, so many spawned ones do, on one thread each, and at
    most two batches for each are held. The function raises UserError for an id that the model has no embedding for and for a
    process that died.
    """
    if processes == 1:
        yield lambda documents: map(tokenizer.encode, text_batches(documents))
        return
    with (
        _encoding_processes(tokenizer, processes) as free,
        ThreadPoolExecutor(processes) as threads,
    ):
        yield lambda documents: _encoded(
            text_batches(documents), tokenizer, free, threads, 2 * processes
        )


def _encoded(
    batches: Iterator[list[str]],
    tokenizer: Tokenizer,
    free: queue.SimpleQueue[Connection],
    threads: ThreadPoolExecutor,
    most: int,
) -> Encoded:
    under_way = collections.deque(
        threads.submit(_ask, free, texts) for texts in itertools.islice(batches, most)
    )
    try:
        while under_way:
            tokens, lengths = under_way.popleft().result()
            under_way.extend(
                threads.submit(_ask, free, texts) for texts in itertools.islice(batches, 1)
            )
            yield tokenizer.check(tokens), lengths
    finally:
        for future in under_way:
            future.cancel()


def text_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of documents, bounded by number and by size."""
    texts, size = [], 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if len(texts) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


@contextlib.contextmanager
def _encoding_processes(
    tokenizer: Tokenizer, processes: int
) -> Iterator[queue.SimpleQueue[Connection]]:
    """A queue with a connection to each of so many encoding processes. They end with the block, and with this process if it is killed."""
    context = get_context(
        "spawn"
    )  # a forked process would inherit locked threads of the tokenizer and of Arrow
    free, started = queue.SimpleQueue(), []
    try:
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(theirs, tokenizer.encoder.to_str(), tokenizer.eos_id),
                daemon=True,
            )
            process.start()
            theirs.close()  # so that a dead process is the end of what `ours` gives
            started.append((process, ours))
            free.put(ours)
        yield free
    finally:
        for process, ours in started:
            process.terminate()
            process.join()
            ours.close()


def _ask(free: queue.SimpleQueue[Connection], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Has one of the free processes encode a batch: runs on a thread that does nothing but wait for it."""
    connection = free.get()
    try:
        connection.send(texts)
        return connection.recv()
    except (EOFError, OSError) as error:
        raise UserError(
            "A tokenising process died (the system may have killed it for want of memory); start again with fewer processes."
        ) from error
    finally:
        free.put(connection)


def _serve(connection: Connection, encoder_state: str, eos_id: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # the processes are the parallelism; threads in each would fight for the cores
    )
    encoder = encoder_from_state(encoder_state)
    with contextlib.suppress(
        EOFError, OSError, KeyboardInterrupt
    ):  # the other side is gone: no more is wanted
        while True:
            connection.send(encode_documents(encoder, eos_id, connection.recv()))
