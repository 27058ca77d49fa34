"""What is exported loads with plain transformers, computes the same, and never generates an id it does not know."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_dept.common.errors import UserError
from megatron_dept.export import huggingface
from megatron_dept.export.huggingface import LOGIT_TOLERANCE, export_model
from megatron_dept.export.parity import largest_logit_difference
from megatron_dept.models.build import body_from_state
from megatron_dept.models.embedding import SourceEmbedding


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def samples_of(model, texts):
    """Sequences of ids that have rows, no longer than the model's."""
    found = []
    for text in texts:
        ids = np.array(model.tokenizer.encode(text), dtype=np.int64)
        found.append(ids[np.isin(ids, model.ids)][: model.config.seq_length])
    return found


def export(model, directory, texts, **options):
    return export_model(
        model, directory, title="t", facts={"seed": "1"}, samples=samples_of(model, texts), texts=texts, **options
    )


@pytest.fixture(scope="module", params=["gpt", "llama"])
def exported(request, make_model, texts, tmp_path_factory):
    """(whole model, its directory, its report)."""
    model = make_model(request.param)
    directory = tmp_path_factory.mktemp("export") / request.param
    return model, directory, export(model, directory, texts)


@pytest.fixture(scope="module", params=["gpt", "llama"])
def trimmed(request, make_model, texts, kept_ids, tmp_path_factory):
    """(model that knows only some ids, its directory, its report)."""
    model = make_model(request.param, kept_ids)
    directory = tmp_path_factory.mktemp("export") / request.param
    return model, directory, export(model, directory, texts)


def test_files_are_those_transformers_expects(exported):
    _, directory, _ = exported
    assert sorted(file.name for file in directory.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "auto_map" not in json.loads((directory / "config.json").read_text()), "no remote code"


def test_loaded_model_gives_our_logits(exported, texts):
    model, directory, report = exported
    stock, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert {type(stock).__name__} < {"GPT2LMHeadModel", "LlamaForCausalLM"}
    body = body_from_state(model.config, model.body)
    embedding = SourceEmbedding(model.rows.clone(), model.position, torch.float32, 8)
    for ids in samples_of(model, texts):
        tokens = torch.from_numpy(ids)[None]
        with torch.no_grad():
            ours, theirs = embedding.logits(body(embedding.embed(tokens))), stock(input_ids=tokens).logits
        assert ours.abs().max() > 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGIT_TOLERANCE)
    assert report.logit_difference < LOGIT_TOLERANCE and report.suppressed == 0
    assert report.positions == sum(len(ids) for ids in samples_of(model, texts))


def test_generation_goes_on_with_the_likeliest_token_of_our_model(exported, texts):
    """Greedy generation, with the stock model's cache, against our whole forward at every step."""
    model, directory, _ = exported
    stock = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer("the river", return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == model.tokenizer.encode("the river")
    found = stock.generate(**prompt, do_sample=False, min_new_tokens=10, max_new_tokens=10)[0]
    body = body_from_state(model.config, model.body)
    embedding = SourceEmbedding(model.rows.clone(), model.position, torch.float32, 8)
    ids = prompt["input_ids"]
    for _ in range(10):
        with torch.no_grad():
            logits = embedding.logits(body(embedding.embed(ids)))[0, -1]
        logits[model.tokenizer.eod_id] = -torch.inf  # min_new_tokens
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    assert found.tolist() == ids[0].tolist()
    assert tokenizer.decode(found[: prompt["input_ids"].shape[1]]) == "the river"


def test_absent_ids_have_zero_rows_and_are_listed(trimmed):
    model, directory, report = trimmed
    absent = np.setdiff1d(np.arange(model.tokenizer.vocab_size), model.ids)
    assert 0 < len(absent) == report.suppressed
    listed = json.loads((directory / "generation_config.json").read_text())["suppress_tokens"]
    assert listed == absent.tolist()
    table = AutoModelForCausalLM.from_pretrained(directory).get_input_embeddings().weight
    assert table.shape == (model.tokenizer.vocab_size, 32)
    assert not table[absent].any() and torch.equal(table[model.ids], model.rows)


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": True, "temperature": 50.0, "top_k": 0}, {"num_beams": 3}]
)
def test_no_suppressed_id_is_ever_generated(trimmed, texts, how):
    model, directory, _ = trimmed
    stock = AutoModelForCausalLM.from_pretrained(directory)
    prompt = AutoTokenizer.from_pretrained(directory)(texts[0], return_tensors="pt")["input_ids"][:, :4]
    known = set(model.ids.tolist())
    options = {"min_new_tokens": 16, "max_new_tokens": 16, **how}
    if how.get("do_sample"):
        options["num_return_sequences"] = 5

    def generated():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return set(stock.generate(input_ids=prompt, **options)[:, 4:].flatten().tolist())

    assert generated() <= known
    if how.get("do_sample"):  # without the list the same call does give some: the assertion can fail
        stock.generation_config.suppress_tokens = None
        assert not generated() <= known


