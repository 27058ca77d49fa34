"""The report as one self-contained HTML page: pictures inside it, no script, nothing fetched."""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from megatron_dept.evaluation.report.figures import short
from megatron_dept.evaluation.report.schema import Communication, Report, Row, Table
from megatron_dept.evaluation.report.style import DPI, colour_of
from megatron_dept.evaluation.report.tables import AVERAGE, cell

CSS_DPI = 96  # pixels of a page an inch

_CSS = """
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; color: #22272e; background: #fff;
  max-width: 1120px; margin: 2.5rem auto 5rem; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 2.8rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.8rem 0 .3rem; } p { max-width: 52rem; margin: .4rem 0; }
.faint, caption, small { color: #6a727b; } img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
ul { padding-left: 1.2rem; max-width: 54rem; } li { margin: .3rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1.5px solid #22272e; vertical-align: bottom; font-size: .88rem;
  white-space: normal; }
th:first-child, td:first-child, .text { text-align: left; } td:first-child { font-weight: 600; }
tr.rule td { border-top: 1px solid #c6cbd1; } td small { display: block; font-size: .76rem; line-height: 1.25; }
.best { font-weight: 700; text-decoration: underline; text-underline-offset: 3px; } .good { color: #1b7f4b; }
.bad { color: #b3261e; } .other { color: #8b929b; font-style: italic; } .average { background: #f5f6f7; }
"""


