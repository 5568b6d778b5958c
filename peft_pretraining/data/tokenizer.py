"""Tokenizers: from the Hugging Face Hub, from a folder, or a byte-level BPE trained on the corpus.

Documents are always encoded as plain text: "</s>" in a document is four characters, not the token.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from peft_pretraining.errors import UserError
from peft_pretraining.utils.files import atomic_directory

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast


TOKENIZER_FILE = "tokenizer.json"
BPE_SAMPLE_BYTES = 50_000_000
# They get the ids 0 and 1: the LLaMA configs name 1 as the end of a sequence.
BPE_SPECIAL_TOKENS = ("<pad>", "</s>")
# Tokenizers differ in spaces, case, accents, other scripts, code and special tokens.
PROBE_TEXT = (
    "Probe: naïve café, 東京 — 12,345.67 km²\n\tdef f(x): return x['a'] ** 2  "
    "# </s> <pad>  don't UPPER ‘quotes’ 🙂 ﬁne"
)


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer for pretraining.

    Attributes:
        name: The name by which the user called it.
        hf_source: The Hugging Face tokenizer, or the folder to load it from when it is needed.
        encoder: The backend tokenizer with special-token handling disabled.
        eos_id: Token that ends a document.
        pad_id: Token that fills up sequences. It does not tell what is padding: lengths do.
        vocab_size: Number of embeddings of the model, which may exceed the tokenizer's vocabulary.
        content_hash: Equal for tokenizers that encode alike.
    """

    name: str
    hf_source: PreTrainedTokenizerFast | Path
    encoder: tokenizers.Tokenizer
    eos_id: int
    pad_id: int
    vocab_size: int
    content_hash: str

    @functools.cached_property
    def hf(self) -> PreTrainedTokenizerFast:
        """The Hugging Face tokenizer, to be saved beside a model.

        Loaded at the first access, because importing transformers takes seconds.
        """
        if isinstance(self.hf_source, Path):
            return _load_pretrained(str(self.hf_source))
        return self.hf_source

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode documents, each followed by the end-of-sequence token.

        Returns:
            The tokens of all documents, int32 [sum of lengths], and the lengths of the documents,
            int64 [documents].

        Raises:
            UserError: The model has no embedding for a token.
        """
        tokens, lengths = encode_documents(self.encoder, self.eos_id, texts)
        return self.check_ids(tokens), lengths

    def check_ids(self, tokens: np.ndarray) -> np.ndarray:
        """Return `tokens` unchanged. Raises UserError if the model has no embedding for one."""
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise self._out_of_vocabulary(int(tokens.max()))
        return tokens

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.encoder.encode_special_tokens = True  # Pickling loses this setting.

    def _out_of_vocabulary(self, token: int) -> UserError:
        needed = max(token + 1, len(self.hf))
        return UserError(
            f"Tokenizer {self.name} gives the id {token} but the model's vocab_size is "
            f"{self.vocab_size}; type `--tokenizer bpe`, or a model config with a vocab_size of "
            f"{needed} or more."
        )


def encode_documents(
    encoder: tokenizers.Tokenizer, eos_id: int, texts: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `Tokenizer.encode` returns, without checking the ids.

    For worker processes, which have only the encoder.
    """
    documents = [
        encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)
    ]
    for ids in documents:
        ids.append(eos_id)
    lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    all_ids = itertools.chain.from_iterable(documents)
    return np.fromiter(all_ids, np.int32, int(lengths.sum())), lengths


