"""Methods by sources: held-out scores, and the improvement over the best baseline, also where it is none."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from megatron_dept.common.errors import UserError
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.evaluation.report.runs import RunRecord
from megatron_dept.evaluation.report.schema import Row, Score, Table

Moment = Literal["after_adapt_random", "after_adapt_own", "before_adapt"]
_TITLES: dict[Moment, str] = {
    "after_adapt_random": "After continued pre-training from random embeddings, one global vocabulary",
    "after_adapt_own": "After continued pre-training from the run's own embeddings, one global vocabulary",
    "before_adapt": "Before: as pre-trained, each source in the vocabulary it was trained in",
}
AVERAGE = "average"
SAME_TOKENS = 0.01  # scored tokens that differ by no more leave perplexities comparable


def build_tables(records: Sequence[RunRecord]) -> list[Table]:
    """A table for each moment and for trained and held-out sources, where any run was evaluated."""
    tables = []
    for moment in _TITLES:
        chosen = [record for record in records if record.evaluation is not None and _moment(record) == moment]
        for unseen in (False, True):
            table = build_table(chosen, moment, unseen)
            if table.rows and table.sources:
                tables.append(table)
    return tables


def build_table(records: Sequence[RunRecord], moment: Moment, out_of_distribution: bool) -> Table:
    """One table; the baseline to beat is, column by column, the one of lowest perplexity."""
    rows = [_row(record, out_of_distribution, moment) for record in records]
    rows = [row for row in rows if row.sources]
    sources = list(dict.fromkeys(name for row in rows for name in row.sources))
    best = {source: _improve(rows, source) for source in sources}
    for row in rows:
        row.average = _average(row, sources)
    best[AVERAGE] = _improve(rows, AVERAGE)
    title = _TITLES[moment] + (" (text no run has seen)" if out_of_distribution else "")
    return Table(
        title=title,
        when=moment,
        sources=sources,
        out_of_distribution=out_of_distribution,
        best_baseline=best,
        rows=rows,
    )


def cell(row: Row, column: str) -> Score | None:
    """The score of a source, or of the average column."""
    return row.average if column == AVERAGE else row.sources.get(column)


def _moment(record: RunRecord) -> Moment:
    if not record.adapt:
        return "before_adapt"
    return "after_adapt_random" if record.protocol == "random" else "after_adapt_own"


def _row(record: RunRecord, out_of_distribution: bool, moment: Moment) -> Row:
    assert record.evaluation is not None, "chosen by the caller"
    same_tokenizer = moment != "before_adapt" or VARIANTS[record.base.dept.variant].vocabulary != "own"
    scores = {
        name: _score(entry, record, name, same_tokenizer)
        for name, entry in record.evaluation["sources"].items()
        if bool(entry["out_of_distribution"]) is out_of_distribution
    }
    return Row(
        method=record.method,
        run=record.name,
        baseline=record.baseline,
        same_tokenizer=same_tokenizer,
        sources=scores,
        average=None,
    )


def _score(entry: dict[str, Any], record: RunRecord, source: str, same_tokenizer: bool) -> Score:
    try:
        return Score(
            perplexity=_number(entry["perplexity"]),
            bits_per_byte=_number(entry["bits_per_byte"]),
            tokens=entry["tokens"],
            replaced_tokens=entry["replaced_tokens"],
            vocabulary_size=entry["vocabulary_size"],
            perplexity_compares=same_tokenizer,
            perplexity_improvement=None,
            bits_per_byte_improvement=None,
        )
    except KeyError as error:
        raise UserError(
            f"{record.path / 'evaluation.json'}: source {source} has no field {error}; run tools/evaluate.py again"
        ) from error


def _number(value: float | None) -> float:
    """A score; one that overflowed is written as null in JSON and counts as infinite."""
    return math.inf if value is None else float(value)


def _average(row: Row, sources: Sequence[str]) -> Score | None:
    if not sources or any(source not in row.sources for source in sources):
        return None
    scores = [row.sources[source] for source in sources]
    return Score(
        perplexity=sum(score.perplexity for score in scores) / len(scores),
        bits_per_byte=sum(score.bits_per_byte for score in scores) / len(scores),
        tokens=sum(score.tokens for score in scores),
        replaced_tokens=sum(score.replaced_tokens for score in scores),
        vocabulary_size=max(score.vocabulary_size for score in scores),
        perplexity_compares=all(score.perplexity_compares for score in scores),
        perplexity_improvement=None,
        bits_per_byte_improvement=None,
    )


def _improve(rows: Sequence[Row], column: str) -> str | None:
    """Fill in the improvements of one column; returns the best baseline's method."""
    baselines = [(row, score) for row in rows if row.baseline and (score := cell(row, column)) is not None]
    if not baselines:
        return None
    perplexity = _least(score.perplexity for _, score in baselines)
    bits = _least(score.bits_per_byte for _, score in baselines)
    tokens = baselines[0][1].tokens
    for row in rows:
        score = cell(row, column)
        if score is not None and not row.baseline:
            score.perplexity_compares &= abs(score.tokens - tokens) <= SAME_TOKENS * tokens
            score.bits_per_byte_improvement = _percent_below(score.bits_per_byte, bits)
            if score.perplexity_compares:
                score.perplexity_improvement = _percent_below(score.perplexity, perplexity)
    return min(baselines, key=lambda pair: pair[1].perplexity)[0].method


