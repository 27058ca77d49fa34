"""The report of a GPU check: one JSON file with everything, one Markdown file to be read."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KEPT_TESTS = 40


def write(folder: Path, entries: Sequence[dict[str, Any]], command: str, device: str) -> tuple[Path, Path]:
    """Write `gpu-<card>.json` and `.md` into `folder`; a rehearsal's files say so in their names too."""
    facts: dict[str, Any] = next((each["data"] for each in entries if each["step"] == "facts" and each["data"]), {})
    name = "gpu-rehearsal" if device == "cpu" else f"gpu-{slug(str(facts.get('card', 'unknown')))}"
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"rehearsal": device == "cpu", "command": command, "facts": facts, "steps": list(entries)}
    paths = folder / f"{name}.json", folder / f"{name}.md"
    for path, text in zip(paths, (json.dumps(whole, indent=1) + "\n", markdown(whole)), strict=True):
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text)
        partial.replace(path)
    return paths


def slug(card: str) -> str:
    """`NVIDIA H200` -> `h200`."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-") or "unknown"


def markdown(whole: dict[str, Any]) -> str:
    """The report as Markdown: facts, the steps, a table each, what failed with its last lines."""
    facts = whole["facts"]
    lines = [f"# GPU check: {facts.get('card', 'card not known')}", ""]
    if whole["rehearsal"]:
        lines += ["**A rehearsal on the CPU with tiny sizes: none of its figures means anything.**", ""]
    lines += [f"`{whole['command']}`", ""]
    lines += _table(("fact", "value"), [(key.replace("_", " "), value) for key, value in facts.items()])
    lines += ["", "Copy bandwidth counts bytes read and written; the product is bf16, of random numbers.", ""]
    rows = [(e["step"], e["status"], f"{e['seconds']:.0f}", e.get("message", ""), e["at"]) for e in whole["steps"]]
    lines += _table(("step", "result", "s", "", "at"), rows)
    sections = {"build": _build, "parity": _parity, "bandwidth": _bandwidth, "step": _step, "sanitizer": _sanitizer}
    for entry in whole["steps"]:
        if entry["data"] and entry["step"] in sections:
            try:
                lines += ["", *sections[entry["step"]](entry["data"])]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                # Half-written figures of a step that was ended: the JSON file has them as they are.
                lines += ["", f"## {entry['step'].capitalize()}", "", f"Its figures are not complete ({error!r})."]
    for entry in whole["steps"]:
        if entry["status"] == "failed":
            lines += ["", f"## {entry['step']} failed", "", f"`{entry['command']}`", "", "```", *entry["tail"], "```"]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


def _build(data: dict[str, Any]) -> list[str]:
    lines = ["## Build", "", f"{data['seconds']} s; native kernels in use: {'yes' if data['native'] else 'no'}.", ""]
    registers = data.get("registers", "not asked for")
    if not isinstance(registers, dict):
        return [*lines, f"Registers: {registers}."]
    architectures = sorted({name for used in registers.values() for name in used}, key=lambda name: int(name[3:]))
    rows = []
    for kernel, used in registers.items():
        cells = [_used(used[name]) if name in used else "" for name in architectures]
        rows.append((f"`{kernel}`", *cells))
    return [
        *lines,
        "Registers of a thread (and bytes spilled, where any are):",
        "",
        *_table(("kernel", *architectures), rows),
    ]


def _used(used: dict[str, int]) -> str:
    spilled = used.get("spilled", 0)
    return f"{used['registers']}" + (f" ({spilled} spilled)" if spilled else "")


def _parity(data: dict[str, Any]) -> list[str]:
    lines = ["## Parity", "", f"{data['passed']} passed, {data['failed']} failed, {data['skipped']} skipped.", ""]
    order = {"failed": 0, "skipped": 1, "passed": 2}
    cases = sorted(data["cases"], key=lambda case: (order[case["status"]], -case["seconds"]))
    rows = [
        (case["name"], case["status"], case["seconds"], case.get("message", "")[:200].replace("\n", " "))
        for case in cases
    ]
    lines += _table(("test", "result", "s", ""), rows[:KEPT_TESTS])
    return lines + (
        [f"\n{len(rows) - KEPT_TESTS} more passed or are in the JSON file."] if len(rows) > KEPT_TESTS else []
    )


def _bandwidth(data: dict[str, Any]) -> list[str]:
    lines = [
        "## Bandwidth of each kernel",
        "",
        f"Share of the copy's {data['copy_tb_per_second']:.2f} TB/s, by the bytes that the kernel must move; "
        f"microseconds in brackets. The goal is {data['goal']:.0%} for the kernels marked *.",
        "",
    ]
    peers = sorted({name for entry in data["cases"] for name in entry["variants"]} - {"kernel"})
    rows = []
    for entry in data["cases"]:
        own = entry["variants"].get("kernel", {})
        mark = "*" if entry["goal"] else ""
        met = "" if not entry["goal"] or "of_copy" not in own else "yes" if own["of_copy"] >= data["goal"] else "NO"
        rest = [_cell(entry["variants"].get(peer)) for peer in peers]
        rows.append((f"{entry['case']}{mark}", f"{entry['bytes'] / 1e9:.2f}", _cell(own or None), met, *rest))
    lines += _table(("kernel", "GB", "ours", "goal met", *peers), rows)
    lines += ["", *[f"- {name}: {state}" for name, state in data["peers"].items()]]
    return lines + [f"- {name} failed: {message}" for name, message in data["failed"].items()]


def _cell(values: dict[str, Any] | None) -> str:
    if values is None:
        return ""
    return "not present" if "of_copy" not in values else f"{values['of_copy']:.1%} ({values['microseconds']:,.0f})"


def _step(data: dict[str, Any]) -> list[str]:
    lines = ["## Training step", ""]
    rows = []
    for entry in data["cases"]:
        if "error" in entry:
            rows.append((entry["case"], entry["error"], *[""] * 7))
            continue
        sheet, peak = entry["mfu_datasheet"], entry["peak_gib"]
        rows.append(
            (
                entry["case"],
                f"{entry['tokens_per_second']:,}",
                f"{entry['step_ms']:.1f}",
                f"{entry['tflops']:.1f}",
                "" if sheet is None else f"{sheet:.1%}",
                f"{entry['mfu_measured_product']:.1%}",
                "" if peak is None else f"{peak:.1f}",
                f"{entry['first_loss']:.3f}, {entry['last_loss']:.3f}",
                " + ".join(f"{value:.1f}" for value in entry["round_end_ms"].values()),
            )
        )
    head = ("case", "tokens/s", "ms a step", "TFLOP/s", "MFU, datasheet", "MFU, measured product", "peak GiB")
    lines += _table((*head, "first and last loss", "ms of pack + outer step + write back"), rows)
    lines += ["", "Operations as models/flops.py counts them: the head included, recomputation left out.", ""]
    lines += ["The head alone, forward and backward, by tokens a chunk:", ""]
    heads = [
        (
            e["hidden"],
            f"{e['vocabulary']:,}",
            f"{e['chunk']:,}",
            e.get("ms", e.get("error")),
            e.get("of_product_rate", ""),
        )
        for e in data["head"]
    ]
    lines += _table(("h", "V", "chunk", "ms", "of the product rate"), heads)
    lines += ["", "The head's gradient of one chunk onto the fp32 table, in blocks (as it is) and in one product:", ""]
    gradients = [
        (e["hidden"], f"{e['vocabulary']:,}", f"{e['chunk']:,}", e["ms"], e["ms_one_product"])
        for e in data["table_gradient"]
    ]
    lines += _table(("h", "V", "chunk", "ms", "ms in one product"), gradients)
    return lines + [f"- left out for time: {name}" for name in data["left_out"]]


def _sanitizer(data: dict[str, Any]) -> list[str]:
    lines = ["## compute-sanitizer", ""]
    rows = [
        (e["tool"], e["status"], e.get("errors", ""), e.get("ours", ""), e.get("seconds", ""), e.get("message", ""))
        for e in data["tools"]
    ]
    lines += _table(("tool", "result", "errors", "in our kernels", "s", ""), rows) if rows else ["Not present."]
    for entry in data["tools"]:
        if entry["status"] == "failed" and (entry.get("lines") or entry.get("tail")):
            lines += ["", f"{entry['tool']}:", "", "```", *entry.get("lines", []), *entry.get("tail", []), "```"]
    return lines
