"""Compare runs: a self-contained HTML page with pictures and tables, the pictures as PNG, and every number as JSON.

    python tools/report.py --runs runs/* --output report

The page says what the runs found, also where DEPT loses. The fields of report.json: docs/report-schema.md.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_dept.common.cli import ToolParser, run_tool
from megatron_dept.common.files import atomic_write, write_json
from megatron_dept.evaluation.report.build import build_report
from megatron_dept.evaluation.report.figures import draw_figures
from megatron_dept.evaluation.report.page import write_page
from megatron_dept.evaluation.report.runs import load_runs


def main(argv: Sequence[str] | None = None) -> int:
    parser = ToolParser(description="Compare runs: HTML page, PNG pictures, and report.json with every number.")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run directories, pre-training and adapt")
    parser.add_argument("--output", type=Path, required=True, help="folder for index.html, report.json and *.png")
    arguments = parser.parse_args(argv)
    report = build_report(load_runs(arguments.runs))
    arguments.output.mkdir(parents=True, exist_ok=True)
    report.figures = draw_figures(report, arguments.output)
    # JSON has no infinity: a perplexity that overflowed is null, as in evaluation.json.
    write_json(arguments.output / "report.json", json.loads(report.model_dump_json()))
    with atomic_write(arguments.output / "index.html", "w") as handle:
        handle.write(write_page(report, arguments.output))
    for sentence in report.findings:
        print(f"- {sentence}")
    print(f"report: {arguments.output / 'index.html'}")
    return 0


if __name__ == "__main__":
    run_tool(main)
