"""The sample is a pure function of texts and seed; training refuses what it cannot do, with the remedy."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers.chunks import SCORE_STEP
from megatron_dept.tokenizers.model_proto import NORMAL, parse_model
from megatron_dept.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_dept.tokenizers.train import coverage, sample_digest, sample_documents, train_sentencepiece


@settings(max_examples=100)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), min_size=1, max_size=30),
    budget=st.integers(1, 200),
    data=st.data(),
)
def test_the_sample_does_not_depend_on_order(texts, budget, data):
    sample = sample_documents(texts, budget, seed=3)
    shuffled = data.draw(st.permutations(texts))
    assert sample_documents(iter(shuffled), budget, seed=3) == sample
    assert sample.size == sum(len(text.encode()) for text in sample.documents) <= budget
    *whole, cut = sample.documents
    assert set(whole) <= set(texts)
    assert any(text.startswith(cut) for text in texts)
    if sum(len(text.encode()) for text in set(texts)) <= budget:
        assert set(sample.documents) == set(texts)
    else:
        assert sample.size > budget - 4  # a whole character of up to 4 bytes is kept or left


def test_the_seed_decides_the_sample():
    texts = [f"document {index}" for index in range(200)]
    samples = [sample_documents(texts, 300, seed).documents for seed in (1, 1, 2)]
    assert samples[0] == samples[1]
    assert set(samples[0]) != set(samples[2])
    assert sample_digest(samples[0]) == sample_digest(samples[1]) != sample_digest(samples[2])


def test_one_long_document_is_cut_at_a_line():
    sample = sample_documents(["first line\nsecond line\nthird"], 25, seed=0)
    assert sample.documents == ["first line\nsecond line\n"]


def test_a_larger_budget_adds_and_never_takes_away():
    texts = [f"text number {index} " * 3 for index in range(100)]
    small, large = (set(sample_documents(texts, budget, 0).documents[:-1]) for budget in (500, 2000))
    assert small < large


def test_no_text_is_refused():
    with pytest.raises(DataError, match="no text"):
        sample_documents([], 100, 0)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["\n\n"], 300)


def test_digest_parts_documents():
    assert sample_digest(["ab", "c"]) != sample_digest(["a", "bc"])


def test_training_is_deterministic(trained, documents):
    assert train_sentencepiece(documents, 420, trained.path.stem) == trained.path.read_bytes()


def test_unigram_scores_are_in_steps(documents):
    pieces = parse_model(train_sentencepiece(documents, 420, "unigram")).pieces
    scores = [piece.score for piece in pieces if piece.type == NORMAL]
    assert all(score / SCORE_STEP == round(score / SCORE_STEP) for score in scores)
    assert len(set(scores)) > 50


def test_spaces_and_breaks_become_pieces(trained):
    table = set(trained.token_bytes())
    assert {b"\n", b"\n\n", b"\t", b" ", b"  ", b"    "} <= table


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_vocabulary_that_the_text_cannot_fill_names_the_largest_that_it_can(model_type, tmp_path):
    text = ["hello world, hello you"] * 30
    with pytest.raises(DataError, match=r"vocab-size 5000 is too large .* (\d+) at most") as caught:
        train_sentencepiece(text, 5000, model_type)
    largest = int(str(caught.value).split("set it to ")[1].split()[0])
    path = tmp_path / "t.model"
    path.write_bytes(train_sentencepiece(text, largest, model_type))
    assert SentencePieceTokenizer(path).vocab_size == largest


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_vocabulary_below_the_characters_names_the_smallest(model_type):
    text = ["".join(map(chr, range(0x4E00, 0x4E80)))] * 3
    with pytest.raises(DataError, match=r"vocab-size 300 is too small .* raise it to (\d+) or more") as caught:
        train_sentencepiece(text, 300, model_type)
    least = int(str(caught.value).split("raise it to ")[1].split()[0])
    assert 259 + 128 <= least < 259 + 140


def test_impossible_options_are_refused():
    with pytest.raises(DataError, match="model type 'word'"):
        train_sentencepiece(["a"], 300, "word")
    with pytest.raises(DataError, match="cannot train a vocabulary of 99999999999999"):
        train_sentencepiece(["a b c"], 99999999999999)


def test_reserved_characters_do_not_lose_their_sentence(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train_sentencepiece(["zebra \u2585 zebra \u2581 zebra\0 zebra"] * 30, 275, "bpe"))
    assert b"zebra" in SentencePieceTokenizer(path).token_bytes()


@pytest.mark.parametrize("text", ["0", "1.1", "-1", "nan", "x"])
def test_coverage_is_a_share(text):
    assert coverage("1") == 1.0
    with pytest.raises(ValueError):
        coverage(text)
