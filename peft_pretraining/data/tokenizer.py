"""Tokenizers: any of the Hub's or a folder's, or a byte-level BPE trained on the corpus; text is always encoded as plain text."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peft_pretraining.errors import UserError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast


BPE_SAMPLE_BYTES = 50_000_000
BPE_SPECIALS = ("<pad>", "</s>")  # ids 0 and 1: the LLaMA configs name 1 as the end of a sequence
# Space, case, accents, other scripts, code, special tokens: what tokenizers differ in.
PROBE = "Probe: naïve café, 東京 — 12,345.67 km²\n\tdef f(x): return x['a'] ** 2  # </s> <pad>  don't UPPER ‘quotes’ 🙂 ﬁne"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer for pretraining.

    `hf` is the Hugging Face tokenizer (to save beside a model); `encoder` is its fast core, bared of special tokens;
    `pad_id` fills rows up (it never says what is padding, lengths do); `vocab_size` is the model's, not the tokenizer's;
    `content_hash` is equal for tokenizers that encode alike.
    """

    name: str
    hf: PreTrainedTokenizerFast
    encoder: tokenizers.Tokenizer
    eos_id: int
    pad_id: int
    vocab_size: int
    content_hash: str

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encodes whole documents, each followed by the end-of-sequence id.

        Returns the ids of all documents one after another (int32 [sum of lengths]) and the documents' lengths (int64 [documents]).
        Raises UserError for an id that the model has no embedding for.
        """
        tokens, lengths = encode_documents(self.encoder, self.eos_id, texts)
        return self.check(tokens), lengths

    def check(self, tokens: np.ndarray) -> np.ndarray:
        """The ids themselves. Raises UserError where the model has no embedding for one."""
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise self._out_of_vocabulary(int(tokens.max()))
        return tokens

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.encoder.encode_special_tokens = True  # which pickling forgets

    def _out_of_vocabulary(self, token: int) -> UserError:
        return UserError(
            f"Tokenizer {self.name} gives the id {token} but the model's vocab_size is {self.vocab_size}; "
            f"type `--tokenizer bpe`, or a model config with a vocab_size of {max(token + 1, len(self.hf))} or more."
        )


def encode_documents(
    encoder: tokenizers.Tokenizer, eos_id: int, texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """What `Tokenizer.encode` returns, unchecked: for processes that have no more of a tokenizer than its encoder."""
    documents = [
        encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)
    ]
    for ids in documents:
        ids.append(eos_id)
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    return np.fromiter(
        itertools.chain.from_iterable(documents), np.int32, int(lengths.sum())
    ), lengths


def load_tokenizer(
    name: str, vocab_size: int, documents: Iterable[str], cache_dir: Path, fingerprint: str
) -> Tokenizer:
    """The tokenizer of that name, ready for a model with `vocab_size` embeddings.

    `name` is a folder, a name on the Hub, or `bpe`: a byte-level BPE of exactly `vocab_size` ids, trained on the first 50 MB of
    `documents` and cached in `cache_dir` under `fingerprint` (of the corpus) and size.
    Raises UserError where it cannot be loaded or trained, or has no end-of-sequence token.
    """
    hf = (
        _cached_bpe(vocab_size, documents, Path(cache_dir), fingerprint)
        if name == "bpe"
        else _pretrained(name)
    )
    return wrap_tokenizer(hf, name, vocab_size)


def wrap_tokenizer(hf: PreTrainedTokenizerFast, name: str, vocab_size: int) -> Tokenizer:
    """Makes a `Tokenizer` of a Hugging Face fast tokenizer. UserError where it has no end-of-sequence token or is a slow one."""
    if not hf.is_fast:
        raise UserError(
            f"Tokenizer {name} has no tokenizer.json; give another with `--tokenizer FOLDER` or type `--tokenizer bpe`."
        )
    if hf.eos_token_id is None:
        raise UserError(
            f"Tokenizer {name} has no end-of-sequence token; give another with `--tokenizer FOLDER` or type `--tokenizer bpe`."
        )
    eos, pad = hf.eos_token_id, hf.pad_token_id
    # Filler must be an id that the model embeds; padding is told by length, so the end-of-sequence id serves as well as any.
    filler = pad if pad is not None and pad < vocab_size else eos
    encoder = plain_encoder(hf.backend_tokenizer)
    tokenizer = Tokenizer(
        name, hf, encoder, eos, filler, vocab_size, content_hash=_content_hash(encoder, eos, filler)
    )
    if eos >= vocab_size:
        raise tokenizer._out_of_vocabulary(eos)
    return tokenizer


def plain_encoder(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy of a fast tokenizer that adds no special token and reads none in the text: "</s>" in a document is four characters.

    `encode_special_tokens` does not suffice for Unigram models (T5): their vocabulary holds the special tokens as ordinary pieces,
    which the model then finds in the text (sentencepiece itself would not). There the pieces get names that no text has.
    """
    state = json.loads(backend.to_str())
    state.update(post_processor=None, truncation=None, padding=None)
    if state["model"]["type"] == "Unigram":
        special = {token["content"] for token in state["added_tokens"] if token["special"]}
        vocabulary = enumerate(state["model"]["vocab"])
        state["model"]["vocab"] = [
            [f"\0 special {i}" if piece in special else piece, score]
            for i, (piece, score) in vocabulary
        ]
        state["added_tokens"] = [token for token in state["added_tokens"] if not token["special"]]
    return encoder_from_state(json.dumps(state))