def write_page(report: Report, folder: Path) -> str:
    """The page's HTML; pictures are read from `folder` and put inside."""
    parts = [
        "<h1>DEPT: decoupled embeddings, compared</h1>",
        f'<p class="faint">{len(report.runs)} runs, {len(report.trained_sources)} sources: '
        f"{escape(', '.join(report.trained_sources))}.</p>",
        _bullets(report.findings),
        *_score_sections(report, folder),
        *_curve_sections(report, folder),
        *_cost_sections(report, folder),
        "<h2>Stability</h2>",
        "<p>Norms during pre-training. The paper finds that STD's climb and DEPT's stay flat.</p>",
        _picture(report, folder, "norms"),
        "<h2>The runs</h2>",
        "<p>Methods are compared at equal total tokens. DEPT's sources train beside one another, so it takes fewer "
        "steps one after another.</p>",
        _runs_table(report),
        "<h3>Notes</h3>",
        _bullets(report.notes),
        '<p class="faint">Every number here is in <code>report.json</code> beside this page; '
        "<code>docs/report-schema.md</code> describes its fields.</p>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>DEPT report</title>\n<style>{_CSS}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _score_sections(report: Report, folder: Path) -> list[str]:
    adapted = [table for table in report.tables if table.when != "before_adapt"]
    before = [table for table in report.tables if table.when == "before_adapt"]
    parts = ["<h2>Held-out text after adapt</h2>"]
    parts.append(
        "<p>Perplexity, and below it bits per byte, on text held out by document. Percentages are against the best "
        "baseline (STD or ACT) of the column: minus is lower, so better; plus is worse. The best of a column is "
        "underlined.</p>"
    )
    parts += [_picture(report, folder, "improvement")]
    parts += [_score_table(table) for table in adapted] or ["<p>No run was evaluated after adapt.</p>"]
    if before:
        parts.append("<h2>Held-out text before adapt</h2>")
        parts.append(
            "<p>Each source in the vocabulary it was trained in. Perplexity compares on the same tokens only "
            '(<span class="other">italic</span>: another tokenizer, or many tokens scored by their bytes because the '
            "vocabulary lacks them); bits per byte compare always. Under TRIM and SPEC the softmax runs over the "
            "source's tokens alone.</p>"
        )
        parts += [_score_table(table) for table in before]
    return parts


def _score_table(table: Table) -> str:
    columns = table.sources + ([AVERAGE] if len(table.sources) > 1 else [])
    head = "".join(f'<th class="{_column_class(column)}">{escape(column)}</th>' for column in columns)
    best = {column: _best(table.rows, column) for column in columns}
    lines = []
    for index, row in enumerate(table.rows):
        rule = ' class="rule"' if index and table.rows[index - 1].baseline and not row.baseline else ""
        cells = "".join(f'<td class="{_column_class(c)}">{_score_cell(row, c, best[c])}</td>' for c in columns)
        lines.append(f"<tr{rule}>{_method_cell(row.method)}{cells}</tr>")
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr><th>method</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _column_class(column: str) -> str:
    return "average" if column == AVERAGE else ""


def _best(rows: Sequence[Row], column: str) -> tuple[float, float]:
    """(lowest perplexity of those that compare, lowest bits per byte) of a column."""
    scores = [score for row in rows if (score := cell(row, column)) is not None]
    perplexity = min((score.perplexity for score in scores if score.perplexity_compares), default=math.nan)
    return perplexity, min((score.bits_per_byte for score in scores), default=math.nan)


def _score_cell(row: Row, column: str, best: tuple[float, float]) -> str:
    score = cell(row, column)
    if score is None:
        return "–"
    compares = score.perplexity_compares
    perplexity = _marked(number(score.perplexity), compares and score.perplexity == best[0], not compares)
    bits = _marked(f"{score.bits_per_byte:.3f}", score.bits_per_byte == best[1], False)
    return (
        f"{perplexity} {_change(score.perplexity_improvement)}"
        f"<small>{bits} bits/byte {_change(score.bits_per_byte_improvement)}</small>"
    )


def _marked(text: str, best: bool, other: bool) -> str:
    kind = "best" if best else "other" if other else ""
    return f'<span class="{kind}">{text}</span>' if kind else text


def _change(improvement: float | None) -> str:
    """Lower is better, so an improvement of 5 % is written as -5 %."""
    if improvement is None:
        return ""
    kind = "good" if improvement > 0 else "bad"
    return f'<span class="{kind}">{-improvement:+.1f} %</span>'.replace("-", "\N{MINUS SIGN}")


def _curve_sections(report: Report, folder: Path) -> list[str]:
    parts = []
    for name, title, text in (
        ("adapt_bits_per_byte", "Learning during adapt", "Held-out text while all methods train one global vocabulary "
         "from random embeddings: how plastic the bodies are."),
        ("heldout_bits_per_byte", "Learning during pre-training", "Held-out text by source, in bits per byte, over the "
         "tokens that the whole run has trained. Baselines dashed."),
        ("training_loss", "Training loss", "Nats a token, smoothed; across tokenizers (SPEC-OPT) and trimmed "
         "vocabularies these do not compare. STD and ACT train a blend of the sources, shown in the last panel."),
    ):  # fmt: skip
        if picture := _picture(report, folder, name):
            parts += [f"<h2>{title}</h2>", f"<p>{text}</p>", picture]
    return parts


def _cost_sections(report: Report, folder: Path) -> list[str]:
    parts = []
    if report.memory:
        rows = [
            [
                _method_cell(entry.method), number(entry.vocabulary_mean, 0), number(entry.vocabulary_largest, 0),
                short(entry.parameters_mean), f"{entry.megabytes_mean:,.2f}", short(entry.model_parameters_mean),
                _times(entry.reduction),
            ]
            for entry in report.memory
        ]  # fmt: skip
        head = (
            "method",
            "ids, mean",
            "ids, largest",
            "embedding parameters",
            "MB in fp32",
            "model parameters",
            "smaller by",
        )
        parts += [
            "<h2>Embedding memory</h2>",
            "<p>What a silo holds while it trains a source, mean over sources. Gradients and AdamW's two moments come "
            "in the same proportion on top.</p>",
            _picture(report, folder, "embedding_memory"),
            _table(head, rows),
        ]
    if report.communication:
        parts += [
            "<h2>Communication</h2>",
            "<p>Bytes counted where they are sent, summed over ranks, beside the paper's formula for this "
            "configuration. Training counts gradients, body, embedding and position rows; control messages and "
            "evaluation are listed and not compared. A method that runs several sources in turn on one silo exchanges "
            "embedding rows for each, which the formula, with a silo for each source, does not have.</p>",
            _picture(report, folder, "communication"),
            *_communication_tables(report.communication),
        ]
    parts += ["<h3>By the formulas, at the paper's sizes (500 local steps)</h3>", _paper_table(report)]
    return parts


def _communication_tables(entries: Sequence[Communication]) -> list[str]:
    head = ("method", "steps", "training, measured", "computed beforehand", "formula", "parameters, formula",
            "less than STD, measured", "... a token", "by formula, parameters", "by formula, bytes")  # fmt: skip
    rows = [
        [
            _method_cell(entry.method), f"{entry.steps:,}", f"{short(entry.training_bytes_per_step)}B",
            _bytes(entry.predicted_bytes_per_step), _bytes(entry.formula_bytes_per_step),
            short(entry.formula_parameters_per_step), _times(entry.reduction_measured),
            _times(entry.reduction_measured_per_token), _times(entry.reduction_formula_parameters),
            _times(entry.reduction_formula_bytes),
        ]
        for entry in entries
    ]  # fmt: skip
    kinds = list(dict.fromkeys(kind for entry in entries for kind in entry.bytes_by_kind))
    by_kind = [
        [_method_cell(e.method), *(_bytes(e.bytes_by_kind.get(kind, 0) / e.steps) for kind in kinds)] for e in entries
    ]
    links = {"federation": "between silos", "silo": "inside silos"}
    names = ["method"]
    for scope, kind in (name.split("/") for name in kinds):
        names.append(f"{kind} {links.get(scope, scope)}")
    return [
        "<h3>Bytes a sequential step</h3>", _table(head, rows),
        "<h3>Measured, by kind and by the link they crossed</h3>", _table(names, by_kind),
    ]  # fmt: skip


def _paper_table(report: Report) -> str:
    rows, last = [], None
    for entry in report.paper:
        rows.append(
            [
                f'<td class="text">{escape(entry.setting) if entry.setting != last else ""}</td>',
                f'<td class="text">{escape(entry.method)}</td>', short(entry.embedding_parameters),
                short(entry.model_parameters), short(entry.parameters_per_step), _times(entry.reduction_parameters),
                _times(entry.reduction_bytes),
            ]
        )  # fmt: skip
        last = entry.setting
    head = (
        "setting",
        "method",
        "embedding parameters",
        "model parameters",
        "parameters a step",
        "less than STD",
        "in bytes",
    )
    return _table(head, rows)


def _runs_table(report: Report) -> str:
    rows = []
    for run in report.runs:
        phase = run.phase if run.protocol is None else f"adapt, {run.protocol} embedding"
        rows.append(
            [
                _method_cell(run.method), f'<td class="text">{escape(phase)}</td>',
                f'<td class="text">{escape(run.name)}</td>', f"{run.total_tokens:,}", f"{run.sequential_steps:,}",
                str(run.n_local), str(run.silos), str(run.skipped_steps), str(run.seed),
            ]
        )  # fmt: skip
    head = ("method", "phase", "run", "total tokens", "sequential steps", "N_local", "silos", "skipped steps", "seed")
    return _table(head, rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; cells that are not yet `<td>` become such."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("".join(text if text.startswith("<td") else f"<td>{text}</td>" for text in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _method_cell(method: str) -> str:
    return f'<td style="color:{colour_of(method)}">{escape(method)}</td>'


def _picture(report: Report, folder: Path, name: str) -> str:
    if name not in report.figures:
        return ""
    png = (folder / report.figures[name]).read_bytes()
    # Bytes 16 to 20 of a PNG are its width in pixels; shown at the size it was drawn for, sharp on fine screens.
    width = int.from_bytes(png[16:20], "big") * CSS_DPI // DPI
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(name.replace("_", " "))}" width="{width}" src="data:image/png;base64,{data}">'


def _bullets(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _bytes(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{short(value)}B"


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}×" if value < 100 else f"{value:,.0f}×"


def number(value: float, digits: int = 1) -> str:
    """`45.4`, `2,175.8`, `not finite`."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "not finite"
