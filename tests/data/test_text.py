"""Documents are read as they stand; what is not valid is named by file and line."""

import gzip
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dept.common.errors import DataError
from megatron_dept.data.text import TextFormat, find_files, read_documents

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: not text.isspace() and not text.startswith("\ufeff")
)
WRITERS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def read(path, data, form=TextFormat()):  # noqa: B008  frozen
    path.write_bytes(data)
    return list(read_documents(path, form))


@settings(max_examples=60, deadline=1000)
@given(texts=st.lists(TEXT, max_size=5), suffix=st.sampled_from(sorted(WRITERS)))
def test_json_lines_come_back(tmp_path_factory, texts, suffix):
    path = tmp_path_factory.getbasetemp() / f"some.jsonl{suffix}"
    lines = b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)
    assert read(path, WRITERS[suffix](lines)) == texts


@settings(max_examples=60, deadline=1000)
@given(text=TEXT, suffix=st.sampled_from(sorted(WRITERS)))
def test_a_text_file_is_one_document(tmp_path_factory, text, suffix):
    path = tmp_path_factory.getbasetemp() / f"some.txt{suffix}"
    assert read(path, WRITERS[suffix](text.encode())) == [text]


def test_separators(tmp_path):
    data = b"one\ntwo\r\n\n \t\nthree\r\n  four\n\n\n"
    path = tmp_path / "a.txt"
    assert read(path, data) == [data.decode()]
    assert read(path, data, TextFormat(separator="line")) == ["one", "two", "three", "  four"]
    assert read(path, data, TextFormat(separator="blank-line")) == ["one\ntwo", "three\r\n  four"]
    assert read(path, b"last line without end", TextFormat(separator="blank-line")) == ["last line without end"]


def test_white_space_alone_is_no_document(tmp_path):
    assert read(tmp_path / "a.txt", b" \n\t\n") == []
    assert read(tmp_path / "a.txt", b"") == []
    assert read(tmp_path / "a.jsonl", b'{"text": ""}\n\n{"text": " \\n"}\n{"text": "x"}\n') == ["x"]
    for separator in ("line", "blank-line"):
        assert read(tmp_path / "a.txt", b"\n\n", TextFormat(separator=separator)) == []


def test_a_byte_order_mark_is_no_text(tmp_path):
    for separator in ("file", "line", "blank-line"):
        assert read(tmp_path / "a.txt", b"\xef\xbb\xbfx", TextFormat(separator=separator)) == ["x"]
    assert read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}') == ["x"]


def test_text_key(tmp_path):
    assert read(tmp_path / "a.json", b'{"text": 1, "body": "x"}', TextFormat(text_key="body")) == ["x"]


@pytest.mark.parametrize("separator", ["file", "line", "blank-line"])
def test_invalid_utf8_is_named_by_line(tmp_path, separator):
    with pytest.raises(DataError, match=r"a\.txt line 3 is not valid UTF-8 \(byte 0xe9"):
        read(tmp_path / "a.txt", b"good\n\ncaf\xe9\nx", TextFormat(separator=separator))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}', r"a\.jsonl line 3 is not valid UTF-8 \(byte 0xe9"),
        (b'{"text": "x"', r"a\.jsonl line 3 is not JSON"),
        (b"plain text", r"a\.jsonl line 3 is not JSON"),
        (b'{"text": "\\ud800"}', r"a\.jsonl line 3 is not JSON"),
        (b'["text"]', r"a\.jsonl line 3 is not a JSON object"),
        (b'{"txt": "x", "n": 1}', r"a\.jsonl line 3: field 'text' is missing \(fields: 'txt', 'n'\); .* --text-key"),
        (b"{}", r"a\.jsonl line 3: field 'text' is missing \(fields: none\)"),
        (b'{"text": 5}', r"a\.jsonl line 3: field 'text' is not text"),
        (b'{"text": null}', r"a\.jsonl line 3: field 'text' is not text"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl", b'{"text": "x"}\n\n' + line + b'\n{"text": "y"}\n')


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("broken", ["cut", "garbage", "tail"])
def test_a_broken_compressed_file_is_refused(tmp_path, suffix, broken):
    whole = WRITERS[suffix](b"".join(b"line %d\n" % number for number in range(5000)))
    data = {"cut": whole[: len(whole) // 2], "garbage": b"garbage", "tail": whole + b"tail"}[broken]
    with pytest.raises(DataError, match=rf"a\.txt\{suffix} is not a whole {suffix} file"):
        read(tmp_path / f"a.txt{suffix}", data)


def test_frames_one_after_another_are_one_file(tmp_path):
    for suffix, compress in WRITERS.items():
        assert read(tmp_path / f"a.txt{suffix}", compress(b"one ") + compress(b"two")) == ["one two"]


def test_find_files(tmp_path):
    names = ["b.txt", "a.jsonl", "sub/c.txt.gz", "sub/d.json.zst", "sub/e.py", ".hidden/f.txt", "g.md", "h.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs):
        return [str(path.relative_to(tmp_path)) for path in find_files([str(tmp_path / given) for given in inputs])]

    assert found("") == ["a.jsonl", "b.txt", "sub/c.txt.gz", "sub/d.json.zst"]
    assert found("sub/e.py", "g.md") == ["sub/e.py", "g.md"]  # named ones whatever their suffix, in the order given
    assert found("*.txt", "") == ["b.txt", "a.jsonl", "sub/c.txt.gz", "sub/d.json.zst"]  # none twice
    assert found("**/*.py") == ["sub/e.py"]


@pytest.mark.parametrize("given_input", ["none.txt", "*.none", "empty"])
def test_an_input_that_matches_nothing_is_named(tmp_path, given_input):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="input .*" + given_input.replace("*", r"\*")):
        find_files([tmp_path / given_input])


def test_a_file_that_goes_or_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt does not exist"):
        list(read_documents(tmp_path / "gone.txt", TextFormat()))
    (tmp_path / "dir.txt").mkdir()
    with pytest.raises(DataError, match=r"dir\.txt cannot be read: Is a directory"):
        list(read_documents(tmp_path / "dir.txt", TextFormat()))
