"""Say which data a command would read, without tokenizing it and without a network."""

from __future__ import annotations

from peft_pretraining.data.dataset import DEFAULT_TOKENIZER
from peft_pretraining.data.sources.registry import open_source
from peft_pretraining.data.tokenized.format import is_prepared
from peft_pretraining.data.tokenized.reader import open_prepared
from peft_pretraining.errors import UserError
from peft_pretraining.utils.cache import expanded


def preview_data(
    dataset: str,
    tokenizer: str | None,
    validation_file: str | None,
    stream: bool,
    packing: bool,
) -> str:
    """Return one line about the data of a command.

    Args:
        dataset: a folder of prepared data, or a source; see `load_data`.
        tokenizer: its name; None: the one of the prepared data, or the default.
        validation_file: a file with validation documents.
        stream: whether files are read during the training.
        packing: whether sequences are packed.

    Raises:
        UserError: a file or a folder does not exist, or cannot be read.
    """
    sequences = "packed sequences" if packing else "one document a sequence"
    if validation_file and not expanded(validation_file).is_file():
        raise UserError(f"--validation_file {validation_file}: there is no such file")
    folder = expanded(dataset)
    if is_prepared(folder):
        index = open_prepared(folder).index
        return (
            f"{folder}: {index['source']}, tokenized with {index['tokenizer']['name']}; {sequences}"
        )
    name = f"tokenizer {tokenizer or DEFAULT_TOKENIZER}"
    validation = f"validation from {validation_file}; " if validation_file else ""
    if dataset == "c4":
        return f"c4, streamed from the Hugging Face Hub (not tried here); {name}; {sequences}"
    if dataset == "pydocs":
        return f"pydocs, the docstrings of the installed packages; {validation}{name}; {sequences}"
    source = open_source(dataset, None)
    read = "streamed" if source.streamed or stream else "tokenized before the training"
    files = f"{source.files}; " if source.files else ""
    return f"{source.name}, {read}; {files}{validation}{name}; {sequences}"
