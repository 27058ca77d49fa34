"""The report on made-up runs whose winners are known: numbers, sentences, pictures, page, schema."""

import json
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import report as tool
import synthetic_runs as made

from megatron_dept.common.errors import UserError
from megatron_dept.evaluation.report.build import build_report
from megatron_dept.evaluation.report.expenses import paper_settings
from megatron_dept.evaluation.report.figures import broken
from megatron_dept.evaluation.report.runs import load_runs
from megatron_dept.evaluation.report.schema import Report, describe
from megatron_dept.evaluation.report.style import apart
from megatron_dept.evaluation.report.tables import AVERAGE

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 1e-9  # relative: the same arithmetic in another order


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report on every method and both protocols, made by the tool."""
    root = tmp_path_factory.mktemp("report")
    paths = made.write_runs(root, protocols=("random", "own"))
    assert tool.main(["--runs", *map(str, reversed(paths)), "--output", str(root / "out")]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def report(page: Path) -> Report:
    """Read back from JSON: what it holds is what the schema says."""
    return Report.model_validate_json((page / "report.json").read_text())


def table(report: Report, when: str, unseen: bool = False):  # type: ignore[no-untyped-def]
    return next(t for t in report.tables if t.when == when and t.out_of_distribution is unseen)


def test_methods_are_named_and_ordered_baselines_first(report: Report) -> None:
    order = ["STD τ=0", "STD τ=1", "ACT", "GLOB", "TRIM", "SPEC", "SPEC-OPT"]
    assert [run.method for run in report.runs if run.phase == "pretrain"] == order
    assert [run.method for run in report.runs if run.protocol == "random"] == order
    assert [run.method for run in report.runs if run.protocol == "own"] == order[:5]
    assert {run.base_run for run in report.runs if run.phase == "adapt"} == set(made.LEVEL)


def test_equal_tokens_in_fewer_steps(report: Report) -> None:
    steps = {run.method: run.sequential_steps for run in report.runs if run.phase == "pretrain"}
    assert steps["STD τ=1"] == 5 * steps["GLOB"] == 600
    assert {run.total_tokens for run in report.runs if run.phase == "pretrain"} == {600 * 8 * 128}
    assert not any("Total tokens differ" in note for note in report.notes)
    said = "STD τ=0 took 600 steps one after another for 614,400 tokens, GLOB 120 for 614,400."
    assert said in report.findings


def test_improvement_is_against_the_best_baseline_of_the_column(report: Report) -> None:
    scores = table(report, "after_adapt_random")
    assert scores.best_baseline == dict.fromkeys((*made.SOURCES, AVERAGE), "STD τ=1")
    for row in scores.rows:
        for source, score in row.sources.items():
            if row.baseline:
                assert score.perplexity_improvement is None
                continue
            method = next(k for k in made.LEVEL if made.VARIANT[k] == row.method.lower().replace("-", "_"))
            bits, best = made.bits_per_byte(method, source), made.bits_per_byte("std", source)
            assert score.bits_per_byte_improvement == pytest.approx(100 * (best - bits) / best, rel=ROUNDING)
            assert score.perplexity_improvement == pytest.approx(100 * (1 - 2 ** (3 * (bits - best))), rel=1e-7)
    glob = next(row for row in scores.rows if row.method == "GLOB")
    assert glob.average is not None
    mean = sum(score.perplexity for score in glob.sources.values()) / 5
    assert glob.average.perplexity == pytest.approx(mean, rel=ROUNDING)


def test_where_dept_loses_is_said(report: Report, page: Path) -> None:
    expected = "From random embeddings, GLOB, TRIM, SPEC, SPEC-OPT lose to the best baseline on cpp-headers."
    assert expected in report.findings
    assert expected in (page / "index.html").read_text()


def test_losing_everywhere_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(made.LEVEL, "glob", 1.3)
    paths = made.write_runs(tmp_path, ("std", "glob"))
    found = build_report(load_runs(paths)).findings
    assert any(sentence.endswith("% HIGHER.") and "GLOB" in sentence for sentence in found)
    assert "From random embeddings, GLOB loses to the best baseline on every source." in found


def test_perplexity_under_another_tokenizer_is_not_compared(report: Report) -> None:
    before = {row.method: row for row in table(report, "before_adapt").rows}
    own, trimmed = before["SPEC-OPT"], before["SPEC"]
    assert not own.same_tokenizer and trimmed.same_tokenizer
    assert all(score.perplexity_improvement is None for score in own.sources.values())
    assert all(score.bits_per_byte_improvement is not None for score in own.sources.values())
    assert not any(score.perplexity_compares for score in own.sources.values())
    assert all(row.same_tokenizer for row in table(report, "after_adapt_random").rows)


def test_perplexity_over_other_tokens_is_not_compared(tmp_path: Path) -> None:
    """TRIM on unseen text before adapt: most tokens are outside its vocabulary and are scored by their bytes."""
    paths = made.write_runs(tmp_path, ("std", "trim"))
    path = tmp_path / "runs/trim/evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["sources"][made.UNSEEN] |= {"tokens": 90_000, "replaced_tokens": 15_000}
    evaluation["sources"]["python-code"] |= {"tokens": 20_100, "replaced_tokens": 40}
    path.write_text(json.dumps(evaluation))
    report = build_report(load_runs(paths))
    unseen = table(report, "before_adapt", unseen=True).rows[1].sources[made.UNSEEN]
    assert not unseen.perplexity_compares and unseen.perplexity_improvement is None
    assert unseen.bits_per_byte_improvement is not None
    assert table(report, "before_adapt").rows[1].sources["python-code"].perplexity_improvement is not None


def test_unseen_text_has_tables_of_its_own(report: Report) -> None:
    unseen = table(report, "after_adapt_random", unseen=True)
    assert unseen.sources == [made.UNSEEN] and len(unseen.rows) == 7
    assert made.UNSEEN not in report.trained_sources
    assert [row.method for row in table(report, "before_adapt", unseen=True).rows][-2:] == ["GLOB", "TRIM"]


def test_memory_is_rows_times_width(report: Report) -> None:
    memory = {entry.method: entry for entry in report.memory}
    assert memory["GLOB"].parameters_mean == made.VOCABULARY * made.HIDDEN
    assert memory["SPEC"].parameters_mean == sum(made.TRIMMED) / 5 * made.HIDDEN
    assert memory["SPEC"].parameters_largest == max(made.TRIMMED) * made.HIDDEN
    assert memory["SPEC-OPT"].reduction == made.VOCABULARY / made.OWN
    assert memory["SPEC-OPT"].megabytes_mean == made.OWN * made.HIDDEN * 4 / 1e6


def test_bytes_are_the_ledgers_and_stand_beside_the_formula(report: Report) -> None:
    sent = {entry.method: entry for entry in report.communication}
    spec, std = sent["SPEC"], sent["STD τ=1"]
    assert spec.bytes_by_kind == {"federation/body": 12 * made.BODY_BYTES, "federation/control": 24_000}
    assert spec.training_bytes_per_step == 12 * made.BODY_BYTES / 120 == spec.predicted_bytes_per_step
    assert spec.formula_bytes_per_step == pytest.approx(spec.formula_parameters_per_step * 4 * 2, rel=ROUNDING)
    payload = made.BODY_BYTES + 4 * (made.VOCABULARY + made.LENGTH) * made.HIDDEN
    assert std.training_bytes_per_step == 2 * payload and std.predicted_bytes_per_step is None
    assert std.reduction_measured == 1 == std.reduction_formula_parameters
    assert spec.reduction_measured == pytest.approx(payload * 20 / made.BODY_BYTES, rel=ROUNDING)
    # Equal tokens, a fifth of the steps one after another.
    assert spec.reduction_measured_per_token == pytest.approx(5 * spec.reduction_measured, rel=ROUNDING)
    # fp32 gradients here, so parameters and bytes reduce alike.
    assert spec.reduction_formula_bytes == pytest.approx(spec.reduction_formula_parameters, rel=ROUNDING)
    assert sent["GLOB"].training_bytes_per_step > sent["TRIM"].training_bytes_per_step > spec.training_bytes_per_step


def test_without_a_plan_costs_are_left_out_and_said_not_guessed(tmp_path: Path) -> None:
    paths = made.write_runs(tmp_path, ("std", "glob"))
    (tmp_path / "runs/std/plan.json").unlink()
    report = build_report(load_runs(paths))
    assert [entry.method for entry in report.communication] == ["GLOB"] == [entry.method for entry in report.memory]
    assert "No plan.json in these runs, so their costs are left out: std." in report.notes


def test_the_papers_714() -> None:
    paper = {(entry.setting, entry.method): entry for entry in paper_settings()}
    best = paper["multilingual, 24 blocks (1.3B)", "SPEC-OPT"]
    assert round(best.reduction_parameters) == 714 and round(best.reduction_bytes) == 357
    assert best.embedding_parameters == pytest.approx(102.9e6, rel=1e-3)  # printed with four digits
    assert paper["multilingual, 12 blocks (125M)", "GLOB"].parameters_per_step == pytest.approx(0.56e6, rel=0.01)


def test_curves_stand_on_the_tokens_of_the_whole_run(report: Report) -> None:
    curves = [c for c in report.curves.heldout_bits_per_byte if c.source == "python-code"]
    assert len(curves) == 7
    for curve in curves:
        assert curve.tokens == pytest.approx([(n + 1) * 100 * 8 * 128 for n in range(6)], rel=ROUNDING)
    climbs = {c.method: c.values[-1] - c.values[0] for c in report.curves.activation_norm}
    assert climbs["STD τ=1"] > 5 * climbs["TRIM"]
    means = [c for c in report.curves.heldout_bits_per_byte if c.source is None and c.method == "GLOB"]
    values = [c.values[-1] for c in report.curves.heldout_bits_per_byte if c.source and c.method == "GLOB"]
    assert means[0].values[-1] == pytest.approx(sum(values) / 5, rel=ROUNDING)
    blends = [c for c in report.curves.training_loss if c.method == "STD τ=1"]
    assert [c.source for c in blends] == [None]


def test_the_mean_is_of_the_moments_when_every_source_was_scored(tmp_path: Path) -> None:
    (run,) = made.write_runs(tmp_path, ("spec",), protocols=())
    metrics = run / "metrics.silo0.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    never_sampled = ("validation", 0, "german-glosses")
    kept = [line for line in lines if (line["kind"], line["round"], line.get("source")) != never_sampled]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))
    curves = build_report(load_runs([run])).curves.heldout_bits_per_byte
    lengths = {curve.source: len(curve.tokens) for curve in curves}
    assert lengths[None] == lengths["german-glosses"] == 5 and lengths["python-code"] == 6


class Checker(HTMLParser):
    """Counts tags left open, pictures, and addresses that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href") and value is not None:
                (self.pictures if value.startswith("data:image/png;base64,") else self.fetched).append(value)
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_holds_its_pictures(page: Path, report: Report) -> None:
    checker = Checker()
    html = (page / "index.html").read_text()
    checker.feed(html)
    assert checker.open == [] and checker.fetched == []
    assert len(checker.pictures) == len(report.figures) == 7
    assert "<script" not in html and "nan" not in re.sub(r"base64,[^\"]*", "", html)
    for name in report.figures.values():
        png = (page / name).read_bytes()
        width, height = struct.unpack(">II", png[16:24])
        assert png.startswith(b"\x89PNG") and width > 800 and height > 300


