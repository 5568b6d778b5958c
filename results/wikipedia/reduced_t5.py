"""Reduce the T5 tokenizer to SIZE pieces: all single characters and the most frequent others.

    python results/wikipedia/reduced_t5.py T5 OUTPUT [SIZE]

T5 is t5-base, or a folder with its files.

T5 segments by the likeliest pieces (a unigram model), whose list is in the order of their
frequency; the likeliest segmentation into fewer pieces is found by the same model. A character that
T5 does not know stays unknown.
"""

import json
import sys

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPECIAL = 3  # <pad>, </s>, <unk>


def reduce(t5: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast:
    """The first pieces of T5 that, with its single characters, are `size`; ids follow its order."""
    state = json.loads(t5.backend_tokenizer.to_str())
    specials, pieces = state["model"]["vocab"][:SPECIAL], state["model"]["vocab"][SPECIAL:]
    letters = [piece for piece in pieces if len(piece[0]) == 1]
    longer = [
        piece for piece in pieces if len(piece[0]) > 1 and not piece[0].startswith("<extra_id")
    ]
    chosen = {piece for piece, _ in letters + longer[: size - SPECIAL - len(letters)]}
    state["model"]["vocab"] = specials + [piece for piece in pieces if piece[0] in chosen]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < SPECIAL]
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **names)


if __name__ == "__main__":
    source, output, *rest = sys.argv[1:]
    size = int(rest[0]) if rest else 4096
    reduced = reduce(AutoTokenizer.from_pretrained(source), size)
    assert len(reduced) == size, f"{len(reduced)} pieces"
    reduced.save_pretrained(output)
