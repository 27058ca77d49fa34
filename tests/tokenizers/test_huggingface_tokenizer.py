"""tokenizer.json of the common families: the bytes behind each id, the end, and documents free of specials."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_dept.tokenizers.vocabulary import required_ids

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=100, deadline=1000)
@given(text=TEXT)
def test_byte_level_bytes_are_the_text(families, text):
    tokenizer = families["gpt2_like"]
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes()[index] for index in ids) == text.encode()
    assert tokenizer.decode(ids) == text


@settings(max_examples=100, deadline=1000)
@given(text=TEXT.filter(lambda text: "\u2581" not in text))
def test_byte_fallback_bytes_are_the_text_after_its_added_space(families, text):
    tokenizer = families["llama2_like"]
    ids = tokenizer.encode(text)
    added = b" " if text else b""
    assert b"".join(tokenizer.token_bytes()[index] for index in ids) == added + text.encode()
    assert tokenizer.decode(ids) == text


def test_byte_ids(families):
    for name in ("gpt2_like", "llama2_like"):
        tokenizer = families[name]
        assert [tokenizer.token_bytes()[index] for index in tokenizer.byte_ids] == [bytes([b]) for b in range(256)]
        assert set(required_ids(tokenizer)) == {*tokenizer.byte_ids.tolist(), *tokenizer.special_ids.tolist()}
    assert families["llama2_like"].byte_ids.tolist() == list(range(3, 259))  # not the piece "a" for the byte


def test_a_tokenizer_without_bytes_says_so(families):
    tokenizer = families["metaspace_unigram"]
    assert tokenizer.token_bytes() == [b"", b"", b" ", b"a", b"b", b" ab"]
    assert not tokenizer.has_byte_fallback
    with pytest.raises(DataError, match=r"metaspace_unigram\.json has no token for each single byte"):
        tokenizer.byte_pieces(3)
    assert required_ids(tokenizer).tolist() == [0, 1]


def test_byte_pieces(families):
    tokenizer = families["llama2_like"]
    index = tokenizer.encode("ab")[-1]
    assert tokenizer.byte_pieces(index).tolist() == [3 + ord("a"), 3 + ord("b")]
    assert tokenizer.byte_pieces(tokenizer.eod_id).tolist() == []


def test_ends_and_specials(families):
    assert families["gpt2_like"].eod_id == 0
    assert families["llama2_like"].eod_id == 2
    assert families["llama2_like"].special_ids.tolist() == [0, 1, 2]
    assert families["metaspace_unigram"].special_ids.dtype == np.int64


def test_no_special_comes_from_text_and_none_is_added(families):
    tokenizer = families["gpt2_like"]
    ids = tokenizer.encode("a<|endoftext|>b, longer than the five tokens at which the file would truncate")
    assert tokenizer.eod_id not in ids
    assert len(ids) > 5
    assert tokenizer.encode_batch(["a", "a b c d"])[0] == tokenizer.encode("a")  # no padding to the longer one
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod_id]) == "a"


def test_an_added_token_stands_for_its_own_text(families):
    tokenizer = families["gpt2_like"]
    assert "für".encode() in tokenizer.token_bytes()
    assert len(tokenizer.encode("für")) == 1


def test_a_copy_in_another_process_reads_the_file_again(families):
    tokenizer = families["gpt2_like"]
    assert pickle.loads(pickle.dumps(tokenizer)).encode("the cat") == tokenizer.encode("the cat")


def test_ids_with_gaps(families, tmp_path):
    spec = json.loads(families["llama2_like"].path.read_text())
    del spec["model"]["vocab"]["\u2581a"], spec["model"]["merges"][1]
    spec["model"]["vocab"]["ab"] = 300
    path = tmp_path / "gaps.json"
    path.write_text(json.dumps(spec))
    tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.vocab_size == 301
    assert tokenizer.token_bytes()[270] == b""
    assert tokenizer.encode("xab")[-1] == 300


def change(families, tmp_path, **fields):
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(json.loads(families["metaspace_unigram"].path.read_text()) | fields))
    return path


def test_an_unknown_decoder_is_named(families, tmp_path):
    path = change(families, tmp_path, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(DataError, match=r"changed\.json has decoder step WordPiece"):
        HuggingFaceTokenizer(path).token_bytes()
    with pytest.raises(DataError, match="decoder step none"):
        HuggingFaceTokenizer(change(families, tmp_path, decoder=None)).token_bytes()


def test_a_file_without_an_end_token_is_refused(families, tmp_path):
    spec = json.loads(families["metaspace_unigram"].path.read_text())
    spec["model"]["vocab"][0][0] = "<end>"
    path = change(families, tmp_path, model=spec["model"], added_tokens=[])
    with pytest.raises(DataError, match=r"changed\.json has no end-of-document token; add one of <\|endoftext\|>"):
        HuggingFaceTokenizer(path)


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"a": 1}', b"[1, 2"])
def test_a_foreign_file_is_refused_by_name(tmp_path, data):
    path = tmp_path / "broken.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"broken\.json is not a Hugging Face tokenizer\.json"):
        HuggingFaceTokenizer(path)
