"""tools/evaluate.py on hand-made checkpoints of every kind, against a direct computation with all logits at once."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_dept.checkpoint.reader import Checkpoint
from megatron_dept.checkpoint.slices import whole
from megatron_dept.checkpoint.writer import save_checkpoint
from megatron_dept.common.errors import CheckpointError, ConfigError, DataError
from megatron_dept.config.schema import ModelConfig
from megatron_dept.data.directory import DatasetDirectory
from megatron_dept.models.build import build_body
from megatron_dept.tokenizers.train import train_sentencepiece
from tests.support.corpus import write_dataset

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"
MODEL = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, seq_length=12, init_std=0.3)
TRAIN = {
    "en": ["the river runs to the sea and the sea is wide", "a wide river and a long road to the sea"],
    "it": ["il fiume va al mare e il mare è grande", "un grande fiume e una lunga strada al mare"],
    "la": ["flumen ad mare it et mare magnum est", "magnum flumen et longa via ad mare"],
}
HELDOUT = {
    "en": ["the road to il mare is long", "and the sea grande"],
    "it": ["la strada al mare è lunga", "the fiume"],
    "la": ["longa via ad river est", "mare magnum"],
}


def load_tool():
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


main = load_tool().main


@dataclass
class World:
    """Datasets under a global and under own tokenizers, and checkpoints made on demand."""

    root: Path

    def data(self, name, kind="global"):
        return self.root / kind / name

    def run(self, directory, variant, trained=("en", "it"), phase="pretrain"):
        """A run directory with one checkpoint; random tables, each source's own where the variant has them."""
        kind = "own" if variant == "spec_opt" else "global"
        opened = {name: DatasetDirectory.open(self.data(name, kind)) for name in ("en", "it")}
        vocabulary = {"glob": "global", "std": "global", "trim": "trimmed", "spec": "trimmed", "spec_opt": "own"}[
            variant
        ]
        sizes = {name: one.card["tokenizer"]["vocab_size"] for name, one in opened.items()}
        ids = {
            name: one.vocabulary() if vocabulary == "trimmed" else np.arange(sizes[name])
            for name, one in opened.items()
        }
        generator = torch.Generator().manual_seed(5)
        table = lambda rows: torch.randn(rows, MODEL.hidden_size, generator=generator)  # noqa: E731
        body = build_body(MODEL, seed=3)
        tensors = {}
        for name, parameter in body.named_parameters():
            tensors |= whole(f"body/{name}", parameter.detach().flatten())
        for name, local in ids.items():
            tensors |= whole(f"vocabulary/{name}", torch.from_numpy(local.astype(np.int64)))
            if variant in ("spec", "spec_opt") and name in trained:
                tensors |= whole(f"source/{name}/token", table(len(local)))
                tensors |= whole(f"source/{name}/position", table(MODEL.seq_length))
        if variant not in ("spec", "spec_opt"):
            tensors |= whole("token", table(sizes["en"])) | whole("position", table(MODEL.seq_length))
        manifest = {
            "variant": variant,
            "phase": phase,
            "vocabulary": vocabulary,
            "model": MODEL.model_dump(),
            "body_shapes": {name: list(parameter.shape) for name, parameter in body.named_parameters()},
            "sources": {
                name: {
                    "vocabulary": vocabulary,
                    "data": str(self.data(name, kind)),
                    "tokenizer_fingerprint": one.card["tokenizer"]["fingerprint"],
                    "vocab_size": sizes[name],
                    "trained": name in trained,
                }
                for name, one in opened.items()
            },
        }
        target = directory / "checkpoints" / "step-00000010"
        save_checkpoint(target, 0, range(1), lambda value: [value], tensors, [], manifest, keep_last=2)
        return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    shared = train_sentencepiece([text for texts in TRAIN.values() for text in texts], 310, "bpe")
    for name in TRAIN:
        write_dataset(root / "global" / name, name, shared, TRAIN[name], HELDOUT[name])
        own = train_sentencepiece(TRAIN[name], 290, "bpe")
        write_dataset(root / "own" / name, name, own, TRAIN[name], HELDOUT[name])
    return World(root)