def load_tokenizer(
    name: str, vocab_size: int, documents: Iterable[str], cache_dir: Path, fingerprint: str
) -> Tokenizer:
    """Load a tokenizer for a model with `vocab_size` embeddings, or train one.

    Args:
        name: A folder, a name on the Hub, or `bpe`: a byte-level BPE of exactly `vocab_size` ids.
        vocab_size: Number of embeddings of the model.
        documents: Texts; a BPE is trained on the first `BPE_SAMPLE_BYTES` bytes of them.
        cache_dir: A trained BPE is stored here, under its size and `fingerprint`.
        fingerprint: Identifies the corpus.

    Raises:
        UserError: The tokenizer cannot be loaded or trained, or it has no end-of-sequence token.
    """
    if name != "bpe":
        return wrap_tokenizer(_load_pretrained(name), name, vocab_size)
    folder = Path(cache_dir) / "tokenizers" / f"bpe-{vocab_size}-{fingerprint}"
    if not folder.is_dir():
        _train_and_save_bpe(documents, vocab_size, folder)
    # Read without transformers, whose import takes seconds. The result is the same.
    encoder = plain_text_encoder((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    pad_id, eos_id = range(len(BPE_SPECIAL_TOKENS))
    content_hash = hash_of_encoder(encoder, eos_id, pad_id)
    return Tokenizer(name, folder, encoder, eos_id, pad_id, vocab_size, content_hash)


def wrap_tokenizer(hf: PreTrainedTokenizerFast, name: str, vocab_size: int) -> Tokenizer:
    """Return a `Tokenizer` for a Hugging Face fast tokenizer.

    Raises:
        UserError: It has no end-of-sequence token, or it is not a fast tokenizer.
    """
    remedy = "give another with `--tokenizer FOLDER` or type `--tokenizer bpe`"
    if not hf.is_fast:
        raise UserError(f"Tokenizer {name} has no tokenizer.json; {remedy}.")
    if hf.eos_token_id is None:
        raise UserError(f"Tokenizer {name} has no end-of-sequence token; {remedy}.")
    eos_id, pad_id = hf.eos_token_id, hf.pad_token_id
    if pad_id is None or pad_id >= vocab_size:
        # The padding token must have an embedding. Padding is told by length, so that the
        # end-of-sequence token serves as well as any other.
        pad_id = eos_id
    encoder = plain_text_encoder(hf.backend_tokenizer.to_str())
    content_hash = hash_of_encoder(encoder, eos_id, pad_id)
    tokenizer = Tokenizer(name, hf, encoder, eos_id, pad_id, vocab_size, content_hash)
    if eos_id >= vocab_size:
        raise tokenizer._out_of_vocabulary(eos_id)
    return tokenizer


def load_stored_tokenizer(folder: Path, stored: dict) -> Tokenizer:
    """Load a tokenizer that was saved to a folder, of which the ids and the hash are known.

    transformers is imported only if the tokenizer.json alone does not give an encoder with the
    known hash: starting a run from prepared data would otherwise take seconds longer.

    Args:
        folder: The folder, as transformers saved it.
        stored: Its `name`, `vocab_size`, `eos_id`, `pad_id` and `content_hash`.

    Raises:
        UserError: The tokenizer cannot be loaded.
    """
    eos_id, pad_id, vocab_size = stored["eos_id"], stored["pad_id"], stored["vocab_size"]
    try:
        encoder = plain_text_encoder((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
        content_hash = hash_of_encoder(encoder, eos_id, pad_id)
    except Exception:  # The library raises plain exceptions.
        content_hash = ""
    if content_hash != stored["content_hash"]:
        return load_tokenizer(str(folder), vocab_size, (), folder, "")  # As transformers reads it.
    return Tokenizer(stored["name"], folder, encoder, eos_id, pad_id, vocab_size, content_hash)


def plain_text_encoder(tokenizer_state: str) -> tokenizers.Tokenizer:
    """Return a fast tokenizer that neither adds nor recognizes special tokens.

    `encode_special_tokens` is not enough for Unigram models (T5): their vocabulary contains the
    special tokens as ordinary pieces, which the model then finds in the text (sentencepiece itself
    would not). Here these pieces are renamed to something that no text contains.

    Args:
        tokenizer_state: A fast tokenizer as JSON: its `to_str()` or the content of its
            tokenizer.json.
    """
    state = json.loads(tokenizer_state)
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
    """Return an encoder from its `to_str()`, which lacks the setting for special tokens."""
    import tokenizers

    encoder = tokenizers.Tokenizer.from_str(state)
    encoder.encode_special_tokens = True
    return encoder


def hash_of_encoder(encoder: tokenizers.Tokenizer, eos_id: int, pad_id: int) -> str:
    """Return a hash that is equal for encoders that encode alike.

    It is computed from the vocabulary and the encoded `PROBE_TEXT`, not from the serialized
    tokenizer, because different versions of the library serialize the same tokenizer differently.
    """
    vocabulary = sorted(encoder.get_vocab().items(), key=lambda item: item[1])
    probe_ids = encoder.encode(PROBE_TEXT, add_special_tokens=False).ids
    content = [vocabulary, probe_ids, eos_id, pad_id]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def _load_pretrained(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(name))
    except Exception as error:  # For missing and broken files the libraries raise anything.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"Tokenizer {name} is neither a folder with a tokenizer nor could it be fetched from "
            f"the Hub ({reason}); give a folder with `--tokenizer FOLDER` or type "
            "`--tokenizer bpe`."
        ) from error


def _train_and_save_bpe(documents: Iterable[str], vocab_size: int, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    pad_token, eos_token = BPE_SPECIAL_TOKENS
    hf = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(documents, vocab_size),
        pad_token=pad_token,
        eos_token=eos_token,
        clean_up_tokenization_spaces=False,
        # By default transformers 4 also returns token_type_ids, which LLaMA does not take.
        model_input_names=["input_ids", "attention_mask"],
    )
    # Another process may train at the same time. Its tokenizer is the same.
    with atomic_directory(folder, shared=True, keep_existing=True) as new:
        hf.save_pretrained(new)


def train_bpe(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE of exactly `vocab_size` ids, special tokens included.

    Args:
        documents: Texts; the first `BPE_SAMPLE_BYTES` bytes of them are used.
        vocab_size: Number of ids.

    Raises:
        UserError: The documents do not give that many ids, or `vocab_size` is too small.
    """
    from loguru import logger
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    logger.info(f"Training a byte-level BPE of {vocab_size:,} ids")
    backend = Tokenizer(models.BPE())
    # The word pattern also splits "</s>" into pieces ("</", "s", ">"), so that no merge can ever
    # spell a special token.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(BPE_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_first_bytes(documents, BPE_SAMPLE_BYTES), trainer)
    size = backend.get_vocab_size()
    if size > vocab_size:
        raise UserError(
            f"A byte-level BPE has at least {size} ids, the model's vocab_size is {vocab_size}; "
            "give a greater one."
        )
    if size < vocab_size:
        raise UserError(
            f"The corpus is too small for a BPE of {vocab_size} ids: it gives {size}; give more "
            f"text, a model config with a vocab_size of {size}, or a finished tokenizer with "
            "`--tokenizer FOLDER`."
        )
    return backend


def _first_bytes(documents: Iterable[str], count: int) -> Iterator[str]:
    """Yield the fewest first documents that have `count` bytes in UTF-8."""
    for text in documents:
        yield text
        count -= len(text.encode())
        if count <= 0:
            return