def encoder_from_state(state: str) -> tokenizers.Tokenizer:
    """An encoder from its `to_str()`, which leaves out that it is to read no special token in the text."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_str(state)
    encoder.encode_special_tokens = True
    return encoder


def _content_hash(encoder: tokenizers.Tokenizer, eos: int, filler: int) -> str:
    # Vocabulary and a probe rather than the serialised tokenizer: library versions write the same tokenizer down differently.
    vocabulary = sorted(encoder.get_vocab().items(), key=lambda item: item[1])
    content = [vocabulary, encoder.encode(PROBE, add_special_tokens=False).ids, eos, filler]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _pretrained(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the libraries raise whatever the missing or broken file leads to, bare Exception included
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"Tokenizer {name} is neither a folder with a tokenizer nor could it be fetched from the Hub ({reason}); "
            "give a folder with `--tokenizer FOLDER` or type `--tokenizer bpe`."
        ) from error


def _cached_bpe(
    vocab_size: int, documents: Iterable[str], cache_dir: Path, fingerprint: str
) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    folder = cache_dir / "tokenizers" / f"bpe-{vocab_size}-{fingerprint}"
    if not folder.is_dir():
        pad, eos = BPE_SPECIALS
        core = train_bpe(documents, vocab_size)
        hf = PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token=pad, eos_token=eos, clean_up_tokenization_spaces=False
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            hf.save_pretrained(Path(temporary) / "whole")
            try:
                os.rename(Path(temporary) / "whole", folder)
            except OSError:
                if (
                    not folder.is_dir()
                ):  # another process may have been first; its tokenizer is the same
                    raise
    return PreTrainedTokenizerFast.from_pretrained(folder)


def train_bpe(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of exactly `vocab_size` ids, specials included. UserError where the documents do not give that many."""
    from loguru import logger
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    logger.info(f"Training a byte-level BPE of {vocab_size:,} ids")
    core = Tokenizer(models.BPE())
    # The word pattern also keeps "</s>" in pieces ("</", "s", ">"), so that no merge can ever spell a special token.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(BPE_SPECIALS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(_sample(documents, BPE_SAMPLE_BYTES), trainer)
    reached = core.get_vocab_size()
    if reached > vocab_size:
        raise UserError(
            f"A byte-level BPE has at least {reached} ids, the model's vocab_size is {vocab_size}; give a greater one."
        )
    if reached < vocab_size:
        raise UserError(
            f"The corpus is too small for a BPE of {vocab_size} ids: it gives {reached}; give more text, "
            f"a model config with a vocab_size of {reached}, or a finished tokenizer with `--tokenizer FOLDER`."
        )
    return core


def _sample(documents: Iterable[str], limit: int) -> Iterator[str]:
    for text in documents:
        yield text
        limit -= len(text.encode())
        if limit <= 0:
            return