def direct(run, world, name, source=None, restrict=None, kind="global"):
    """What the entry should say: all logits at once, float64 sums, the stream rolled by hand."""
    checkpoint, dataset = Checkpoint.open(run), DatasetDirectory.open(world.data(name, kind))
    tokenizer = dataset.tokenizer()
    ids, token = checkpoint.token_table(source)
    if restrict is not None:
        token, ids = token[np.isin(ids, restrict)], restrict
    stream, replaced = [], 0
    for document in HELDOUT[name]:
        for index in [*tokenizer.encode(document), tokenizer.eod_id]:
            known = index in ids
            stream += [index] if known else tokenizer.byte_pieces(index).tolist()
            replaced += not known
    rows = torch.tensor([ids.tolist().index(index) for index in stream])
    body = build_body(MODEL, seed=3)
    losses = []
    for start in range(0, len(rows) - 1, MODEL.seq_length):
        window = rows[start : start + MODEL.seq_length + 1]
        with torch.no_grad():
            hidden = token[window[:-1]] + checkpoint.position_table(source)[: len(window) - 1]
            logits = (body(hidden[None])[0] @ token.T).double()
        losses += (logits.logsumexp(1) - logits[range(len(window) - 1), window[1:]]).tolist()
    sizes = [len(tokenizer.token_bytes()[index]) for index in stream[1:]]
    text = sum(loss for loss, size in zip(losses, sizes, strict=True) if size)
    return {
        "perplexity": math.exp(sum(losses) / len(losses)),
        "bits_per_byte": text / math.log(2) / sum(sizes),
        "nats_per_token": sum(losses) / len(losses),
        "tokens": len(losses),
        "bytes": sum(sizes),
        "replaced_tokens": replaced,
        "vocabulary_size": len(ids),
    }


def evaluate(run, *options):
    assert main(["--run", str(run), "--device", "cpu", "--batch-size", "2", *map(str, options)]) == 0
    return json.loads((run / "evaluation.json").read_text())


def assert_entry(entry, expected, out_of_distribution=False):
    assert entry.keys() == expected.keys() | {"out_of_distribution"}
    assert entry["out_of_distribution"] is out_of_distribution
    for field, value in expected.items():
        # fp32 logits of size ~10 through two layers, in batches of another shape: 1e-5 relative is a hundred ulps.
        assert entry[field] == (value if isinstance(value, int) else pytest.approx(value, rel=1e-5)), field


@pytest.mark.parametrize("variant, phase", [("glob", "pretrain"), ("std", "adapt")])
def test_a_global_vocabulary_and_a_source_out_of_distribution(world, tmp_path, variant, phase, capsys):
    run = world.run(tmp_path / "run", variant, phase=phase)
    report = evaluate(run, "--ood", f"la={world.data('la')}")
    assert {name: report[name] for name in ("run", "checkpoint", "variant", "phase", "vocabulary")} == {
        "run": str(run),
        "checkpoint": "step-00000010",
        "variant": variant,
        "phase": phase,
        "vocabulary": "global",
    }
    assert list(report["sources"]) == ["en", "it", "la"]
    for name, entry in report["sources"].items():
        expected = direct(run, world, name)
        assert expected["replaced_tokens"] == 0 and expected["vocabulary_size"] == 310
        assert_entry(entry, expected, out_of_distribution=name == "la")
    shown = capsys.readouterr()
    assert "perplexity" in shown.out and "evaluation.json" in shown.out
    assert "evaluate:" in shown.err  # progress


def test_trim_scores_in_v_k_and_out_of_distribution_in_all_learned_rows(world, tmp_path):
    run = world.run(tmp_path / "run", "trim")
    report = evaluate(run, "--ood", f"la={world.data('la')}")
    for name in ("en", "it"):
        expected = direct(run, world, name, restrict=DatasetDirectory.open(world.data(name)).vocabulary())
        assert expected["replaced_tokens"] > 0 and expected["vocabulary_size"] < 310
        assert_entry(report["sources"][name], expected)
    learned = direct(run, world, "la")
    assert learned["replaced_tokens"] > 0
    assert report["sources"]["en"]["vocabulary_size"] < learned["vocabulary_size"] < 310
    assert_entry(report["sources"]["la"], learned, out_of_distribution=True)


@pytest.mark.parametrize("variant, kind", [("spec", "global"), ("spec_opt", "own")])
def test_each_source_has_its_own_embedding(world, tmp_path, variant, kind, capsys):
    run = world.run(tmp_path / "run", variant)
    report = evaluate(run, "--ood", f"la={world.data('la', kind)}")
    assert list(report["sources"]) == ["en", "it"]
    for name, entry in report["sources"].items():
        assert_entry(entry, direct(run, world, name, source=name, kind=kind))
    assert f"la is left out: {variant} has no embedding for it before adapt" in capsys.readouterr().out


