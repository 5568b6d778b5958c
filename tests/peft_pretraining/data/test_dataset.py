"""Data sets and loaders.

A run reads the same sequences in the same order, however many ranks, micro-batches, workers and
restarts it has.
"""

import contextlib
import gzip
import itertools
import json

import pytest
import torch

from peft_pretraining.data.dataset import load_data
from peft_pretraining.data.loader import merge_positions, training_batches, validation_batches
from peft_pretraining.data.shuffle import ShuffledIndices
from peft_pretraining.data.sources import pydocs, split
from peft_pretraining.errors import UserError

LENGTH, TOTAL, STEPS = 12, 8, 5  # 40 positions over 30 documents: a second pass begins in step 3
TEXTS = [" ".join(f"w{i * j % 19}" for j in range(1 + i % 9)) + f" no {i}" for i in range(30)]
HELD_OUT = [f"held out {i} " + "and more " * (i % 5) for i in range(11)]


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train.jsonl", TEXTS)
    write(folder / "held_out.jsonl", HELD_OUT)
    for shard in range(3):
        write(
            folder / f"c4/en/c4-train.{shard:05d}-of-00003.json.gz",
            TEXTS[shard * 10 : shard * 10 + 10],
        )
    write(folder / "c4/en/c4-validation.00000-of-00001.json.gz", HELD_OUT)
    return folder


def load(folder, kind, **changes):
    arguments = {"seed": 1, "target_eval_tokens": None, "cache_dir": folder / "cache"}
    if kind == "rows":
        arguments |= {
            "dataset": str(folder / "train.jsonl"),
            "validation_file": str(folder / "held_out.jsonl"),
        }
    else:
        arguments |= {"dataset": str(folder / "c4")}
    return load_data(
        **({"tokenizer": "bpe", "vocab_size": 270, "max_length": LENGTH} | arguments | changes)
    )


def plain_row(tokenizer, text):
    ids = tokenizer.encoder.encode(text, add_special_tokens=False).ids[: LENGTH - 1] + [1]
    return ids + [0] * (LENGTH - len(ids)), ids + [-100] * (LENGTH - len(ids))


def plain_order(kind, data):
    """Return the text at every position, computed from the definition.

    Only the order of the documents comes from the code under test; test_shuffle.py tests it.
    """
    import numpy as np

    if kind == "stream":
        # Three shards and global batches of 8 give two substreams of 4 sequences each, which hold
        # 20 and 10 documents.
        shards = np.random.Generator(np.random.PCG64(1)).permutation(3)
        first, second = (
            [text for shard in shards[lane::2] for text in TEXTS[shard * 10 : shard * 10 + 10]] * 2
            for lane in (0, 1)
        )
        return [
            text
            for start in range(0, 20, 4)
            for lane in (first, second)
            for text in lane[start : start + 4]
        ]
    return [TEXTS[i] for i in ShuffledIndices(1, 30).indices(0, 60)]


def run(data, steps, batch_size, world_size, workers=0, position=None):
    """Return the sequences of `steps` updates, collected from all ranks, and their positions."""
    ranks = []
    for rank in range(world_size):
        cut = {
            "total_batch_size": TOTAL,
            "batch_size": batch_size,
            "rank": rank,
            "world_size": world_size,
        }
        ranks.append(
            list(
                itertools.islice(
                    training_batches(data.train, seed=1, position=position, workers=workers, **cut),
                    steps,
                )
            )
        )
    rows = []
    for step in itertools.chain.from_iterable(zip(*ranks, strict=True)):
        assert len(step.micro_batches) == TOTAL // (batch_size * world_size)
        for batch in step.micro_batches:
            assert batch["input_ids"].shape == batch["labels"].shape == (batch_size, LENGTH)
            rows += zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    return rows, [
        json.loads(json.dumps(merge_positions([step.position for step in step])))
        for step in zip(*ranks, strict=True)
    ]


