"""Encode documents, in order, in this process or in several worker processes."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeAlias

import numpy as np

from peft_pretraining.data.tokenizer import Tokenizer, encode_documents, encoder_from_state
from peft_pretraining.errors import UserError
from peft_pretraining.utils.child import EndWithParent

# A batch is bounded by number and by size: a thousand books at once would not fit into memory.
BATCH_DOCUMENTS = 1000
BATCH_CHARACTERS = 1_000_000

# Batches of documents, each as `Tokenizer.encode` returns it: tokens, lengths.
EncodedBatches: TypeAlias = Iterator[tuple[np.ndarray, np.ndarray]]


@contextlib.contextmanager
def document_encoder(
    tokenizer: Tokenizer, processes: int
) -> Iterator[Callable[[Iterable[str]], EncodedBatches]]:
    """Yield a function that encodes documents batch by batch.

    Its result does not depend on the number of processes.

    Args:
        tokenizer: The tokenizer.
        processes: 1: encode in this process, on the tokenizer's own threads. More: encode in that
            many spawned processes, one thread each; at most two batches for each process are held
            in memory.

    Raises:
        UserError: (the yielded function) The model has no embedding for a token, or a worker
            process died.
    """
    if processes == 1:
        yield lambda documents: map(tokenizer.encode, text_batches(documents))
        return
    with (
        _worker_processes(tokenizer, processes) as idle,
        ThreadPoolExecutor(processes) as threads,
    ):
        yield lambda documents: _encode_in_order(
            text_batches(documents), tokenizer, idle, threads, max_pending=2 * processes
        )


def _encode_in_order(
    batches: Iterator[list[str]],
    tokenizer: Tokenizer,
    idle: queue.SimpleQueue[Connection],
    threads: ThreadPoolExecutor,
    max_pending: int,
) -> EncodedBatches:
    pending: collections.deque[Future] = collections.deque()

    def submit(count: int) -> None:
        for texts in itertools.islice(batches, count):
            pending.append(threads.submit(_encode_remotely, idle, texts))

    try:
        submit(max_pending)
        while pending:
            tokens, lengths = pending.popleft().result()
            submit(1)
            yield tokenizer.check_ids(tokens), lengths
    finally:
        for future in pending:
            future.cancel()


def text_batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Yield lists of documents, bounded by `BATCH_DOCUMENTS` and `BATCH_CHARACTERS`."""
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text)
        if len(texts) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


@contextlib.contextmanager
def _worker_processes(
    tokenizer: Tokenizer, processes: int
) -> Iterator[queue.SimpleQueue[Connection]]:
    """Start worker processes and yield a queue with a connection to each of them.

    They end with the block, and also when this process is killed.
    """
    # A forked process would inherit locked threads of the tokenizer and of Arrow.
    context = get_context("spawn")
    idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
    started = []
    try:
        for _ in range(processes):
            parent_end, child_end = context.Pipe()
            process = context.Process(
                target=_worker_main,
                args=(EndWithParent(), child_end, tokenizer.encoder.to_str(), tokenizer.eos_id),
                daemon=True,
            )
            process.start()
            # Closed here, so that `parent_end` reports the end of the file if the worker dies.
            child_end.close()
            started.append((process, parent_end))
            idle.put(parent_end)
        yield idle
    finally:
        for process, parent_end in started:
            process.terminate()
            process.join()
            parent_end.close()


def _encode_remotely(
    idle: queue.SimpleQueue[Connection], texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Encode a batch in one of the idle processes. Runs on a thread that only waits for it."""
    connection = idle.get()
    try:
        connection.send(texts)
        return connection.recv()
    except (EOFError, OSError) as error:
        raise UserError(
            "A tokenizing process died (the system may have killed it because memory ran out); "
            "start again with fewer processes."
        ) from error
    finally:
        idle.put(connection)


def _worker_main(_: EndWithParent, connection: Connection, encoder_state: str, eos_id: int) -> None:
    """Encode the batches that arrive, until the parent process closes the connection."""
    # The processes provide the parallelism; threads in each of them would compete for the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = encoder_from_state(encoder_state)
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):  # The parent has gone.
        while True:
            connection.send(encode_documents(encoder, eos_id, connection.recv()))
