"""Chunks give the text back, are short, and are the same to Python and to Oniguruma."""

import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from megatron_dept.tokenizers.chunks import CHUNK_PATTERN, MAX_CHUNK_CHARACTERS, split_chunks

# Runs, so that the limits of 64 line breaks and 512 characters are met.
RUNS = st.lists(
    st.tuples(st.sampled_from(["\n", "\r", "\r\n", " ", "a", "ab ", "é", "日", "\0", "\t"]), st.integers(1, 600)),
    max_size=6,
).map(lambda runs: "".join(text * count for text, count in runs))


@settings(max_examples=200, deadline=1000)
@given(text=RUNS)
def test_chunks(text):
    chunks = split_chunks(text)
    assert "".join(chunks) == text
    assert all(0 < len(chunk) <= MAX_CHUNK_CHARACTERS for chunk in chunks)
    split = pre_tokenizers.Split(tokenizers.Regex(CHUNK_PATTERN), behavior="isolated")
    assert [chunk for chunk, _ in split.pre_tokenize_str(text)] == chunks


def test_lines_are_led_by_their_breaks():
    assert split_chunks("a b\n\n  c\r\nd\n") == ["a b", "\n\n  c", "\r\nd", "\n"]


def test_a_long_line_is_cut_before_a_space():
    chunks = split_chunks("word " * 300)
    assert len(chunks) > 1
    assert all(chunk.startswith(" word") for chunk in chunks[1:])


def test_a_long_run_of_breaks_stays_with_its_line():
    assert split_chunks("\n" * 100 + "x") == ["\n" * 64, "\n" * 36 + "x"]