def test_the_schema_is_documented_as_it_is() -> None:
    assert (ROOT / "docs" / "report-schema.md").read_text() == describe(), (
        "write it again: python -m megatron_dept.evaluation.report.schema > docs/report-schema.md"
    )


def test_a_resumed_runs_later_lines_count_and_a_cut_last_line_does_not(tmp_path: Path) -> None:
    (run,) = made.write_runs(tmp_path, ("glob",), protocols=())
    metrics = run / "metrics.silo0.jsonl"
    again = {"kind": "step", "step": 7, "round": 0, "source": "python-code", "loss": 99.0, "skipped": False}
    metrics.write_text(metrics.read_text() + json.dumps(again) + "\n" + '{"kind": "step", "ste')
    (record,) = load_runs([run])
    seventh = [line for line in record.steps if line["step"] == 7 and line["source"] == "python-code"]
    assert [line["loss"] for line in seventh] == [99.0]
    metrics.write_text('{"kind": "step", "ste\n' + metrics.read_text())
    with pytest.raises(UserError, match=r"metrics.silo0.jsonl line 1 is not JSON"):
        load_runs([run])


def test_what_is_missing_is_left_out_and_said(tmp_path: Path) -> None:
    paths = made.write_runs(tmp_path, ("std", "glob"))
    (tmp_path / "runs/glob/ledger.json").unlink()
    (tmp_path / "runs/adapt-glob-random/evaluation.json").unlink()
    report = build_report(load_runs(paths))
    assert [entry.method for entry in report.communication] == ["STD τ=1"]
    assert any("no ledger.json" in note and "glob" in note for note in report.notes)
    assert any("no evaluation.json" in note and "adapt-glob-random" in note for note in report.notes)
    assert (
        "Adapted from random embeddings: no DEPT run was evaluated averaged over the trained sources."
        in report.findings
    )