def _least(values: Iterable[float]) -> float:
    return min(values)


def _percent_below(value: float, best: float) -> float | None:
    """100 (best - value) / best; None where either is no number to compare."""
    return 100.0 * (best - value) / best if math.isfinite(value) and math.isfinite(best) and best > 0 else None


def findings(tables: Sequence[Table]) -> list[str]:
    """What the tables say in words, the wins of the baselines as plainly as those of DEPT."""
    sentences = []
    for table in tables:
        if table.when == "before_adapt":
            continue
        use_perplexity = all(score.perplexity_compares for row in table.rows for score in row.sources.values())
        sentences += _table_findings(table, use_perplexity)
    return sentences or ["No run was evaluated after adapt: there is nothing to compare yet."]


def _table_findings(table: Table, perplexity: bool) -> list[str]:
    unit, value = ("perplexity", _perplexity) if perplexity else ("bits per byte", _bits)
    rows = [row for row in table.rows if row.average is not None]
    dept, baselines = [r for r in rows if not r.baseline], [r for r in rows if r.baseline]
    where = "on text no run has seen" if table.out_of_distribution else "averaged over the trained sources"
    start = "random" if table.when == "after_adapt_random" else "the run's own"
    if not dept or not baselines:
        return [
            f"Adapted from {start} embeddings: {'no DEPT run' if not dept else 'no baseline'} was evaluated {where}."
        ]
    best, rival = (min(group, key=lambda row: value(row.average)) for group in (dept, baselines))
    gain = _percent_below(value(best.average), value(rival.average))
    verdict = "no comparable number" if gain is None else f"{abs(gain):.1f} % {'lower' if gain > 0 else 'HIGHER'}"
    sentences = [
        f"Adapted from {start} embeddings, {where}: {best.method} has the best {unit} of the DEPT methods, "
        f"{_figures(value(best.average))} against {_figures(value(rival.average))} of the best baseline "
        f"{rival.method}: {verdict}."
    ]
    losers: dict[str, list[str]] = {}
    for row in dept:
        losses = [source for source in table.sources if _loses(row, source, value, baselines)]
        if losses:
            every = len(losses) == len(table.sources) > 1
            losers.setdefault("every source" if every else ", ".join(losses), []).append(row.method)
    for on, methods in losers.items():
        verb = "loses" if len(methods) == 1 else "lose"
        sentences.append(f"From {start} embeddings, {', '.join(methods)} {verb} to the best baseline on {on}.")
    return sentences


def _figures(value: float) -> str:
    """Four significant digits, written out: `54.91`, `141,500`."""
    return f"{value:.4g}" if value < 1000 or not math.isfinite(value) else f"{float(f'{value:.4g}'):,.0f}"


def _loses(row: Row, source: str, value: Callable[[Score | None], float], baselines: Sequence[Row]) -> bool:
    rivals = [value(other.sources[source]) for other in baselines if source in other.sources]
    return source in row.sources and bool(rivals) and value(row.sources[source]) > min(rivals)


def _perplexity(score: Score | None) -> float:
    return math.inf if score is None else score.perplexity


def _bits(score: Score | None) -> float:
    return math.inf if score is None else score.bits_per_byte