def test_card_tells_the_facts(trimmed):
    model, directory, report = trimmed
    card = (directory / "README.md").read_text()
    assert "| seed | 1 |" in card and f"{report.suppressed:,} rows are zeros" in card
    assert f"{report.logit_difference:.2e}" in card


def test_large_weights_are_split_with_an_index(make_model, texts, tmp_path):
    model = make_model("gpt")
    report = export(model, tmp_path / "out", texts, max_shard_size="20KB")
    shards = sorted(file.name for file in (tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "out" / "model.safetensors").exists()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert report.logit_difference < LOGIT_TOLERANCE  # it was loaded back


def test_a_difference_in_logits_is_refused_and_nothing_left(make_model, texts, tmp_path, monkeypatch):
    model = make_model("gpt")
    right = huggingface.to_transformers_state

    def wrong(*arguments):
        state = right(*arguments)
        state["transformer.h.1.mlp.c_fc.bias"] = state["transformer.h.1.mlp.c_fc.bias"] + 1e-2
        return state

    monkeypatch.setattr(huggingface, "to_transformers_state", wrong)
    with pytest.raises(UserError, match="is not written: its logits differ"):
        export(model, tmp_path / "out", texts)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_no_numbers_are_refused(make_model, texts, tmp_path):
    model = make_model("gpt")
    body = model.body | {"final_norm.bias": torch.full((32,), torch.nan)}
    with pytest.raises(UserError, match="differ from the training code's by nan"):
        export(dataclasses.replace(model, body=body), tmp_path / "out", texts)


def test_only_columns_that_exist_are_compared(trimmed, texts):
    model, directory, _ = trimmed
    arguments = (model.config, model.body, model.ids, model.rows, model.position, directory, samples_of(model, texts))
    assert largest_logit_difference(*arguments) < LOGIT_TOLERANCE


def test_a_tokenizer_that_differs_is_refused(make_model, texts, tmp_path, monkeypatch):
    mismatch = huggingface.parity  # the real one, on another tokenizer's files

    def other(tokenizer, directory, given):
        spec = json.loads((directory / "tokenizer.json").read_text())
        spec["model"]["merges"] = spec["model"]["merges"][:1]
        (directory / "tokenizer.json").write_text(json.dumps(spec))
        return mismatch(tokenizer, directory, given)

    monkeypatch.setattr(huggingface, "parity", other)
    with pytest.raises(UserError, match="would treat the text 'the river"):
        export(make_model("gpt"), tmp_path / "out", texts)
    assert list(tmp_path.iterdir()) == []


def test_rows_beyond_the_tokenizer_are_refused(make_model):
    model = make_model("gpt")
    with pytest.raises(UserError, match="only 320 ids"):
        dataclasses.replace(model, ids=model.ids + 1)