@pytest.mark.parametrize("world_size, batch_size", [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_order_is_the_same_for_all_ranks_and_micro_batches_straight_and_resumed(
    folder, kind, world_size, batch_size
):
    data = load(folder, kind)
    expected = [
        plain_row(data.tokenizer, text) for text in plain_order(kind, data)[: STEPS * TOTAL]
    ]
    rows, positions = run(data, STEPS, batch_size, world_size)
    assert rows == expected
    for restart in (1, 4):
        rows, _ = run(
            data, STEPS - restart, batch_size, world_size, position=positions[restart - 1]
        )
        assert rows == expected[restart * TOTAL :]


def test_rows_of_a_step_are_named_by_their_index(folder):
    data = load(folder, "rows")
    for rank in (0, 1):
        cut = {"total_batch_size": TOTAL, "batch_size": 2, "rank": rank, "world_size": 2}
        for step in itertools.islice(
            training_batches(data.train, seed=1, position=None, **cut), STEPS
        ):
            assert len(step.indices) == 4
            shown = torch.cat([batch["input_ids"] for batch in step.micro_batches])
            assert torch.equal(shown, data.train.batch(step.indices)["input_ids"])


def test_rows_go_on_at_the_same_row_with_another_batch_size(folder):
    data = load(folder, "rows")
    step = next(
        training_batches(
            data.train,
            seed=1,
            position=None,
            total_batch_size=12,
            batch_size=12,
            rank=0,
            world_size=1,
        )
    )
    assert step.position == {"rows": 12}
    assert run(data, 2, 8, 1, position=step.position)[0] == run(data, 4, 8, 1)[0][12:28]


def test_a_position_of_a_stream_is_not_one_of_rows(folder):
    _, positions = run(load(folder, "stream"), 1, 8, 1)
    with pytest.raises(
        UserError, match="is one of a stream; give the --dataset it was trained with, and --stream"
    ):
        run(load(folder, "rows"), 1, 8, 1, position=positions[0])


def test_max_passes_ends_rows_before_a_row_comes_once_more(folder):
    data = load(folder, "rows")  # 30 rows
    for passes, updates in ((1, 3), (2, 7)):
        for rank in (0, 1):
            cut = {
                "total_batch_size": TOTAL,
                "batch_size": 4,
                "rank": rank,
                "world_size": 2,
                "max_passes": passes,
            }
            batches = training_batches(data.train, seed=1, position=None, **cut)
            assert len(list(itertools.islice(batches, updates))) == updates
            message = (
                f"The training data ends after {updates} updates of 8 sequences; .* "
                "--num_training_steps, or leave --max_passes out"
            )
            with pytest.raises(UserError, match=message):
                next(batches)


@pytest.mark.slow
def test_order_is_the_same_with_worker_processes(folder):
    data = load(folder, "stream")
    expected = [
        plain_row(data.tokenizer, text) for text in plain_order("stream", data)[: STEPS * TOTAL]
    ]
    assert run(data, STEPS, 4, 1, workers=2)[0] == expected


def test_workers_are_not_used_for_rows(folder, monkeypatch):
    data = load(folder, "rows")
    expected = run(data, 2, 2, 1)
    monkeypatch.setattr(
        torch.utils.data, "DataLoader", lambda *_, **__: pytest.fail("a loader for rows")
    )
    assert run(data, 2, 2, 1, workers=2) == expected


def test_streaming_leaves_torchs_random_state_alone(folder):
    data = load(folder, "stream")
    before = torch.get_rng_state()
    run(data, 1, 8, 1, workers=1)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_a_workers_error_is_the_users_one_sentence(folder, tmp_path):
    for path in (folder / "c4/en").iterdir():
        write(tmp_path / "en" / path.name, TEXTS[:3])
    data = load(tmp_path, "stream", dataset=str(tmp_path), vocab_size=260)
    for path in (tmp_path / "en").glob("c4-train*"):
        path.write_bytes(b"broken")
    for workers in (0, 1):
        with pytest.raises(
            UserError, match=r"^The train split of the C4 mirror [^\n]*fetch that file again\.$"
        ):
            run(data, 1, 8, 1, workers=workers)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_validation_row_comes_once(folder, world_size, batch_size):
    """And all ranks have as many batches of one shape, filled with rows without a target."""
    data = load(folder, "rows")
    rows, shapes = [], []
    for rank in range(world_size):
        batches = list(validation_batches(data.validation, batch_size, rank, world_size))
        shapes.append([batch["input_ids"].shape for batch in batches])
        rows += [
            pair
            for batch in batches
            for pair in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ]
    assert (
        shapes == [[(min(batch_size, -(-11 // world_size)), LENGTH)] * len(shapes[0])] * world_size
    )
    real = [(ids, labels) for ids, labels in rows if labels != [-100] * LENGTH]
    assert sorted(real) == sorted(plain_row(data.tokenizer, text) for text in HELD_OUT)


def test_a_rank_may_have_no_validation_row(folder):
    validation = load(folder, "rows", target_eval_tokens=1).validation
    (batch,) = validation_batches(validation, 4, 2, 3)
    assert len(validation) == 1 and batch["labels"].tolist() == [[-100] * LENGTH]


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_validation_is_the_first_rows_that_hold_the_targets(folder, kind):
    data = load(folder, kind, target_eval_tokens=40)
    rows = [plain_row(data.tokenizer, text) for text in HELD_OUT]
    targets = [sum(label != -100 for label in labels) - 1 for _, labels in rows]
    count = next(n for n in range(12) if sum(targets[:n]) >= 40)
    (batch,) = validation_batches(data.validation, 100, 0, 1)
    assert batch["input_ids"].tolist() == [ids for ids, _ in rows[:count]] and count < 11


def test_fingerprint_follows_the_data_not_the_place(folder, tmp_path):
    base = load(folder, "rows")
    train, held_out = (
        write(tmp_path / "train.jsonl", TEXTS),
        write(tmp_path / "held_out.jsonl", HELD_OUT),
    )
    moved = load(tmp_path, "rows", dataset=train, validation_file=held_out)
    assert (
        moved.fingerprint
        == base.fingerprint
        == load(folder, "rows", seed=2, target_eval_tokens=5).fingerprint
    )
    others = [
        load(folder, "rows", max_length=13),
        load(folder, "rows", vocab_size=269),
        load(folder, "stream"),
    ]
    others.append(
        load(
            tmp_path,
            "rows",
            dataset=write(tmp_path / "train.jsonl", TEXTS + ["more"]),
            validation_file=held_out,
        )
    )
    assert len({data.fingerprint for data in [base, *others]}) == 5
    assert (
        "30 documents" in base.description
        and "11 documents" in base.description
        and "tokenizer bpe" in base.description
    )


def test_changed_file_is_tokenised_anew(tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", HELD_OUT)
    for texts in (TEXTS, TEXTS[:20]):
        data = load(
            tmp_path,
            "rows",
            dataset=write(tmp_path / "train.jsonl", texts),
            validation_file=held_out,
        )
        assert len(data.train) == len(texts)
    write(tmp_path / "held_out.jsonl", HELD_OUT[::-1])  # as many bytes, another time and order
    changed = load(
        tmp_path,
        "rows",
        dataset=str(tmp_path / "train.jsonl"),
        validation_file=held_out,
        target_eval_tokens=1,
    )
    (batch,) = validation_batches(changed.validation, 1, 0, 1)
    assert batch["input_ids"].tolist() == [plain_row(changed.tokenizer, HELD_OUT[-1])[0]]


def test_bpe_of_a_stream_does_not_depend_on_the_seed(folder, tmp_path, monkeypatch):
    from peft_pretraining.data import tokenizer as tokenization

    monkeypatch.setattr(tokenization, "BPE_SAMPLE_BYTES", 300)  # one shard
    hashes = {
        load(
            folder, "stream", seed=seed, vocab_size=262, cache_dir=tmp_path / str(seed)
        ).tokenizer.content_hash
        for seed in range(4)
    }
    assert len(hashes) == 1


def test_cache_is_made_inside_first(folder, tmp_path, monkeypatch):
    from peft_pretraining.data import tokenizer as tokenization
    from peft_pretraining.data.tokenized import format, writer

    inside = []

    @contextlib.contextmanager
    def first():
        inside.append(True)
        yield
        inside.clear()

    for module, name in (
        (tokenization, "train_bpe"),
        (writer, "atomic_write"),
        (format, "atomic_write"),
    ):
        made = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *arguments, made=made: made(*arguments) if inside else pytest.fail("outside"),
        )
    load(folder, "rows", cache_dir=tmp_path, rank_zero_first=first)
    assert not inside and len(list((tmp_path / "prepared").iterdir())) == 1


def test_pydocs_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(pydocs, "PYDOCS_PACKAGES", ("json", "email", "asyncio", "unittest"))
    data = load_data("pydocs", "bpe", 400, 32, seed=0, target_eval_tokens=None, cache_dir=tmp_path)
    assert (
        data.description.startswith("pydocs, ") and len(data.train) > 50 * len(data.validation) > 0
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_length": 1}, "--max_length 1 leaves no token"),
        ({"seed": -1}, "--seed -1 is negative"),
    ],
)
def test_bad_arguments(folder, changes, message):
    with pytest.raises(UserError, match=message):
        load(folder, "rows", **changes)


@pytest.mark.parametrize("inside, empty", [(False, "validation"), (True, "training")])
def test_corpus_too_small_for_a_held_out_share(folder, tmp_path, inside, empty):
    texts = [
        text
        for text in (f"{i} {TEXTS[8]}" for i in range(300))
        if split.is_in_fraction(text, 0.01) == inside
    ]
    dataset = write(tmp_path / "a.jsonl", texts[:3])
    message = (
        f"a.jsonl is too small to hold out 1% of its documents: the {empty} set is empty; give "
        "`--validation_file FILE`"
    )
    with pytest.raises(UserError, match=message):
        load(
            tmp_path,
            "rows",
            dataset=dataset,
            validation_file=None,
            tokenizer=str(tokenizer_folder(folder)),
        )


def test_nothing_left_to_train_on(folder):
    with pytest.raises(
        UserError,
        match=(
            "Every training document .* is in the validation set too; give another "
            "`--validation_file`"
        ),
    ):
        load(
            folder,
            "rows",
            validation_file=str(folder / "train.jsonl"),
            tokenizer=str(tokenizer_folder(folder)),
        )


def tokenizer_folder(folder):
    load(folder, "rows")
    return next((folder / "cache/tokenizers").iterdir())


@pytest.mark.parametrize(
    "total, batch_size, world_size", [(8, 3, 1), (8, 4, 3), (8, 0, 1), (4, 8, 1)]
)
def test_batch_sizes_that_do_not_divide(folder, total, batch_size, world_size):
    data = load(folder, "rows")
    with pytest.raises(
        UserError,
        match=(
            f"--total_batch_size {total} is not a multiple of --batch_size {batch_size} times "
            f"{world_size}"
        ),
    ):
        cut = {
            "total_batch_size": total,
            "batch_size": batch_size,
            "rank": 0,
            "world_size": world_size,
        }
        training_batches(data.train, seed=0, position=None, **cut)