def test_a_source_never_sampled_is_left_out_with_the_reason(world, tmp_path, capsys):
    run = world.run(tmp_path / "run", "spec", trained=("it",))
    assert list(evaluate(run)["sources"]) == ["it"]
    assert "en is left out: it was never sampled" in capsys.readouterr().out


def test_max_tokens_and_chosen_sources(world, tmp_path):
    run = world.run(tmp_path / "run", "glob")
    report = evaluate(run, "--sources", f"it={world.data('it')}", "--max-tokens", 7)
    assert list(report["sources"]) == ["it"]
    assert report["sources"]["it"]["tokens"] == 7


def test_one_checkpoint_of_a_run_and_a_place_for_the_output(world, tmp_path):
    run = world.run(tmp_path / "run", "glob")
    chosen = run / "checkpoints" / "step-00000010"
    main(["--run", str(chosen), "--device", "cpu"])
    assert (run / "evaluation.json").is_file()
    main(["--run", str(run), "--device", "cpu", "--output", str(tmp_path / "elsewhere" / "scores.json")])
    written = [json.loads(path.read_text()) for path in (run / "evaluation.json", tmp_path / "elsewhere/scores.json")]
    assert written[0] == written[1]


def test_a_figure_that_is_not_finite_is_null_and_the_file_stays_valid_json(world, tmp_path, capsys):
    run = world.run(tmp_path / "run", "glob")
    checkpoint = run / "checkpoints" / "step-00000010"
    poison_position_table(checkpoint)
    entry = evaluate(run)["sources"]["en"]
    assert entry["perplexity"] is entry["bits_per_byte"] is entry["nats_per_token"] is None
    assert "not finite" in capsys.readouterr().out


def poison_position_table(checkpoint):
    """Write NaN over the position table in the checkpoint's file; its size stays."""
    from safetensors.torch import load_file

    from megatron_dept.checkpoint.slices import save_slices

    part = checkpoint / "part-00000.safetensors"
    # Copies: what was loaded is still the file that is written over.
    tensors = {key: value.clone() for key, value in load_file(part).items()}
    tensors["position@0"].fill_(math.nan)
    save_slices(part, tensors)


@pytest.mark.parametrize(
    "options, error, words",
    [
        (["--ood", "it={data}/global/it"], ConfigError, "trained on it"),
        (["--ood", "nothing"], ConfigError, "NAME=DIR"),
        (["--sources", "en=a", "en=b"], ConfigError, "twice"),
        (["--sources", "la={data}/global/la", "--ood", "la={data}/global/la"], ConfigError, "each source once"),
        (["--ood", "la={data}/own/la"], DataError, "tokenizer"),
        (["--ood", "la={data}/nowhere"], DataError, "nowhere"),
        (["--max-tokens", "0"], ConfigError, "max-tokens"),
        (["--no-such-option"], ConfigError, "no-such-option"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line(world, tmp_path, options, error, words):
    run = world.run(tmp_path / "run", "glob")
    with pytest.raises(error, match=words) as caught:
        main(["--run", str(run), *(option.format(data=world.root) for option in options)])
    assert "\n" not in str(caught.value)
    assert not (run / "evaluation.json").exists()


def test_a_source_unknown_to_a_run_with_own_embeddings_is_refused(world, tmp_path):
    run = world.run(tmp_path / "run", "spec")
    with pytest.raises(ConfigError, match="la has no embedding"):
        main(["--run", str(run), "--sources", f"la={world.data('la')}"])


def test_a_run_without_anything_to_score_is_refused(world, tmp_path):
    run = world.run(tmp_path / "run", "spec", trained=())
    with pytest.raises(ConfigError, match="no source is left"):
        main(["--run", str(run)])


def test_a_checkpoint_of_another_model_is_refused(world, tmp_path):
    run = world.run(tmp_path / "run", "glob")
    manifest_file = run / "checkpoints" / "step-00000010" / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    manifest["model"]["num_layers"] = 3
    manifest_file.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="not this model"):
        main(["--run", str(run), "--device", "cpu"])


def test_the_command_exits_2_with_one_line(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    done = subprocess.run(
        [sys.executable, str(TOOL), "--run", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
