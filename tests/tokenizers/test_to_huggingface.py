"""The exported tokenizer gives our ids and our text for any text, read by plain transformers."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers import model_proto
from megatron_dept.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_dept.tokenizers.model_proto import map_scores
from megatron_dept.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_dept.tokenizers.to_huggingface import parity, to_huggingface
from megatron_dept.tokenizers.train import train_sentencepiece

# What parts implementations: ties in runs, bytes, signs of sentencepiece, letters of specials, unseen scripts.
ATOMS = st.one_of(
    st.sampled_from(
        ["a", "b", " ", "\n", "\t", "\r\n", "-", "=", "return", "für", "日", "שלום", "\u2581", "\u2585", "\0"]
    ),
    st.sampled_from(["</s>", "<s>", "<unk>", "<0x0A>", "<0x41>", "<|endoftext|>", "\ufeff", "\u0301", "😀", "ĠĊâ"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
TEXT = st.lists(st.tuples(ATOMS, st.sampled_from([1, 1, 1, 2, 7, 40])), max_size=12).map(
    lambda runs: "".join(text * count for text, count in runs)
)


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported")
    to_huggingface(trained, directory, model_max_length=64)
    return directory


@pytest.fixture(scope="session")
def plain(exported):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(exported), local_files_only=True)
    loaded.model_max_length = 1 << 40
    return loaded


@settings(max_examples=150, deadline=1000)
@given(text=TEXT)
def test_ids_and_text_are_ours(trained, plain, text):
    ids = trained.encode(text)
    assert plain(text)["input_ids"] == ids
    assert plain.encode(text) == ids
    assert plain.decode([*ids, trained.eod_id], skip_special_tokens=True) == text


@settings(max_examples=100, deadline=1000)
@given(data=st.data())
def test_any_ids_decode_as_ours(trained, plain, data):
    ids = data.draw(st.lists(st.integers(3, trained.vocab_size - 1), max_size=20))
    ours, theirs = trained.decode(ids), plain.decode(ids)
    if "\ufffd" in ours and trained.path.stem == "bpe":
        # Hugging Face's byte fallback gives up on a whole run of bytes where ours keeps its valid characters.
        assert "\ufffd" in theirs
    else:
        assert theirs == ours


def test_plain_transformers_can_generate_with_it(trained, plain):
    assert set(plain("a b")) == {"input_ids", "attention_mask"}  # generate() refuses others
    assert (plain.eos_token_id, plain.bos_token_id, plain.unk_token_id) == (2, 1, 0)
    assert len(plain) == trained.vocab_size
    assert plain.decode([2]) == "</s>"


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_model_beside_it_does_not_change_it(trained, tmp_path, documents, model_type):
    to_huggingface(trained, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert parity(trained, tmp_path, [*documents[:5], "  </s> \u2581", "a" * 2000]) is None


def test_parity_finds_the_first_text_that_differs(trained, exported, tmp_path):
    assert parity(trained, exported, ["a", "a b"]) is None
    to_huggingface(trained, tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    found = parity(trained, tmp_path, ["fine", "Not", "NOT"])
    assert found is not None
    assert (found.text, found.what) == ("Not", "ids")
    assert found.ours == trained.encode("Not")
    assert found.exported == trained.encode("not")
    spec["normalizer"] = None
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [spec["decoder"], {"type": "Strip", "content": "f", "start": 1, "stop": 0}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    found = parity(trained, tmp_path, ["x", "fine"])
    assert found is not None
    assert found.what == "decoded text"


@pytest.mark.parametrize("seed", range(8))
def test_ties_fall_alike_in_models_of_few_letters(seed, tmp_path):
    """Two or three letters make nearly every segmentation a tie; each seed is another model."""
    draw = random.Random(seed)
    letters = draw.choice(["ab", "ab ", "a", "a\n b", "aé日", "01<x>"])
    words = ["".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(8)]
    text = ["".join(draw.choices(words, k=40)) for _ in range(20)]
    path = tmp_path / "t.model"
    for model_type in ("unigram", "bpe"):
        size = 290
        try:
            path.write_bytes(train_sentencepiece(text, size, model_type, 1.0))
        except DataError as error:
            largest = int(str(error).split("set it to ")[1].split()[0])
            path.write_bytes(train_sentencepiece(text, largest, model_type, 1.0))
        tokenizer = SentencePieceTokenizer(path)
        to_huggingface(tokenizer, tmp_path)
        theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tried = ["".join(draw.choices(letters, k=draw.randint(1, 700))) for _ in range(150)]
        assert [each.ids for each in theirs.encode_batch(tried, add_special_tokens=False)] == tokenizer.encode_batch(
            tried
        )


def test_the_export_is_a_tokenizer_of_ours_too(trained, exported, documents):
    again = HuggingFaceTokenizer(exported / "tokenizer.json")
    assert again.encode_batch(documents) == trained.encode_batch(documents)
    assert again.token_bytes() == trained.token_bytes()
    assert again.byte_ids.tolist() == trained.byte_ids.tolist()
    assert again.special_ids.tolist() == trained.special_ids.tolist()
    assert again.eod_id == trained.eod_id


def test_a_tokenizer_json_is_exported_without_added_specials(families, tmp_path):
    for name, tokenizer in families.items():
        to_huggingface(tokenizer, tmp_path / name)
        assert (
            parity(tokenizer, tmp_path / name, ["", "ab a b", "longer than five tokens, für a <|endoftext|>"]) is None
        )


def test_a_model_that_changes_text_is_refused(train_foreign, tmp_path):
    tokenizer = SentencePieceTokenizer(train_foreign(tmp_path / "f.model", vocab_size=30))
    with pytest.raises(DataError, match=r"f\.model .*no exact export"):
        to_huggingface(tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_between_the_steps_are_refused(documents, tmp_path):
    path = tmp_path / "between.model"
    data = train_sentencepiece(documents, 300, "unigram")
    path.write_bytes(map_scores(data, lambda piece: piece.score * 1.001))
    with pytest.raises(DataError, match=r"between\.model .*train it again"):
        to_huggingface(SentencePieceTokenizer(path), tmp_path / "out")


@pytest.mark.parametrize("seed", range(3))
def test_a_character_known_only_within_longer_pieces_costs_the_same(seed, tmp_path):
    """Sentencepiece charges such a character once, however many bytes it has; so must its bytes."""
    draw = random.Random(seed)
    data = train_sentencepiece(["".join(draw.choices("abẽé", k=60)) for _ in range(30)], 300, "unigram")
    fields = list(model_proto._fields(data))
    entries = zip(fields, model_proto.parse_model(data).pieces, strict=False)
    dropped = {entry for entry, piece in entries if piece.text in ("ẽ", "é")}
    path = tmp_path / "t.model"
    path.write_bytes(b"".join(model_proto._field(*entry) for entry in fields if entry not in dropped))
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer.vocab_size == 298
    to_huggingface(tokenizer, tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # Two and three bytes, and one script, as pieces are. In an odd run one is left over, and either choice is open.
    tried = ["".join(draw.choices("ẽé", k=2 * draw.randint(0, 6) + 1)) for _ in range(300)]
    ours = tokenizer.encode_batch(tried)
    assert [each.ids for each in theirs.encode_batch(tried, add_special_tokens=False)] == ours
    assert any(3 + 0xE1 in ids for ids in ours)  # bytes were met
