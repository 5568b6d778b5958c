"""Tokenizers: size of the vocabulary, special tokens in text, truncation and padding."""

import gzip
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from peft_pretraining.data.sequences import tokenize_documents
from peft_pretraining.data.tokenizer import load_tokenizer, train_bpe, wrap_tokenizer
from peft_pretraining.errors import UserError

DATA = Path(
    os.environ.get("ALPHADECAY_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data"
)
T5 = DATA / "tokenizers" / "t5"
needs_t5 = pytest.mark.skipif(
    not T5.is_dir(), reason=f"no T5 tokenizer in {T5}; set ALPHADECAY_DATA to the data folder"
)
LITERALS = ["plain </s> and <pad> and <unk>", "<extra_id_0>", "</s>", "<pad></s><extra_id_99> x"]


def corpus(words=3000):
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(rng.choice(letters, rng.integers(3, 9))) for _ in range(400)]
    return [
        " ".join(rng.choice(vocabulary, 30)) + f" </s> <pad> naïve {i}" for i in range(words // 30)
    ]


def bpe(tmp_path, size=500, **changes):
    return load_tokenizer("bpe", size, corpus(), tmp_path, "fingerprint", **changes)


def documents_of(tokenizer, texts):
    tokens, lengths = tokenizer.encode(texts)
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_bpe_has_exactly_the_models_vocabulary(tmp_path):
    for size in (300, 500):
        tokenizer = bpe(tmp_path, size)
        assert len(tokenizer.hf) == tokenizer.encoder.get_vocab_size() == size
        assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
        assert tokenizer.hf.convert_ids_to_tokens([0, 1]) == ["<pad>", "</s>"]


def test_bpe_roundtrip_with_special_tokens_as_text(tmp_path):
    tokenizer = bpe(tmp_path)
    texts = [*LITERALS, "東京 🙂\n\n\ttabs  and spaces ", corpus()[0]]
    for text, ids in zip(texts, documents_of(tokenizer, texts), strict=True):
        assert ids[-1] == 1 and not {0, 1} & set(ids[:-1])
        assert tokenizer.hf.decode(ids[:-1]) == text


def test_bpe_is_cached_and_trained_the_same_again(tmp_path):
    first = bpe(tmp_path / "a")
    cached = load_tokenizer(
        "bpe", 500, None, tmp_path / "a", "fingerprint"
    )  # no documents: it must not train
    assert (
        first.content_hash
        == cached.content_hash
        == bpe(tmp_path / "b").content_hash
        != bpe(tmp_path / "b", 400).content_hash
    )
    assert sorted(path.name for path in (tmp_path / "a/tokenizers").iterdir()) == [
        "bpe-500-fingerprint"
    ]


def test_bpe_reads_a_bounded_sample(monkeypatch):
    from peft_pretraining.data import tokenizer as tokenization

    monkeypatch.setattr(tokenization, "BPE_SAMPLE_BYTES", 2000)
    taken = []

    def documents():
        for text in corpus():
            taken.append(text)
            yield text

    train_bpe(documents(), 300)
    assert 2000 <= sum(len(text.encode()) for text in taken) < 2400


def test_bpe_of_too_small_a_corpus():
    with pytest.raises(
        UserError, match=r"too small for a BPE of 5000 ids: it gives 26\d;.*vocab_size of 26\d"
    ):
        train_bpe(["one two"], 5000)
    with pytest.raises(UserError, match="at least 258 ids.*vocab_size is 100"):
        train_bpe(["one two"], 100)


def test_unknown_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tokenizer.json").write_text("{}")
    for name in (tmp_path / "nowhere", tmp_path / "empty", tmp_path / "broken"):
        with pytest.raises(UserError, match="--tokenizer FOLDER.*--tokenizer bpe") as caught:
            load_tokenizer(str(name), 500, [], tmp_path, "")
        assert (
            str(name) in str(caught.value)
            and "\n" not in str(caught.value)
            and caught.value.__cause__ is not None
        )


def test_hub_tokenizer_without_network(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    def unreachable(name):
        raise OSError(f"We couldn't connect to the Hub for {name}.\nCheck your connection.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(
        UserError, match="Tokenizer t5-base .*couldn't connect.*--tokenizer FOLDER.*--tokenizer bpe"
    ):
        load_tokenizer("t5-base", 500, [], tmp_path, "")


def test_tokenizer_without_end_of_sequence(tmp_path):
    hf = bpe(tmp_path).hf
    hf.eos_token = None
    with pytest.raises(
        UserError, match="Tokenizer mine has no end-of-sequence token.*--tokenizer bpe"
    ):
        wrap_tokenizer(hf, "mine", 500)


def test_without_pad_the_filler_is_the_end_of_sequence(tmp_path):
    hf = bpe(tmp_path).hf
    hf.pad_token = None
    assert wrap_tokenizer(hf, "mine", 500).pad_id == 1


def test_id_beyond_the_models_vocabulary_is_refused_where_it_occurs(tmp_path):
    small = wrap_tokenizer(bpe(tmp_path).hf, "mine", 300)
    common = [text for text in "abcdefgh" if max(documents_of(small, [text])[0]) < 300]
    assert common  # ids beyond the vocabulary that do not occur do no harm
    message = (
        r"Tokenizer mine gives the id \d+ but the model's vocab_size is 300; type `--tokenizer "
        r"bpe`.* 500 or more"
    )
    with pytest.raises(UserError, match=message):
        small.encode(corpus())
    with pytest.raises(UserError, match="gives the id 1 but"):
        wrap_tokenizer(bpe(tmp_path).hf, "mine", 1)


@needs_t5
def test_t5_rows_equal_hugging_faces(tmp_path):
    tokenizer = load_tokenizer(str(T5), 32000, [], tmp_path, "")
    path = DATA / "c4" / "c4_en_full_docs.jsonl.gz"
    texts = ["short", "two\n\nparagraphs  and spaces", "naïve 東京 🙂 ﬁne"]
    if path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line, _ in zip(lines, range(300), strict=False)]
    expected = tokenizer.hf(texts, max_length=256, truncation=True, padding="max_length")
    batch = tokenize_documents(texts, tokenizer, 256).batch(np.arange(len(texts)))
    assert batch["input_ids"].tolist() == expected["input_ids"]
    assert batch["labels"].ne(-100).long().tolist() == expected["attention_mask"]
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)


@needs_t5
def test_t5_reads_special_tokens_as_text(tmp_path):
    tokenizer = load_tokenizer(str(T5), 32000, [], tmp_path, "")
    special = {0, 1, *range(32000, 32100)}
    for text, ids in zip(LITERALS, documents_of(tokenizer, LITERALS), strict=True):
        assert ids[-1] == 1 and not special & set(ids[:-1])
        pieces = tokenizer.hf.convert_ids_to_tokens(ids[:-1])
        assert (
            "".join(pieces).replace("▁", " ").replace("<unk>", "<").strip() == text
        )  # T5 has no piece for "<"


def test_a_pickled_tokenizer_reads_no_special_token_in_the_text_either(tmp_path):
    """Worker processes get a pickled tokenizer; the library's own pickling loses this setting."""
    tokenizer = bpe(tmp_path)
    expected = documents_of(tokenizer, LITERALS)
    assert all(tokenizer.eos_id not in ids[:-1] for ids in expected)
    assert documents_of(pickle.loads(pickle.dumps(tokenizer)), LITERALS) == expected
