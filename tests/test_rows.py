"""Rows: cutting, filling and labels against a plain loop; the order; the cache."""

import numpy as np
import pytest
import torch

from peft_pretraining.errors import UserError
from peft_pretraining.rows import RowOrder, Rows, cached_rows, tokenize_rows
from peft_pretraining.tokenization import load_tokenizer

LENGTH = 16
TEXTS = [" ".join(f"word{i * j % 17}" for j in range(1 + i % 13)) + f" no {i}" for i in range(200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer("bpe", 300, TEXTS, tmp_path_factory.mktemp("cache"), "rows")


def plain_row(tokenizer, text):
    """A row as the papers describe it, token by token."""
    ids = tokenizer.encoder.encode(text, add_special_tokens=False).ids[: LENGTH - 1] + [tokenizer.eos_id]
    padding = LENGTH - len(ids)
    return ids + [tokenizer.pad_id] * padding, ids + [-100] * padding


def assert_rows_are(tokenizer, batch, texts):
    rows = [plain_row(tokenizer, text) for text in texts]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [ids for ids, _ in rows]
    assert batch["labels"].tolist() == [labels for _, labels in rows]


def test_rows_are_cut_filled_and_labelled_like_a_plain_loop(tokenizer):
    rows = tokenize_rows(TEXTS, tokenizer, LENGTH)
    chosen = np.array([7, 3, 199, 3, 0, 12])
    lengths = np.diff(rows.offsets)
    assert lengths.min() < LENGTH < lengths.max() and LENGTH in lengths  # shorter, longer and exact ones are all there
    assert_rows_are(tokenizer, rows.batch(np.arange(200)), TEXTS)
    assert_rows_are(tokenizer, rows.batch(chosen), [TEXTS[i] for i in chosen])


def test_what_is_padding_follows_from_lengths_not_ids():
    rows = Rows(np.array([5, 0, 1, 7, 1], np.uint16), np.array([0, 3, 5]), max_length=4, pad_id=0, eos_id=1)
    assert rows.batch(np.array([0, 1]))["labels"].tolist() == [[5, 0, 1, -100], [7, 1, -100, -100]]
    filled_with_eos = Rows(rows.tokens, rows.offsets, max_length=4, pad_id=1, eos_id=1).batch(np.array([1]))
    assert filled_with_eos["input_ids"].tolist() == [[7, 1, 1, 1]] and filled_with_eos["labels"].tolist() == [[7, 1, -100, -100]]


def test_target_tokens_and_head(tokenizer):
    rows = tokenize_rows(TEXTS, tokenizer, LENGTH)
    targets = [sum(label != -100 for label in plain_row(tokenizer, text)[1]) - 1 for text in TEXTS]
    assert rows.target_tokens == sum(targets)
    for wanted in (1, targets[0], targets[0] + 1, 500, sum(targets), sum(targets) + 1, None):
        least = next((n for n in range(1, 201) if wanted is not None and sum(targets[:n]) >= wanted), 200)
        assert len(rows.head(wanted)) == len(tokenize_rows(TEXTS, tokenizer, LENGTH, wanted)) == least


def test_documents_without_tokens_are_dropped(tokenizer):
    assert len(tokenize_rows(["", "a", ""], tokenizer, LENGTH)) == 1
    assert len(tokenize_rows([], tokenizer, LENGTH)) == 0


def test_order_is_a_fresh_permutation_each_epoch_and_a_function_of_the_position():
    straight = RowOrder(5, 10).indices(0, 35)
    for epoch in range(3):
        assert sorted(straight[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    assert straight[:10].tolist() != straight[10:20].tolist() != straight[20:30].tolist()
    assert straight.tolist() != RowOrder(6, 10).indices(0, 35).tolist()
    for start in range(35):
        for stop in range(start + 1, 36):
            assert RowOrder(5, 10).indices(start, stop).tolist() == straight[start:stop].tolist()
    order = RowOrder(5, 10)
    assert [i for start in range(0, 35, 5) for i in order.indices(start, start + 5)] == straight.tolist()
    # Written down once: other numbers would show a continued run other rows.
    assert RowOrder(0, 8).indices(0, 8).tolist() == np.random.Generator(np.random.PCG64([0, 0])).permutation(8).tolist()


def test_cache_is_written_once_and_depends_on_key_and_tokenizer(tokenizer, tmp_path):
    parts = {"train": TEXTS[10:], "validation": TEXTS[:10]}
    rows = cached_rows(parts, ["key"], tokenizer, LENGTH, tmp_path)
    again = cached_rows({"train": None, "validation": None}, ["key"], tokenizer, LENGTH, tmp_path)  # nothing to read: from the cache
    for found in (rows, again):
        assert found["train"].tokens.dtype == np.uint16 and isinstance(found["train"].tokens, np.memmap)
        assert_rows_are(tokenizer, found["train"].batch(np.arange(190)), TEXTS[10:])
        assert_rows_are(tokenizer, found["validation"].batch(np.arange(10)), TEXTS[:10])
    with pytest.raises(TypeError):  # another key is not in the cache, and None cannot be tokenised
        cached_rows({"train": None}, ["other key"], tokenizer, LENGTH, tmp_path)
    other = load_tokenizer("bpe", 300, [text[::-1] for text in TEXTS], tmp_path, "reversed")
    assert_rows_are(other, cached_rows(parts, ["key"], other, LENGTH, tmp_path)["validation"].batch(np.arange(10)), TEXTS[:10])
    assert len(list((tmp_path / "rows").iterdir())) == 2  # no temporary folder is left


def test_damaged_cache(tokenizer, tmp_path):
    cached_rows({"train": TEXTS}, ["key"], tokenizer, LENGTH, tmp_path)
    (path,) = (tmp_path / "rows").glob("*/train.tokens")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"damaged \(train.tokens is not whole\); delete that folder"):
        cached_rows({"train": TEXTS}, ["key"], tokenizer, LENGTH, tmp_path)


def test_unigram_entropy():
    tokens = np.array([3] * 4 + [5] * 2 + [1] * 2, np.uint16)
    rows = Rows(tokens, np.array([0, 3, 8]), 4, 0, 1)
    assert rows.unigram_entropy() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(4))
