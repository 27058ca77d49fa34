"""Evaluation and export of sources that have left the run: not of themselves, but by name."""

import shutil

import pytest
from convert_to_hf import main as convert
from evaluate import main as evaluate

from megatron_dept.common.files import read_json
from tests.support.runs import run_that_greek_left


@pytest.mark.parametrize("variant", ["trim", "spec_opt"])
def test_a_source_that_has_left_is_evaluated_by_name(corpus, tmp_path, variant, capsys):
    run_dir = run_that_greek_left(corpus, tmp_path, variant)
    data = (corpus.own_data if variant == "spec_opt" else corpus.data)["greek"]
    common = ["--run", str(run_dir), "--max-tokens", "200", "--output", str(tmp_path / "evaluation.json")]
    assert evaluate(common) == 0
    assert list(read_json(tmp_path / "evaluation.json")["sources"]) == ["latin"]
    assert f"greek is left out: it has left the run; score it with --sources greek={data}" in capsys.readouterr().out
    assert evaluate([*common, "--sources", f"greek={data}"]) == 0
    entry = read_json(tmp_path / "evaluation.json")["sources"]["greek"]
    assert entry["tokens"] > 0 and entry["perplexity"] is not None and not entry["out_of_distribution"]


def test_a_source_that_has_left_is_exported_by_name(corpus, tmp_path, capsys):
    run_dir = run_that_greek_left(corpus, tmp_path, "spec_opt")
    common = ["--checkpoint", str(run_dir), "--output", str(tmp_path / "hf")]
    assert convert([*common, "--all-sources"]) == 0
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["latin"]
    assert "greek is left out: it has left the run; export it with --source greek" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "hf")
    assert convert([*common, "--source", "greek"]) == 0
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
