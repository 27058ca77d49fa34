"""A model of ours gives every text back, and says which bytes each id stands for."""

import hashlib
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_dept.tokenizers.train import train_sentencepiece

# Any text that UTF-8 can hold, and more often than chance what is special to sentencepiece.
TEXT = st.text(
    st.one_of(st.sampled_from("ab \n\t\r\u2581\u2585\0<0x41>/s"), st.characters(exclude_categories=["Cs"])), max_size=80
)


@settings(max_examples=150, deadline=1000)
@given(texts=st.lists(TEXT, max_size=4))
def test_any_text_comes_back(trained, texts):
    encoded = trained.encode_batch(texts)
    assert [trained.decode(ids) for ids in encoded] == texts
    assert encoded == [trained.encode(text) for text in texts]


@settings(max_examples=100, deadline=1000)
@given(text=TEXT)
def test_token_bytes_are_the_text(trained, text):
    table = trained.token_bytes()
    assert b"".join(table[index] for index in trained.encode(text)) == text.encode()


@settings(max_examples=50, deadline=1000)
@given(data=st.data())
def test_byte_pieces_spell_the_token(trained, data):
    index = data.draw(st.integers(0, trained.vocab_size - 1))
    pieces = trained.byte_pieces(index)
    assert pieces.dtype == np.int64
    assert b"".join(trained.token_bytes()[piece] for piece in pieces) == trained.token_bytes()[index]
    assert set(pieces.tolist()) <= set(trained.byte_ids.tolist())


def test_whole_lines_are_encoded_as_sentencepiece_does(trained):
    line = "return self.x == (a)  für naïve"
    assert trained.encode(line) == sentencepiece.SentencePieceProcessor(model_file=str(trained.path)).encode(line)


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "<0x0A>", "a</s>b"])
def test_the_letters_of_a_special_stay_letters(trained, text):
    assert not set(trained.encode(text)) & set(trained.special_ids.tolist())
    assert trained.decode(trained.encode(text)) == text


def test_ids(trained):
    assert trained.eod_id == 2
    assert trained.special_ids.tolist() == [0, 1, 2]
    assert trained.special_ids.dtype == np.int64
    assert trained.byte_ids.tolist() == list(range(3, 259))
    assert trained.vocab_size == 420
    assert len(trained.token_bytes()) == 420
    assert [trained.token_bytes()[index] for index in (0, 1, 2, 3, 258)] == [b"", b"", b"", b"\0", b"\xff"]
    assert trained.has_byte_fallback
    assert trained.fingerprint == hashlib.sha256(trained.path.read_bytes()).hexdigest()


def test_specials_give_no_text_and_broken_bytes_the_replacement_character(trained):
    ids = trained.encode("ab")
    assert trained.decode([1, *ids, trained.eod_id]) == "ab"
    assert trained.decode(trained.byte_ids[[0xE6, 0x97]]) == "\ufffd"


@pytest.mark.parametrize("index", [-1, 420])
def test_an_id_outside_the_vocabulary_is_named(trained, index):
    with pytest.raises(DataError, match=f"id {index} .*420 ids"):
        trained.decode([5, index])
    with pytest.raises(DataError, match=f"id {index} "):
        trained.byte_pieces(index)


def test_a_copy_in_another_process_reads_the_file_again(trained):
    copy = pickle.loads(pickle.dumps(trained))
    assert copy.encode("return a") == trained.encode("return a")
    assert len(pickle.dumps(trained)) < 1000  # the path, not the model


def test_long_lines_and_long_runs_come_back(trained):
    for text in ("a" * 3000, "\n" * 500 + "x" + "\r\n" * 200, "word " * 1000, "\u2581" * 700, " " * 2000):
        assert trained.decode(trained.encode(text)) == text


def test_text_without_a_space_still_learns_one(tmp_path):
    path = tmp_path / "t.model"
    for model_type in ("unigram", "bpe"):
        path.write_bytes(train_sentencepiece(["日本語日本日本語"] * 20, 264, model_type))
        tokenizer = SentencePieceTokenizer(path)
        assert tokenizer.decode(tokenizer.encode("日 本 a b")) == "日 本 a b"


def test_a_model_of_others_is_read_as_sentencepiece_reads_it(train_foreign, tmp_path):
    tokenizer = SentencePieceTokenizer(train_foreign(tmp_path / "f.model", vocab_size=30))
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("the  cat")) == "the cat"
    assert not tokenizer.has_byte_fallback
    with pytest.raises(DataError, match="no token for each single byte"):
        _ = tokenizer.byte_ids


def test_a_model_without_an_end_is_refused(train_foreign, tmp_path):
    with pytest.raises(DataError, match="no end-of-sentence piece"):
        SentencePieceTokenizer(train_foreign(tmp_path / "f.model", vocab_size=30, eos_id=-1))


@pytest.mark.parametrize("data", [b"", b"hello", b"\x0a\xff\xff\xff\xff\x0f", b'{"model": {}}'])
def test_a_foreign_file_is_refused_by_name(tmp_path, data):
    path = tmp_path / "broken.model"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"broken\.model.* give a \.model file"):
        SentencePieceTokenizer(path)


def test_a_truncated_file_is_refused(trained, tmp_path):
    path = tmp_path / "short.model"
    path.write_bytes(trained.path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"short\.model"):
        SentencePieceTokenizer(path)
