"""Streams give the sequences of a plain loop, for any ranks, processes, restarts and faults."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from peft_pretraining.data import streaming
from peft_pretraining.data.dataset import load_data
from peft_pretraining.data.loader import merge_positions, training_batches
from peft_pretraining.data.sources import files, shards
from peft_pretraining.data.sources.files import FileDocuments
from peft_pretraining.data.sources.split import FilteredDocuments
from peft_pretraining.data.streaming import StreamedSequences
from peft_pretraining.errors import UserError

LENGTH, TOTAL = 8, 16
EOS, PAD = 1, 0


@dataclasses.dataclass
class Letters:
    """A tokenizer of one id a character; quick to start in a new process."""

    eos_id: int = EOS
    pad_id: int = PAD

    def encode(self, texts):
        documents = [[*map(ord, text), EOS] for text in texts]
        tokens = np.array(list(itertools.chain.from_iterable(documents)), np.int32)
        return tokens, np.array(list(map(len, documents)), np.int64)


@dataclasses.dataclass
class Lists:
    """Shards held in memory.

    `opened` notes what is opened; `failures` are raised before a document, each once: (shard,
    document).
    """

    texts: list[list[str]]
    failures: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    remote: bool = False
    opened: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    @property
    def n_shards(self):
        return len(self.texts)

    def read(self, shard, skip):
        self.opened.append((shard, skip))
        for number, text in enumerate(self.texts[shard]):
            if (shard, number) in self.failures:
                self.failures.remove((shard, number))
                raise ConnectionError("the line is down")
            if number >= skip:
                yield text


def texts(sizes):
    """Shards of so many documents, all different and between 3 and 23 characters long."""
    return [
        [f"{shard}.{i}" + "abcdefg"[: i % 7] * (i % 3) for i in range(size)]
        for shard, size in enumerate(sizes)
    ]


# Eight lanes that end at different times; of those with two shards, one's first and one's second
# shard is empty.
FEW = texts([7, 30, 9, 0, 12, 8, 2, 25, 5, 11, 0, 3])


def plain_lane(documents, lane, lanes, passes=100):
    return [text for shard in documents[lane::lanes] for text in shard] * passes


def plain_row(text):
    ids = [*map(ord, text[: LENGTH - 1]), EOS]
    return ids + [PAD] * (LENGTH - len(ids)), ids + [-100] * (LENGTH - len(ids))


def plain_rows(documents, lanes, packing, steps, total=TOTAL):
    """Return all sequences in order, computed from the definition of the substreams."""
    every = []
    for lane in range(lanes):
        lane_texts = plain_lane(documents, lane, lanes)
        if packing:
            ids = [token for text in lane_texts for token in [*map(ord, text), EOS]]
            windows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
            every.append([(window, window) for window in windows])
        else:
            every.append([plain_row(text) for text in lane_texts])
    return in_turn(every, steps, total)


def in_turn(lanes, steps, total):
    """The rows of all lanes in the order of the global batches."""
    each = total // len(lanes)
    return [
        row
        for step in range(steps)
        for rows in lanes
        for row in rows[step * each : (step + 1) * each]
    ]


def run(
    rows, steps, world_size=1, batch_size=None, workers=0, position=None, total=TOTAL, **changes
):
    """Return the sequences of `steps` updates from all ranks, and their positions."""
    ranks = []
    for rank in range(world_size):
        cut = {
            "total_batch_size": total,
            "batch_size": batch_size or total // world_size,
            "rank": rank,
            "world_size": world_size,
        }
        batches = training_batches(
            rows, seed=0, position=position, workers=workers, **cut, **changes
        )
        ranks.append(list(itertools.islice(batches, steps)))
    found, positions = [], []
    for step in zip(*ranks, strict=True):
        seen = position["rows"] if position else 0
        assert np.concatenate([part.indices for part in step]).tolist() == list(
            range(seen + len(found), seen + len(found) + total)
        )
        for batch in itertools.chain.from_iterable(part.micro_batches for part in step):
            assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
            found += zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        positions.append(json.loads(json.dumps(merge_positions([part.position for part in step]))))
    return found, positions


def sha256_file(rows):
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture
def simulated_workers(monkeypatch):
    """Shares read in this process one after another, as torch deals out what its processes read."""

    def read_in_workers(dataset, workers):
        items = [dataset.worker_items(index) for index in range(workers)]
        for item in itertools.cycle(items):
            yield next(item)

    monkeypatch.setattr(streaming, "_read_in_workers", read_in_workers)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "sizes, total, lanes",
    [
        ([9] * 10, 16, 8),
        ([40], 16, 1),
        ([5, 6, 7], 16, 2),
        ([3] * 9, 9, 9),
        ([4] * 70, 192, 64),
        ([9] * 70, 130, 26),
    ],
)
def test_global_batches_are_those_of_a_plain_loop(packing, sizes, total, lanes):
    rows = StreamedSequences(Lists(texts(sizes)), Letters(), LENGTH, packing)
    assert rows.substream_count(total) == lanes
    assert run(rows, 6, total=total)[0] == plain_rows(texts(sizes), lanes, packing, 6, total)


@pytest.mark.parametrize("packing", [False, True])
def test_order_is_the_same_for_all_ranks_and_workers_straight_and_resumed(
    simulated_workers, packing
):
    rows = StreamedSequences(Lists(FEW), Letters(), LENGTH, packing)
    expected = plain_rows(FEW, 8, packing, 50)
    hashes, at_20 = set(), []
    for world_size, workers in itertools.product((1, 2, 4), (0, 2, 8)):
        found, positions = run(rows, 50, world_size, 4, workers)
        assert found == expected
        at_20.append(positions[19])
        hashes.add(sha256_file(found))
    assert (
        all(position == at_20[0] for position in at_20)
        and len({passes for *_, passes in at_20[0]["lanes"].values()}) > 2
    )
    for world_size, workers in itertools.product((1, 2, 4), (0, 2, 8)):
        found, positions = run(rows, 30, world_size, 2, workers, at_20[0])
        hashes.add(sha256_file(expected[: 20 * TOTAL] + found))
    assert len(hashes) == 1


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("world_size", [1, 16])  # 16: every lane is shared by two ranks
def test_resumed_at_every_step(packing, world_size):
    rows = StreamedSequences(Lists(FEW), Letters(), LENGTH, packing)
    expected = plain_rows(FEW, 8, packing, 23)
    found, positions = run(rows, 20, world_size)
    assert found == expected[: 20 * TOTAL]
    for done, position in enumerate(positions, 1):
        assert position["rows"] == done * TOTAL
        assert (
            run(rows, 3, 17 - world_size, position=position)[0]
            == expected[done * TOTAL : (done + 3) * TOTAL]
        )


def not_dull(text):
    return not text.endswith("c")


def test_what_is_filtered_out_does_not_move_the_position():
    kept = [list(filter(not_dull, texts)) for texts in FEW]
    assert 0 < sum(map(len, kept)) < sum(map(len, FEW))
    rows = StreamedSequences(FilteredDocuments(Lists(FEW), not_dull), Letters(), LENGTH)
    expected = plain_rows(kept, 8, False, 10)
    found, positions = run(rows, 10)
    assert found == expected
    for done, position in enumerate(positions[:-1], 1):
        assert run(rows, 1, position=position)[0] == expected[done * TOTAL : (done + 1) * TOTAL]


def test_resumed_with_another_batch_size_that_makes_as_many_lanes():
    rows = StreamedSequences(Lists(FEW), Letters(), LENGTH)
    _, positions = run(rows, 3)
    found, _ = run(rows, 2, position=positions[-1], total=32)
    assert found == in_turn(
        [[plain_row(text) for text in plain_lane(FEW, lane, 8)[6:14]] for lane in range(8)], 2, 32
    )


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_worker_processes_straight_and_resumed_elsewhere(packing):
    rows = StreamedSequences(Lists(FEW), Letters(), LENGTH, packing)
    expected = plain_rows(FEW, 8, packing, 50)
    found, positions = run(rows, 20, 1 if packing else 2, 4, 2)
    assert found == expected[: 20 * TOTAL]
    found, _ = run(rows, 30, 1, 8, 8 if packing else 1, positions[-1])
    assert sha256_file(found) == sha256_file(expected[20 * TOTAL :])


def test_finished_shards_are_not_opened():
    documents = Lists(texts([4] * 12))
    rows = StreamedSequences(documents, Letters(), LENGTH)
    _, positions = run(
        rows, 12, total=4
    )  # four lanes of three shards, a row a step: each shard lasts four steps
    for done in range(1, 12):
        documents.opened.clear()
        run(rows, 1, total=4, position=positions[done - 1])
        assert documents.opened == [(lane + 4 * (done // 4), done % 4) for lane in range(4)]


def test_lanes_of_other_ranks_are_not_opened():
    documents = Lists(texts([8] * 12))
    cut = {"total_batch_size": 12, "batch_size": 6, "rank": 1, "world_size": 2}
    step = next(
        training_batches(
            StreamedSequences(documents, Letters(), LENGTH), seed=0, position=None, **cut
        )
    )
    assert documents.opened == [(lane, 0) for lane in range(6, 12)] and [
        *map(int, step.position["lanes"])
    ] == [6, 7, 8, 9, 10, 11]


def test_only_own_rows_are_tokenised(monkeypatch):
    seen = []
    encode = Letters.encode
    monkeypatch.setattr(
        Letters, "encode", lambda self, texts: seen.extend(texts) or encode(self, texts)
    )
    rows = StreamedSequences(Lists(texts([50])), Letters(), LENGTH)
    cut = {"total_batch_size": TOTAL, "batch_size": 4, "rank": 1, "world_size": 4}
    next(training_batches(rows, seed=0, position=None, **cut))
    assert seen == texts([50])[0][4:8]


def test_a_second_pass_is_announced_once(log):
    rows = StreamedSequences(Lists(texts([9, 9])), Letters(), LENGTH)
    _, positions = run(
        rows, 5, 2
    )  # six rows of a lane in three steps of two ranks: the second pass begins in the second step
    assert len(log) == 1 and "begins again: from here on data is seen more than once" in log[0]
    run(rows, 5, position=positions[-1])
    assert len(log) == 1
    run(rows, 1)
    assert len(log) == 1


@pytest.fixture
def log():
    from loguru import logger

    messages = []
    handler = logger.add(
        lambda message: messages.append(message.record["message"]), level="WARNING"
    )
    yield messages
    logger.remove(handler)


@pytest.mark.parametrize("packing", [False, True])
def test_max_passes_ends_a_stream_where_a_lane_ends(packing):
    documents = [
        ["abc"] * 12,
        ["abcdefg"] * 6,
    ]  # padded rows: 12 and 6 a pass; packed: 6 and 6 of 8 tokens
    rows = StreamedSequences(Lists(documents), Letters(), LENGTH, packing)
    for passes, updates in ((1, 3), (2, 6)):
        for workers, start in ((0, 0), (0, 2)):
            position = run(rows, start, total=4)[1][-1] if start else None
            cut = {
                "total_batch_size": 4,
                "batch_size": 2,
                "world_size": 1,
                "rank": 0,
                "workers": workers,
                "max_passes": passes,
            }
            batches = training_batches(rows, seed=0, position=position, **cut)
            assert len(list(itertools.islice(batches, updates - start))) == updates - start
            with pytest.raises(
                UserError,
                match=(
                    f"The training data ends after {updates} updates of 4 sequences; "
                    ".*--max_passes out"
                ),
            ):
                next(batches)


def test_positions_that_do_not_fit():
    rows = StreamedSequences(Lists(FEW), Letters(), LENGTH)
    _, positions = run(rows, 1)
    with pytest.raises(
        UserError,
        match=(
            "was read in 8 substreams, --total_batch_size 4 makes 4; give the --total_batch_size "
            "it was"
        ),
    ):
        run(rows, 1, position=positions[0], total=4)
    with pytest.raises(UserError, match="not one of a stream; .* without --stream"):
        run(rows, 1, position={"rows": 16})


def test_a_lane_without_documents():
    for sizes in ([0], [3, 0, 3]):
        rows = StreamedSequences(Lists(texts(sizes)), Letters(), LENGTH)
        with pytest.raises(
            UserError,
            match=(
                "Substream . of . of the training stream, which has . of its . shards, contains no "
                "document; .*--stream out"
            ),
        ):
            run(rows, 2, total=6)
    empty_at_the_end = StreamedSequences(
        Lists(texts([3, 0])), Letters(), LENGTH
    )  # one lane, taken up behind its last document
    _, positions = run(empty_at_the_end, 1, total=3)
    assert run(empty_at_the_end, 1, total=3, position=positions[0])[0] == plain_rows(
        texts([3, 0]), 1, False, 1, 3
    )


# -------------------------------------------------------------------------------------- the network


@pytest.fixture
def pauses(monkeypatch):
    taken = []
    monkeypatch.setattr(shards.time, "sleep", taken.append)
    return taken


@pytest.mark.parametrize("packing", [False, True])
def test_what_the_network_breaks_off_is_read_on(packing, pauses, log):
    failures = [(0, 0), (1, 3), (1, 4), (7, 24), (4, 11)]
    documents = Lists(FEW, list(failures), remote=True)
    found, _ = run(StreamedSequences(documents, Letters(), LENGTH, packing), 12, 2)
    assert found == plain_rows(FEW, 8, packing, 12)
    assert not documents.failures and pauses == [1] * 5  # a document in between resets the pause
    assert any(
        "broke off at document 4 of shard 1 (the line is down): trying again in 1 s" in line
        for line in log
    )
    assert documents.opened.count((1, 4)) == 1


def test_a_network_that_stays_away(pauses, log):
    assert 9 * 60 < sum(shards.RETRY_DELAYS) < 11 * 60 and max(shards.RETRY_DELAYS) == 60
    documents = Lists([["a", "b"]], [(0, 1)] * 16, remote=True)
    reading = shards.read_with_retries(documents, 0)
    assert next(reading) == "a"
    with pytest.raises(
        UserError,
        match=(
            r"did not give document 1 of shard 0 of the data in 10 minutes of trying \(the line is "
            r"down\)"
        ),
    ):
        next(reading)
    assert pauses == [1, 2, 4, 8, 16, 32, *[60] * 9] and len(log) == 15
    documents = Lists([["a", "b"]], [(0, 1)] * 3, remote=True)
    assert list(shards.read_with_retries(documents, 0, delays=(1, 1, 1))) == ["a", "b"]
    documents = Lists([["a", "b"]], [(0, 1)] * 3, remote=True)
    with pytest.raises(UserError):
        list(shards.read_with_retries(documents, 0, delays=(1, 1)))


def test_only_the_network_is_waited_for(pauses):
    with pytest.raises(ConnectionError):
        list(shards.read_with_retries(Lists([["a"]], [(0, 0)], remote=False), 0))

    class Broken(Lists):
        def read(self, shard, skip):
            raise KeyError("text")

    with pytest.raises(KeyError):
        list(shards.read_with_retries(Broken([["a"]], remote=True), 0))
    assert (
        not pauses
        and FilteredDocuments(Lists([], remote=True), bool).remote
        and not FilteredDocuments(Lists([]), bool).remote
    )


def test_what_the_hubs_libraries_raise_is_the_networks(pauses):
    import httpx
    import huggingface_hub.errors
    import requests

    errors = [
        httpx.ReadTimeout("x"),
        requests.ConnectionError("x"),
        TimeoutError("x"),
        EOFError(),
        OSError("x"),
    ]
    errors.append(
        huggingface_hub.errors.HfHubHTTPError(
            "503", response=httpx.Response(503, request=httpx.Request("GET", "http://x"))
        )
    )

    class Down(Lists):
        def read(self, shard, skip):
            if errors:
                raise errors.pop()
            return iter(["a"])

    assert (
        list(shards.read_with_retries(Down([["a"]], remote=True), 0)) == ["a"] and len(pauses) == 6
    )


@dataclasses.dataclass
class Deadly(Lists):
    """Kills the process that reads it once a file is there."""

    sign: str = ""

    def read(self, shard, skip):
        yield from self.texts[shard]
        while not os.path.exists(self.sign):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_the_users_one_sentence(tmp_path):
    handler = signal.getsignal(signal.SIGCHLD)
    rows = StreamedSequences(Deadly(texts([2]), sign=str(tmp_path / "sign")), Letters(), LENGTH)
    cut = {"total_batch_size": 1, "batch_size": 1, "rank": 0, "world_size": 1}
    batches = training_batches(rows, seed=0, position=None, workers=1, **cut)
    next(batches)
    (tmp_path / "sign").touch()
    while (
        multiprocessing.active_children()
    ):  # it dies while this process is at something else, which goes on undisturbed
        time.sleep(0.01)
    with pytest.raises(
        UserError,
        match=(
            r"^A process that reads the training stream was killed .*; give fewer "
            r"--workers[^\n]*\.$"
        ),
    ):
        next(batches)
    assert signal.getsignal(signal.SIGCHLD) == handler


# -------------------------------------------------------------------------------------- local files

DOCUMENTS = [
    f"document {i}: " + "naïve 東京 " * (i * 7 % 11) + "x" * (i % 5 * 40) for i in range(120)
]


def write(path, documents):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
        return path
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    plain = ".txt" in path.name
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(
            "\n\n".join(documents)
            if plain
            else "".join(json.dumps({"text": text}) + "\n" for text in documents)
        )
    return path


@pytest.mark.parametrize("count", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_pieces_of_a_file_give_each_line_once(tmp_path, monkeypatch, ending, count):
    path = tmp_path / "a.jsonl"
    lines = [
        json.dumps({"text": text}, ensure_ascii=False)
        for text in [DOCUMENTS[0], "", *DOCUMENTS[1:], "long " * 2000, "last"]
    ]
    path.write_bytes(b"\xef\xbb\xbf" + ending.join(lines).encode())
    whole = list(FileDocuments((path,)))
    monkeypatch.setattr(files, "SHARD_BYTES", -(-path.stat().st_size // count))
    documents = FileDocuments((path,))
    assert documents.n_shards == {1: 1, 2: 2, 3: 4, 8: 8, 50: 64}[count]
    pieces = [list(documents.read(shard, 0)) for shard in range(documents.n_shards)]
    assert sum(pieces, []) == whole and len(whole) == 122
    for shard, piece in enumerate(pieces):
        for skip in (1, len(piece), len(piece) + 1):
            assert list(documents.read(shard, skip)) == piece[skip:]


def test_pieces_begin_exactly_at_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a", "bb", "c"])
    size = path.stat().st_size
    for cut in range(size + 1):
        both = [list(files.read_file(path, part)) for part in ((0, cut), (cut, size))]
        assert sum(both, []) == ["a", "bb", "c"] and len(both[0]) == sum(
            start < cut for start in (0, 14, 29)
        )


def test_a_bad_record_in_a_piece_names_the_line_of_the_file(tmp_path):
    path = write(tmp_path / "a.jsonl", DOCUMENTS)
    with path.open("a") as file:
        file.write("{broken\n")
    size = path.stat().st_size
    with pytest.raises(UserError, match="a.jsonl, line 121: not valid JSON .*a line.$"):
        list(files.read_file(path, (size // 2, size)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.xz", "a.parquet"])
def test_local_files_streamed_hold_the_documents_of_the_other_route(tmp_path, monkeypatch, name):
    path = write(tmp_path / name, [f"{text} number {i}" for i, text in enumerate(DOCUMENTS * 5)])
    monkeypatch.setattr(files, "SHARD_BYTES", 20_000)
    arguments = dict(
        dataset=str(path),
        tokenizer="bpe",
        vocab_size=300,
        max_length=64,
        seed=0,
        target_eval_tokens=None,
        cache_dir=tmp_path,
    )
    prepared, streamed = load_data(**arguments), load_data(**arguments, stream=True)
    assert streamed.fingerprint == prepared.fingerprint and ", streamed;" in streamed.description
    a, b = (
        rows.batch(np.arange(len(rows)))["labels"]
        for rows in (prepared.validation, streamed.validation)
    )
    assert torch.equal(a, b) and len(a) > 1

    documents = streamed.train.documents
    pieces = [list(documents.read(shard, 0)) for shard in range(documents.n_shards)]
    assert sum(pieces, []) == list(documents) and (len(pieces) > 1) == (name == "a.jsonl")
    batch = prepared.train.batch(np.arange(len(prepared.train)))
    whole = list(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    assert ends[-1] == len(whole) > 500
    lanes = streamed.train.substream_count(TOTAL)
    of_shards = [whole[start:stop] for start, stop in itertools.pairwise(ends)]
    in_lanes = [
        2 * list(itertools.chain.from_iterable(of_shards[lane::lanes])) for lane in range(lanes)
    ]
    steps = len(min(in_lanes, key=len)) * lanes // TOTAL
    assert run(streamed.train, steps)[0] == in_turn(in_lanes, steps, TOTAL)
