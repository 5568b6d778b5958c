"""Prepared data: equal to a plain loop, the same bytes on every machine, damage is detected."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

from peft_pretraining import prepare_data
from peft_pretraining.cli.main import run_script
from peft_pretraining.data import tokenizer_pool as encoding
from peft_pretraining.data.dataset import load_data
from peft_pretraining.data.sequences import tokenize_documents
from peft_pretraining.data.sources.base import Source
from peft_pretraining.data.sources.registry import open_source
from peft_pretraining.data.sources.split import Split, split_documents
from peft_pretraining.data.tokenized import reader as prepared
from peft_pretraining.data.tokenized.reader import open_prepared
from peft_pretraining.data.tokenized.writer import prepare
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.errors import UserError

LENGTH, SHARD_TOKENS = 16, 4000
WORDS = [f"w{i * i % 97}" for i in range(60)]


def text(i):
    rng = random.Random(i)
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 3, 20, 60]))) + f" {i}"


# An empty document now and then, which is dropped, and one that spells special tokens, which are
# plain text.
TRAIN = [text(i) if i % 11 else "" for i in range(399)] + ["</s> <pad>"]
HELD_OUT = [text(1000 + i) for i in range(40)]


def source_of(train=TRAIN, stamp=(("corpus", 1, 1),)):
    return Source("corpus", train, HELD_OUT, False, (("corpus", 1),), stamp), Split(
        train, HELD_OUT, ("own",)
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("bpe", 300, TRAIN, tmp_path_factory.mktemp("cache"), "prepared")


def make(folder, tokenizer, source=None, **settings):
    return prepare(
        *(source or source_of()), tokenizer, folder, **({"shard_tokens": SHARD_TOKENS} | settings)
    )


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    """A finished folder, never changed."""
    folder = tmp_path_factory.mktemp("whole") / "data"
    make(folder, tokenizer)
    return folder


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def shard_names(folder, split="train"):
    return [record["name"] for record in open_prepared(folder).index["splits"][split]]


# ---------------------------------------------------------------------------------- the plain twins


def plain_shards(tokenizer, texts, shard_tokens=SHARD_TOKENS, max_tokens=None):
    """The ids of the documents of each shard, document by document."""
    shards, held, total = [[]], 0, 0
    for document in texts:
        ids = tokenizer.encoder.encode(document, add_special_tokens=False).ids + [tokenizer.eos_id]
        if max_tokens is not None and total + len(ids) > max_tokens:
            break
        if len(ids) == 1:
            continue
        if held >= shard_tokens:
            shards.append([])
            held = 0
        shards[-1].append(ids)
        held += len(ids)
        total += len(ids)
    return shards


def plain_padded(tokenizer, shards):
    rows = []
    for ids in (ids for shard in shards for ids in shard):
        ids = ids[: LENGTH - 1] + [tokenizer.eos_id] if len(ids) > LENGTH else ids
        padding = LENGTH - len(ids)
        rows.append((ids + [tokenizer.pad_id] * padding, ids + [-100] * padding))
    return rows


def plain_packed(tokenizer, shards):
    joined = [[token for ids in shard for token in ids] for shard in shards]
    windows = [
        tokens[i : i + LENGTH]
        for tokens in joined
        for i in range(0, len(tokens) - LENGTH + 1, LENGTH)
    ]
    return [(window, window) for window in windows]


PLAIN = {False: plain_padded, True: plain_packed}


def rows_of(rows, indices=None):
    batch = rows.batch(np.arange(len(rows)) if indices is None else indices)
    return list(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("packing", [False, True])
def test_rows_over_shards_are_those_of_a_plain_loop(whole, tokenizer, packing):
    shards = plain_shards(tokenizer, TRAIN)
    assert len(shards) == len(shard_names(whole)) > 3
    expected = PLAIN[packing](tokenizer, shards)
    rows = open_prepared(whole).sequences("train", LENGTH, packing)
    assert len(rows) == len(expected) and rows_of(rows) == expected
    chosen = np.random.default_rng(0).integers(0, len(rows), 200)
    assert rows_of(rows, chosen) == [expected[i] for i in chosen]


@pytest.mark.parametrize("packing", [False, True])
def test_lengths_targets_and_head(whole, tokenizer, packing):
    expected = PLAIN[packing](tokenizer, plain_shards(tokenizer, HELD_OUT))
    targets = [sum(label != -100 for label in labels) - 1 for _, labels in expected]
    rows = open_prepared(whole).sequences("validation", LENGTH, packing)
    assert (rows.lengths - 1).tolist() == targets and rows.target_tokens == sum(targets)
    for wanted in (1, targets[0], targets[0] + 1, 100, sum(targets), sum(targets) + 1, None):
        least = next(
            (
                n
                for n in range(1, len(targets))
                if wanted is not None and sum(targets[:n]) >= wanted
            ),
            len(targets),
        )
        in_memory = tokenize_documents(HELD_OUT, tokenizer, LENGTH, wanted, packing)
        assert rows_of(rows.head(wanted)) == rows_of(in_memory) == expected[:least]


def test_files_hold_what_the_format_says(whole, tokenizer):
    for name, documents in zip(shard_names(whole), plain_shards(tokenizer, TRAIN), strict=True):
        tokens = np.concatenate(documents).astype("<u2").tobytes()
        assert (whole / f"{name}.tokens").read_bytes() == tokens
        offsets = np.array([sum(map(len, documents[:i])) for i in range(len(documents) + 1)])
        assert (whole / f"{name}.offsets").read_bytes() == offsets.astype("<i8").tobytes()
        blocks = [zlib.crc32(tokens[i : i + 2048]) for i in range(0, len(tokens), 2048)]
        assert (whole / f"{name}.crc").read_bytes() == np.array(blocks, "<u4").tobytes()


def test_large_vocabularies_have_wider_tokens(tokenizer, tmp_path):
    import dataclasses

    wide = dataclasses.replace(tokenizer, vocab_size=2**16 + 1)
    make(tmp_path / "wide", wide)
    assert rows_of(open_prepared(tmp_path / "wide").sequences("train", LENGTH)) == plain_padded(
        tokenizer, plain_shards(tokenizer, TRAIN)
    )
    assert open_prepared(tmp_path / "wide").index["dtype"] == "<i4"


def test_tokenizer_of_the_folder(whole, tokenizer):
    found = open_prepared(whole).tokenizer(301)
    assert (found.name, found.content_hash, found.vocab_size) == (
        "bpe",
        tokenizer.content_hash,
        301,
    )
    with pytest.raises(
        UserError,
        match=(
            "prepared for a vocab_size of 300, the model's is 299; give a model config with 300 or "
            "more"
        ),
    ):
        open_prepared(whole).tokenizer(299)


# ------------------------------------------------------------------------------------------ writing


def test_any_number_of_processes_makes_the_same_bytes(whole, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        encoding, "BATCH_DOCUMENTS", 17
    )  # so that the processes have many batches to mix up
    make(tmp_path / "three", tokenizer, processes=3)
    assert contents(tmp_path / "three") == contents(whole)
    assert not multiprocessing.active_children()


def test_an_encoding_process_that_dies(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 1)
    with encoding.document_encoder(tokenizer, 2) as encode:
        batches = encode(TRAIN * 10)
        next(batches)
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(
            UserError, match="A tokenizing process died .* start again with fewer processes"
        ):
            list(batches)


@pytest.mark.parametrize("max_tokens", [30, 3999, 4100, 9000, 10**9])
def test_max_tokens_cuts_at_a_document(tokenizer, tmp_path, max_tokens):
    make(tmp_path / "data", tokenizer, max_tokens=max_tokens)
    shards = plain_shards(tokenizer, TRAIN, max_tokens=max_tokens)
    assert rows_of(open_prepared(tmp_path / "data").sequences("train", LENGTH)) == plain_padded(
        tokenizer, shards
    )
    assert sum(map(len, sum(shards, []))) <= max_tokens
    # Begun again without its index and last shard, it ends at the same document.
    before = contents(tmp_path / "data")
    for name in ("index.json", f"{shard_names(tmp_path / 'data')[-1]}.tokens"):
        (tmp_path / "data" / name).unlink()
    make(tmp_path / "data", tokenizer, max_tokens=max_tokens)
    assert contents(tmp_path / "data") == before


def test_target_eval_tokens_keeps_the_fewest_documents(tokenizer, tmp_path):
    lengths = [len(ids) for ids in plain_shards(tokenizer, HELD_OUT, 10**9)[0]]
    for wanted in (1, 500, 10**9):
        make(tmp_path / str(wanted), tokenizer, target_eval_tokens=wanted)
        least = next(
            (
                n
                for n in range(1, 40)
                if sum(min(length, 256) - 1 for length in lengths[:n]) >= wanted
            ),
            40,
        )
        assert len(open_prepared(tmp_path / str(wanted)).sequences("validation", 256)) == least


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from peft_pretraining.data.tokenized import writer as prepared
os.environ["TOKENIZERS_PARALLELISM"] = "false"
source, tokenizer, folder, moments = pickle.load(open(sys.argv[1], "rb"))
replace = os.replace
def stop(when, moment):
    '''Kills this process when file number `moment` is renamed: before, during or after it.'''
    names = []
    def replace_or_die(temporary, path):
        names.append(path)
        if len(names) == moment:
            if when == "half":
                os.truncate(temporary, os.path.getsize(temporary) // 2)
            if when == "after":
                replace(temporary, path)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(temporary, path)
    os.replace = replace_or_die
for moment in range(1, moments + 1):
    when = ("before", "half", "after")[moment % 3]
    if os.fork() == 0:
        stop(when, moment)
        prepared.prepare(*source, tokenizer, Path(folder) / f"{when}{moment}", shard_tokens=4000)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(whole, tokenizer, tmp_path):
    import pickle

    moments = 2 + 4 * len(
        shard_names(whole) + shard_names(whole, "validation")
    )  # each file that is written, but for the tokenizer's
    with open(tmp_path / "input", "wb") as file:
        pickle.dump((source_of(), tokenizer, str(tmp_path), moments), file)
    subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "input"],
        check=True,
        timeout=120,
        stderr=subprocess.DEVNULL,
    )
    expected = contents(whole)
    killed = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(killed) == moments
    for folder in killed:
        if folder.name != f"after{moments}":
            with pytest.raises(
                UserError, match="is not prepared to its end .* run the prepare command again"
            ):
                open_prepared(folder)
        make(folder, tokenizer)
        assert contents(folder) == expected, folder


@pytest.mark.slow
def test_killed_with_its_processes_by_the_command(tmp_path, monkeypatch):
    """From outside, in the midst of it: the processes go too, and the same command ends it."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(
        "".join(
            json.dumps({"text": document}) + "\n"
            for document in (TRAIN + HELD_OUT) * 10
            if document
        )
    )
    line = [
        sys.executable,
        "-m",
        "peft_pretraining.prepare_data",
        "--dataset",
        corpus,
        "--tokenizer",
        "bpe",
        "--vocab_size",
        "300",
    ]
    line += ["--shard_tokens", "5K", "--output"]
    monkeypatch.setenv("ALPHADECAY_CACHE", str(tmp_path / "cache"))
    first = subprocess.Popen(
        [*line, tmp_path / "killed", "--processes", "2"],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "killed/train-00002.json").exists():
        assert first.poll() is None, "ended before it could be killed"
        time.sleep(0.002)
    first.kill()
    first.wait()
    assert not (tmp_path / "killed/index.json").exists()
    done = subprocess.run([*line, tmp_path / "killed"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "tokens/s)" in done.stdout and "MB" in done.stdout and done.stdout.count("\n") == 1
    assert command(monkeypatch, *line[3:], tmp_path / "straight") == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    deadline = time.monotonic() + 20
    with pytest.raises(
        ProcessLookupError
    ):  # of the group that the killed command led, nobody is left
        while time.monotonic() < deadline:
            os.killpg(first.pid, 0)
            time.sleep(0.05)


def test_a_second_process_waits_and_finds_all_done(whole, tokenizer, tmp_path):
    import fcntl

    from loguru import logger

    messages = []
    handler = logger.add(lambda message: messages.append(message.record["message"]))
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        threads = [
            threading.Thread(target=make, args=(tmp_path / "data", tokenizer)) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 20
        while (
            sum("Waiting for another process" in message for message in messages) < 2
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        assert os.listdir(tmp_path / "data") == [".lock"]
    for thread in threads:
        thread.join()
    logger.remove(handler)
    assert contents(tmp_path / "data") == contents(whole)
    assert sum(message.startswith("Tokenizing the train documents") for message in messages) == 1


def test_what_is_whole_is_not_made_again(whole, tokenizer, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    unreadable = (
        Source("corpus", None, None, False, (("corpus", 1),), (("corpus", 1, 1),)),
        Split(None, None, ("own",)),
    )
    assert make(tmp_path / "data", tokenizer, unreadable) == 0
    for name in shard_names(whole)[1:5:2]:  # a whole one lies between the two
        flip(tmp_path / "data" / f"{name}.tokens")
    seen = []
    spied = source_of()[0], Split(Spy(TRAIN, seen), None, ("own",))
    shards = plain_shards(tokenizer, TRAIN)[1:5:2]
    assert make(tmp_path / "data", tokenizer, spied) == sum(
        len(ids) for shard in shards for ids in shard
    )
    assert contents(tmp_path / "data") == contents(whole)
    assert seen == TRAIN * 2  # a pass for each, whose beginning is skipped, not tokenised


class Spy:
    def __init__(self, documents, seen):
        self.documents, self.seen = documents, seen

    def __iter__(self):
        for document in self.documents:
            self.seen.append(document)
            yield document


# ----------------------------------------------------------------------------------------- messages


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (
            "train-00001.tokens",
            flip,
            r"train-00001.tokens is damaged \(tokens from [\d,]+ on are not as they were written\)",
        ),
        (
            "train-00001.tokens",
            lambda p: p.write_bytes(p.read_bytes()[:-2]),
            r"train-00001.tokens is damaged \(it has [\d,]+ bytes instead",
        ),
        ("train-00001.tokens", Path.unlink, r"train-00001.tokens is damaged \(it is missing\)"),
        (
            "train-00001.offsets",
            flip,
            r"train-00001.offsets is damaged \(it is not the file that was written\)",
        ),
        (
            "train-00001.crc",
            flip,
            r"train-00001.crc is damaged \(it is not the file that was written\)",
        ),
        (
            "tokenizer/tokenizer.json",
            flip,
            r"tokenizer.json is damaged \(it is not the file that was written\)",
        ),
        (
            "tokenizer/tokenizer.json",
            Path.unlink,
            r"tokenizer.json is damaged \(it is not the file that was written\)",
        ),
        ("index.json", lambda p: p.write_text("{"), r"index.json is damaged \(it cannot be read\)"),
        (
            "index.json",
            lambda p: p.write_text(p.read_text().replace('"own"', '"hash"')),
            "index.json is damaged .its content is not",
        ),
    ],
)
def test_damage_names_the_file_and_the_remedy_helps(
    whole, tokenizer, tmp_path, name, damage, message
):
    shutil.copytree(whole, tmp_path / "data")
    damage(tmp_path / "data" / name)

    def read():
        data = load_data(str(tmp_path / "data"), None, 300, LENGTH, seed=0, target_eval_tokens=None)
        return rows_of(data.train) + rows_of(data.validation)

    with pytest.raises(
        UserError,
        match=message + ".*: run the prepare command again: it makes what is damaged anew.$",
    ):
        read()
    make(tmp_path / "data", tokenizer)
    assert contents(tmp_path / "data") == contents(whole)
    assert read() == plain_padded(
        tokenizer, plain_shards(tokenizer, TRAIN) + plain_shards(tokenizer, HELD_OUT)
    )


def refused(message):
    return pytest.raises(UserError, match=message)


def test_continuing_with_other_settings_is_refused(whole, tokenizer, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    other = load_tokenizer("bpe", 300, [document[::-1] for document in TRAIN], tmp_path, "reversed")
    for message, arguments in [
        ("another tokenizer: give another --output, or delete", {"tokenizer": other}),
        (
            "another state of the source's files: give",
            {"source": source_of(stamp=(("corpus", 1, 2),))},
        ),
        ("another shard_tokens, max_tokens: give", {"shard_tokens": 5000, "max_tokens": 7}),
    ]:
        with refused(f"data was begun with {message}"):
            make(tmp_path / "data", **({"tokenizer": tokenizer} | arguments))
    assert contents(tmp_path / "data") == contents(whole)
    (tmp_path / "data/preparation.json").write_text("[[")
    with refused(
        r"preparation.json is damaged \(it cannot be read\): delete .*data and start again"
    ):
        make(tmp_path / "data", tokenizer)
    (tmp_path / "data/preparation.json").unlink()  # the index knows as much
    make(tmp_path / "data", tokenizer)
    assert contents(tmp_path / "data") == contents(whole)


@pytest.mark.parametrize("before, after", [(3000, 9000), (9000, None), (4100, 8200)])
@pytest.mark.parametrize("killed", [False, True])
def test_a_raised_limit_goes_on_as_if_it_had_been_given_at_once(
    before, after, killed, tokenizer, tmp_path
):
    make(tmp_path / "at once", tokenizer, max_tokens=after)
    make(tmp_path / "raised", tokenizer, max_tokens=before)
    if killed:  # between two shards
        newest = shard_names(tmp_path / "raised")[-1]
        for path in (tmp_path / "raised").glob(f"{newest}*"):
            path.unlink()
        (tmp_path / "raised" / "index.json").unlink()
    make(tmp_path / "raised", tokenizer, max_tokens=after)
    assert contents(tmp_path / "raised") == contents(tmp_path / "at once")
    with refused("raised was begun with another max_tokens"):
        make(tmp_path / "raised", tokenizer, max_tokens=before)  # what is there is not cut


def test_folders_of_something_else_are_left_alone(tokenizer, tmp_path):
    (tmp_path / "precious.txt").write_text("work of years")
    with refused("holds files of something else: give an --output that is new or empty"):
        make(tmp_path, tokenizer)
    assert (tmp_path / "precious.txt").read_text() == "work of years"
    with refused("cannot be written .* fix that and start again"):
        make(tmp_path / "precious.txt" / "data", tokenizer)


def test_empty_sets(tokenizer, tmp_path):
    source, split = source_of(train=[""])
    with refused("Every training document of corpus is in the validation set too"):
        make(tmp_path / "a", tokenizer, (source, split))
    with refused("The validation set of corpus encodes to no tokens"):
        make(tmp_path / "b", tokenizer, (source, Split(TRAIN, [], ("own",))))
    with refused("--max_tokens 2 is less than the first training document of corpus; give more"):
        make(tmp_path / "c", tokenizer, max_tokens=2)


def test_format_of_another_version(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "FORMAT_VERSION", 99)
    with refused("has format 1, this version reads format 99; prepare the data anew"):
        open_prepared(whole)


# --------------------------------------------------------------------------------------------- fuzz


def garbage(rng, path):
    """A file as a bad disk, a full one, a half-finished copy or an editor leaves it."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    kind = rng.choice(
        [
            "flip",
            "flip",
            "flip",
            "flip",
            "zeros",
            "cut",
            "grow",
            "delete",
            "noise",
            "json",
            "deep",
            "swap",
        ]
    )
    if kind == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[at : at + 100] = bytes(len(data[at : at + 100]))
    elif kind == "cut":
        del data[at:]
    elif kind == "grow":
        data += rng.randbytes(rng.randrange(1, 50))
    elif kind == "noise":
        data = bytearray(rng.randbytes(len(data)))
    elif kind == "json":
        data = bytearray(
            rng.choice(
                [
                    b"null",
                    b"[]",
                    b"{}",
                    b'{"checksum": 1}',
                    b'"x"',
                    b"1e999",
                    b"\xff{}",
                    b'{"format": 1}',
                ]
            )
        )
    elif kind == "deep":
        data = bytearray(b"[" * 100_000)
    elif kind == "swap":
        data = bytearray(rng.choice(sorted(path.parent.glob("*" + path.suffix))).read_bytes())
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(data)


def damaged_copies(whole, folder, seed, cases, files):
    """Yield the damaged file and its old content, for each damage, and repair it afterwards."""
    shutil.copytree(whole, folder)
    rng = random.Random(seed)
    names = [name for name in contents(folder) if files(name) and (folder / name).stat().st_size]
    for _ in range(cases):
        path = folder / rng.choice(names)
        before = path.read_bytes()
        garbage(rng, path)
        yield path
        path.write_bytes(before)


@pytest.mark.slow
def test_fuzz_of_reading(whole, tokenizer, tmp_path):
    """Each of 1,000 damaged folders gives an error that names the file, or the right sequences."""
    expected = {}
    for packing in (False, True):
        for split, texts in (("train", TRAIN), ("validation", HELD_OUT)):
            rows = PLAIN[packing](tokenizer, plain_shards(tokenizer, texts))
            expected[split, packing] = (
                np.array([ids for ids, _ in rows]),
                np.array([labels for _, labels in rows]),
            )
    refusals = 0
    for path in damaged_copies(
        whole, tmp_path / "data", 0, 1000, lambda name: not name.startswith("tokenizer/")
    ):
        try:
            for (split, packing), (ids, labels) in expected.items():
                rows = open_prepared(path.parent).sequences(split, LENGTH, packing)
                batch = rows.batch(np.arange(len(rows)))
                assert np.array_equal(batch["input_ids"], ids) and np.array_equal(
                    batch["labels"], labels
                ), path
        except UserError as error:
            assert path.name in str(error) and "\n" not in str(error)
            refusals += 1
    assert 500 < refusals < 1000  # records and the journal are not needed for reading


def test_fuzz_of_the_stored_tokenizer(whole, tokenizer, tmp_path):
    for path in damaged_copies(
        whole, tmp_path / "data", 1, 100, lambda name: name.startswith("tokenizer/")
    ):
        with contextlib.suppress(UserError):
            assert (
                open_prepared(tmp_path / "data").tokenizer(300).content_hash
                == tokenizer.content_hash
            )
            assert path.read_bytes() == (whole / "tokenizer" / path.name).read_bytes()


@pytest.mark.slow
def test_fuzz_of_preparing_again(whole, tokenizer, tmp_path):
    """Preparing again repairs a damaged folder, or names the file that prevents it."""
    expected, refusals = contents(whole), 0
    for path in damaged_copies(whole, tmp_path / "data", 2, 150, lambda name: True):
        try:
            make(tmp_path / "data", tokenizer)
        except UserError as error:
            assert path.name == "preparation.json" in str(error)
            refusals += 1
        else:
            assert contents(tmp_path / "data") == expected, path
    assert 0 < refusals < 30


# ------------------------------------------------------------------------ the command and load_data


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("ALPHADECAY_CACHE", str(tmp_path / "cache"))
    for name, texts in (("corpus.jsonl", TRAIN), ("held_out.jsonl", HELD_OUT)):
        (tmp_path / name).write_text(
            "".join(json.dumps({"text": document}) + "\n" for document in texts)
        )
    return tmp_path


def command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["prepare_data", *map(str, arguments)])
    return run_script(prepare_data.main)


def load(dataset, tokenizer="bpe", vocab_size=300, **changes):
    return load_data(
        str(dataset),
        tokenizer,
        vocab_size,
        **({"max_length": LENGTH, "seed": 0, "target_eval_tokens": None} | changes),
    )


def test_command_and_cache_give_the_same_data(files, monkeypatch, capsys):
    base = [
        "--dataset",
        files / "corpus.jsonl",
        "--validation_file",
        files / "held_out.jsonl",
        "--tokenizer",
        "bpe",
    ]
    base += ["--vocab_size", 300, "--output", files / "out"]
    assert command(monkeypatch, *base) == 0
    assert (
        "(" in (line := capsys.readouterr().out)
        and line.startswith(f"{files}/out: 403 documents, ")
        and line.endswith(" MB\n")
    )
    assert command(monkeypatch, *base) == 0 and "(all there already)" in capsys.readouterr().out
    fingerprints = set()
    for packing in (False, True):
        implicit = load(
            files / "corpus.jsonl", validation_file=str(files / "held_out.jsonl"), packing=packing
        )
        explicit = load(files / "out", None, packing=packing)
        assert (
            explicit.fingerprint == implicit.fingerprint
            and explicit.description == implicit.description
        )
        for split in ("train", "validation"):
            assert rows_of(getattr(explicit, split)) == rows_of(getattr(implicit, split))
        fingerprints |= {
            explicit.fingerprint,
            load(files / "out", None, packing=packing, max_length=LENGTH + 1).fingerprint,
        }
    (cached,) = (files / "cache/prepared").iterdir()
    assert {name: data for name, data in contents(cached).items()} == contents(
        files / "out"
    )  # one format, the same bytes
    assert command(monkeypatch, *base, "--max_tokens", "2K", "--output", files / "less") == 0
    fingerprints.add(load(files / "less", None).fingerprint)
    assert len(fingerprints) == 5


def test_tokenizers_given_beside_a_prepared_folder(files, monkeypatch):
    base = [
        "--dataset",
        files / "corpus.jsonl",
        "--validation_file",
        files / "held_out.jsonl",
        "--vocab_size",
        300,
    ]
    assert command(monkeypatch, *base, "--tokenizer", "bpe", "--output", files / "out") == 0
    same = files / "out/tokenizer"
    assert (
        load(files / "out", "bpe").fingerprint
        == load(files / "out", str(same)).fingerprint
        == load(files / "out", None).fingerprint
    )
    load(files / "corpus.jsonl", vocab_size=299, validation_file=str(files / "held_out.jsonl"))
    (other,) = (files / "cache/tokenizers").glob("bpe-299-*")
    with refused(
        f"was prepared with the tokenizer bpe, not with --tokenizer {other}; leave --tokenizer out"
    ):
        load(files / "out", str(other))
    assert command(monkeypatch, *base, "--tokenizer", same, "--output", files / "named") == 0
    with refused("not with --tokenizer bpe; leave --tokenizer out"):
        load(files / "named", "bpe")
    with refused(
        "was prepared with its own validation set: give --validation_file to the prepare command"
    ):
        load(files / "out", None, validation_file="x")
    with refused("prepared for a vocab_size of 300, the model's is 299"):
        load(files / "out", None, vocab_size=299)
    with refused(
        r"The training set of .*corpus.jsonl has [\d,]+ tokens: too few for --packing; give a "
        r"--max_length up to that"
    ):
        load(files / "out", None, packing=True, max_length=10**6)


def test_damaged_or_unfinished_cache(files):
    arguments = {"validation_file": str(files / "held_out.jsonl")}
    expected = rows_of(load(files / "corpus.jsonl", **arguments).train)
    (cached,) = (files / "cache/prepared").iterdir()
    (cached / "index.json").unlink()  # as if it had been killed
    assert rows_of(load(files / "corpus.jsonl", **arguments).train) == expected
    (cached / "train-00000.crc").write_bytes(b"")
    with refused(
        f"train-00000.crc is damaged .it has 0 bytes instead of [0-9]+.: delete {cached} and "
        "start again.$"
    ):
        load(files / "corpus.jsonl", **arguments)
    shutil.rmtree(cached)
    assert rows_of(load(files / "corpus.jsonl", **arguments).train) == expected


def test_command_with_a_stream(files, monkeypatch):
    """C4's files in the order of the seed, bounded; both splits are stored."""
    import gzip

    (files / "c4/en").mkdir(parents=True)
    for i in range(3):
        with gzip.open(files / f"c4/en/c4-train.{i:05d}-of-00003.json.gz", "wt") as file:
            file.writelines(
                json.dumps({"text": f"shard {i} {document}"}) + "\n"
                for document in TRAIN[100 * i : 100 * i + 100]
            )
    with gzip.open(files / "c4/en/c4-validation.00000-of-00001.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in HELD_OUT)
    base = [
        "--dataset",
        files / "c4",
        "--tokenizer",
        "bpe",
        "--vocab_size",
        300,
        "--max_tokens",
        "3K",
        "--processes",
        1,
    ]
    found = []
    for seed in (1, 2):
        assert command(monkeypatch, *base, "--seed", seed, "--output", files / str(seed)) == 0
        data = load(files / str(seed), None)
        documents = split_documents(open_source(str(files / "c4"), seed)).train
        assert rows_of(data.train) == plain_padded(
            data.tokenizer, plain_shards(data.tokenizer, documents, max_tokens=3000)
        )
        assert rows_of(data.validation) == plain_padded(
            data.tokenizer, plain_shards(data.tokenizer, HELD_OUT)
        )
        found.append(data.fingerprint)
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            ["--dataset", "nowhere.jsonl"],
            "--dataset nowhere.jsonl: there is no such file or folder",
        ),
        (
            ["--model_config", "x.json"],
            "argument --model_config: not allowed with argument --vocab_size; see --help",
        ),
        (["--max_tokens", "many"], "'many' is not a number of tokens"),
        (["--processes", "0"], "--processes 0: it must be above 0"),
        (["--seed", "-1"], "--seed -1: it must be 0 or more"),
        (["--tokenizer", "nowhere"], "Tokenizer nowhere is neither a folder"),
    ],
)
def test_command_ends_in_one_sentence(files, monkeypatch, capsys, changes, message):
    base = [
        "--dataset",
        files / "corpus.jsonl",
        "--tokenizer",
        "bpe",
        "--vocab_size",
        300,
        "--output",
        files / "out",
    ]
    assert command(monkeypatch, *base, *changes) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert message in line
