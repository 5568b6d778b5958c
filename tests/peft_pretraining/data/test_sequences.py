"""Rows: cutting, filling, packing and labels against a plain loop."""

import numpy as np
import pytest
import torch

from peft_pretraining.data.sequences import Sequences, Shard, tokenize_documents
from peft_pretraining.data.streaming import StreamedSequences
from peft_pretraining.data.tokenizer import load_tokenizer

LENGTH = 16
TEXTS = [" ".join(f"word{i * j % 17}" for j in range(1 + i % 13)) + f" no {i}" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("bpe", 300, TEXTS, tmp_path_factory.mktemp("cache"), "rows")


def plain_row(tokenizer, text):
    """A row as the papers describe it, token by token."""
    ids = tokenizer.encoder.encode(text, add_special_tokens=False).ids[: LENGTH - 1] + [
        tokenizer.eos_id
    ]
    padding = LENGTH - len(ids)
    return ids + [tokenizer.pad_id] * padding, ids + [-100] * padding


def assert_rows_are(tokenizer, batch, texts):
    rows = [plain_row(tokenizer, text) for text in texts]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [ids for ids, _ in rows]
    assert batch["labels"].tolist() == [labels for _, labels in rows]


def test_rows_are_cut_filled_and_labelled_like_a_plain_loop(tokenizer):
    rows = tokenize_documents(TEXTS, tokenizer, LENGTH)
    chosen = np.array([7, 3, 199, 3, 0, 12])
    lengths = np.diff(rows.shards[0].offsets)
    assert (
        lengths.min() < LENGTH < lengths.max() and LENGTH in lengths
    )  # shorter, longer and exact ones are all there
    assert_rows_are(tokenizer, rows.batch(np.arange(200)), TEXTS)
    assert_rows_are(tokenizer, rows.batch(chosen), [TEXTS[i] for i in chosen])


def test_what_is_padding_follows_from_lengths_not_ids():
    shards = (Shard(np.array([5, 0, 1, 7, 1], np.uint16), np.array([0, 3, 5])),)
    rows = Sequences(shards, max_length=4, pad_id=0, eos_id=1)
    assert rows.batch(np.array([0, 1]))["labels"].tolist() == [[5, 0, 1, -100], [7, 1, -100, -100]]
    filled_with_eos = Sequences(shards, max_length=4, pad_id=1, eos_id=1).batch(np.array([1]))
    assert filled_with_eos["input_ids"].tolist() == [[7, 1, 1, 1]] and filled_with_eos[
        "labels"
    ].tolist() == [[7, 1, -100, -100]]


def test_target_tokens_and_head(tokenizer):
    rows = tokenize_documents(TEXTS, tokenizer, LENGTH)
    targets = [sum(label != -100 for label in plain_row(tokenizer, text)[1]) - 1 for text in TEXTS]
    assert rows.target_tokens == sum(targets)
    for wanted in (1, targets[0], targets[0] + 1, 500, sum(targets), sum(targets) + 1, None):
        least = next(
            (n for n in range(1, 201) if wanted is not None and sum(targets[:n]) >= wanted), 200
        )
        assert (
            len(rows.head(wanted))
            == len(tokenize_documents(TEXTS, tokenizer, LENGTH, wanted))
            == least
        )


def test_documents_without_tokens_are_dropped(tokenizer):
    assert len(tokenize_documents(["", "a", ""], tokenizer, LENGTH)) == 1
    assert len(tokenize_documents([], tokenizer, LENGTH)) == 0


def test_unigram_entropy():
    tokens = np.array([3] * 4 + [5] * 2 + [1] * 2, np.uint16)
    rows = Sequences(
        (Shard(tokens[:3], np.array([0, 3])), Shard(tokens[3:], np.array([0, 5]))), 4, 0, 1
    )
    assert rows.unigram_entropy() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(4))


def test_packed_rows_without_first_tokens(tokenizer):
    """With "within", the first token of a document has no label."""
    rows = tokenize_documents(TEXTS, tokenizer, LENGTH, packing="within")
    batch = rows.batch(np.arange(len(rows)))
    joined = [
        i
        for text in TEXTS
        for i in [*tokenizer.encoder.encode(text, add_special_tokens=False).ids, tokenizer.eos_id]
    ]
    for row, (ids, labels) in enumerate(
        zip(*(batch[key].tolist() for key in ("input_ids", "labels")), strict=True)
    ):
        assert ids == joined[row * LENGTH : (row + 1) * LENGTH]
        assert labels == [
            ids[0],
            *(-100 if a == tokenizer.eos_id else b for a, b in zip(ids, ids[1:], strict=False)),
        ]
    streamed = StreamedSequences(None, tokenizer, LENGTH, "within")._batch(
        list(batch["input_ids"].numpy())
    )
    assert torch.equal(streamed["labels"], batch["labels"])
