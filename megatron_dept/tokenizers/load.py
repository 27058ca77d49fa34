"""Finds the tokenizer behind a path."""

from pathlib import Path

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_dept.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGINGFACE_FILE = "tokenizer.json"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a sentencepiece `.model` file, a Hugging Face `tokenizer.json`, or a directory that holds one.

    `DataError`: there is none, or the directory holds both and does not say which.
    """
    path = Path(path)
    if path.is_dir():
        found = [name for name in (SENTENCEPIECE_FILE, HUGGINGFACE_FILE) if (path / name).is_file()]
        if len(found) != 1:
            what = "both" if found else "neither"
            raise DataError(f"{path} holds {what} {SENTENCEPIECE_FILE} and {HUGGINGFACE_FILE}; name the file to use")
        path = path / found[0]
    if not path.exists():
        raise DataError(f"tokenizer {path} does not exist; make one with tools/train_tokenizer.py")
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    raise DataError(f"tokenizer {path} is neither a .model nor a .json file nor a directory that holds one")
