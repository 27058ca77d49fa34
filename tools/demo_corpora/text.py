"""Cleaning of raw text into documents: valid, without repeated paragraphs, of sensible length, in a fixed order."""

import ast
import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

SHORTEST_DOCUMENT = 200  # characters; less teaches a model little but document ends
LONGEST_DOCUMENT = (
    8_000  # characters; longer ones are cut at paragraph ends, so that a split by document is fine-grained
)
SHORTEST_REPEAT = 48  # characters; a shorter paragraph ("return None") may repeat honestly
MOST_DIGITS = 0.4  # of a paragraph's visible characters; more is a table of numbers

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\ufeff\ufffd]")
_BLANK_LINES = re.compile(r"\n{3,}")


def clean(text: str) -> str:
    """Unix line ends, NFC, no control characters or trailing blanks, at most one blank line in a row."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(line.rstrip() for line in _CONTROL.sub("", text).split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def meaning_order(names: Iterable[str]) -> list[str]:
    """The names in an order that mixes them and depends on nothing but themselves (by SHA-256)."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


class Documents:
    """Turns texts into documents until there are `max_bytes` of UTF-8: cleaned, deduplicated by paragraph, cut."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.repeated = 0
        self._seen: set[bytes] = set()

    def collect(self, texts: Iterable[str]) -> Iterator[str]:
        """Documents of the texts in order; stops reading `texts` when there is enough."""
        for text in texts:
            for document in cut(self.without_repeats(clean(text))):
                size = len(document.encode())
                if self.bytes + size > self.max_bytes:
                    return
                self.bytes += size
                yield document

    def without_repeats(self, text: str) -> str:
        """The text less the paragraphs that came before (licence headers, refrains), and less tables of numbers."""
        kept = []
        for paragraph in text.split("\n\n"):
            if len(paragraph) >= SHORTEST_REPEAT:
                if sum(map(str.isdigit, paragraph)) > MOST_DIGITS * len("".join(paragraph.split())):
                    continue
                key = hashlib.blake2b(paragraph.strip().encode(), digest_size=12).digest()
                if key in self._seen:
                    self.repeated += 1
                    continue
                self._seen.add(key)
            kept.append(paragraph)
        return "\n\n".join(kept)


def cut(text: str) -> Iterator[str]:
    """Documents of SHORTEST_DOCUMENT to about LONGEST_DOCUMENT characters, cut at paragraph ends, else at line ends."""
    piece: list[str] = []
    size = 0
    for part, separator in _parts(text):
        if piece and size + len(part) > LONGEST_DOCUMENT:
            yield from _long_enough("".join(piece))
            piece, size = [], 0
        piece += [part, separator]
        size += len(part) + len(separator)
    yield from _long_enough("".join(piece))


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """(part, what separates it from the next): paragraphs, and the lines of a paragraph that is too long."""
    for paragraph in text.split("\n\n"):
        if len(paragraph) <= LONGEST_DOCUMENT:
            yield paragraph, "\n\n"
            continue
        for line in paragraph.split("\n"):
            for start in range(0, max(1, len(line)), LONGEST_DOCUMENT):
                yield line[start : start + LONGEST_DOCUMENT], "\n"


def _long_enough(text: str) -> Iterator[str]:
    text = text.strip("\n")
    if len(text) >= SHORTEST_DOCUMENT:
        yield text


def without_docstrings(source: str) -> str | None:
    """Python source with its docstrings taken out (English would leak across sources); None where it does not parse."""
    tree = _parse(source)
    if tree is None:
        return None
    lines = source.split("\n")
    for statement, body in sorted(_docstrings(tree), key=lambda item: -item[0].lineno):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before = lines[first].encode()[: statement.col_offset].decode()
        after = lines[last].encode()[statement.end_col_offset :].decode()
        rest = before + ("pass" if len(body) == 1 else "") + after.lstrip("; ")
        lines[first : last + 1] = [rest] if rest.strip() else []
    return "\n".join(lines)


def docstrings(source: str) -> str | None:
    """The docstrings of Python source, dedented, with a blank line between; None where it does not parse."""
    tree = _parse(source)
    if tree is None:
        return None
    found = sorted(_docstrings(tree), key=lambda item: item[0].lineno)
    texts = (statement.value.value for statement, _ in found)  # type: ignore[attr-defined]
    return "\n\n".join(_dedent(text) for text in texts)


def _parse(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _docstrings(tree: ast.Module) -> Iterator[tuple[ast.Expr, list[ast.stmt]]]:
    """(the docstring's statement, the body it opens) of the module and of every class and function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first, node.body


def _dedent(text: str) -> str:
    lines = text.expandtabs().strip().split("\n")
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(margins, default=0)
    return "\n".join([lines[0], *(line[margin:] for line in lines[1:])])