def test_a_perplexity_that_overflowed_is_null_and_never_best(tmp_path: Path) -> None:
    paths = made.write_runs(tmp_path, ("std", "glob"))
    path = tmp_path / "runs/adapt-std-random/evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["sources"]["python-code"]["perplexity"] = None
    path.write_text(json.dumps(evaluation))
    report = build_report(load_runs(paths))
    std = table(report, "after_adapt_random").rows[0]
    assert std.sources["python-code"].perplexity == float("inf")
    assert '"perplexity":null' in report.model_dump_json()
    assert Report.model_validate_json(report.model_dump_json()) == report


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is no run directory: it has no config.yaml"),
        (lambda run: (run / "metrics.silo0.jsonl").unlink(), "has no metrics.silo"),
        (lambda run: (run / "evaluation.json").write_text("{"), "evaluation.json is not valid JSON"),
    ],
)
def test_a_broken_run_directory_is_named(tmp_path: Path, break_it, message: str) -> None:  # type: ignore[no-untyped-def]
    (run,) = made.write_runs(tmp_path, ("glob",), protocols=())
    break_it(run)
    with pytest.raises(UserError, match=message):
        load_runs([run])


def test_two_runs_of_a_method_are_told_apart(tmp_path: Path) -> None:
    (run,) = made.write_runs(tmp_path, ("glob",), protocols=())
    other = tmp_path / "runs" / "glob-seed-2"
    other.mkdir()
    for file in run.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    assert [record.method for record in load_runs([run, other])] == ["GLOB (glob)", "GLOB (glob-seed-2)"]
    with pytest.raises(UserError, match="given twice"):
        load_runs([run, run])


def test_a_line_is_interrupted_where_a_source_was_not_sampled() -> None:
    x, y = broken(np.array([1.0, 2, 3, 4, 5, 30, 31, 32]), np.arange(8.0))
    assert np.isnan(x[5]) and np.isnan(y[5]) and len(x) == 9
    x, _ = broken(np.array([1.0, 100.0, 101.0]), np.zeros(3))
    assert len(x) == 3, "a few points are no line to interrupt"


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    places = apart([1.0, 1.01, 1.02, 5.0], gap=0.5, low=0.0, high=6.0)
    assert places == sorted(places)
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) >= 0.5 - 1e-6
    assert places[-1] == 5.0
