"""One function finds the tokenizer behind any path that can be meant."""

import shutil

import pytest

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_dept.tokenizers.load import load_tokenizer
from megatron_dept.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_dept.tokenizers.to_huggingface import to_huggingface


def test_files_and_directories(trained, tmp_path):
    shutil.copy(trained.path, tmp_path / "tokenizer.model")
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    assert load_tokenizer(str(trained.path)).fingerprint == trained.fingerprint == load_tokenizer(tmp_path).fingerprint
    to_huggingface(trained, tmp_path / "hf")
    for path in (tmp_path / "hf", tmp_path / "hf" / "tokenizer.json"):
        assert isinstance(load_tokenizer(path), HuggingFaceTokenizer)
    assert load_tokenizer(trained.path).kind == "sentencepiece"
    assert load_tokenizer(tmp_path / "hf").kind == "huggingface"


def test_two_tokenizers_in_one_directory_are_refused(trained, tmp_path):
    shutil.copy(trained.path, tmp_path / "tokenizer.model")
    to_huggingface(trained, tmp_path)
    with pytest.raises(DataError, match="holds both"):
        load_tokenizer(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(DataError, match="holds neither"):
        load_tokenizer(tmp_path)
    for name in ("none.model", "none.json", "none"):
        with pytest.raises(DataError, match=f"tokenizer .*{name} does not exist"):
            load_tokenizer(tmp_path / name)
    (tmp_path / "some.txt").touch()
    with pytest.raises(DataError, match=r"some\.txt is neither"):
        load_tokenizer(tmp_path / "some.txt")
