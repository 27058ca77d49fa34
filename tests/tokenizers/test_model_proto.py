"""The hand-written reader agrees with sentencepiece's own."""

import numpy as np
import pytest
import sentencepiece

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers import model_proto


def test_pieces_are_those_of_sentencepiece(trained):
    proto = model_proto.parse_model(trained.path.read_bytes())
    reference = sentencepiece.SentencePieceProcessor(model_file=str(trained.path))
    assert [piece.text for piece in proto.pieces] == [reference.id_to_piece(i) for i in range(reference.vocab_size())]
    assert [piece.score for piece in proto.pieces] == [reference.get_score(i) for i in range(reference.vocab_size())]
    assert [piece.type == model_proto.BYTE for piece in proto.pieces] == [
        reference.is_byte(i) for i in range(reference.vocab_size())
    ]
    assert proto.model_type == trained.path.stem
    assert proto.lossless


def test_scores_are_replaced_and_nothing_else(trained):
    data = trained.path.read_bytes()
    assert model_proto.map_scores(data, lambda piece: piece.score) == data
    halved = model_proto.parse_model(model_proto.map_scores(data, lambda piece: piece.score / 2))
    original = model_proto.parse_model(data)
    assert [piece.score for piece in halved.pieces] == [np.float32(piece.score / 2) for piece in original.pieces]
    assert [piece.text for piece in halved.pieces] == [piece.text for piece in original.pieces]
    assert halved.lossless == original.lossless


@pytest.mark.parametrize(
    "option",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"byte_fallback": False},
        {"user_defined_symbols": ["cat"]},
        {"required_chars": ""},
    ],
)
def test_whatever_changes_text_is_seen(option, tmp_path):
    kept = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "allow_whitespace_only_pieces": True,
        "required_chars": model_proto.SPACE,
    }
    for options, lossless in ((kept, True), (kept | option, False)):
        with open(tmp_path / "t.model", "wb") as handle:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["thecatsat"] * 20),
                model_writer=handle,
                vocab_size=300,
                hard_vocab_limit=False,
                minloglevel=2,
                **options,
            )
        assert model_proto.parse_model((tmp_path / "t.model").read_bytes()).lossless is lossless


@pytest.mark.parametrize("data", [b"", b"\x00", b"\x0a", b"\x0a\x05a", b"\xff" * 40, b"\x0a\x02\x0a\xff", b"\x13\x00"])
def test_what_is_no_model_is_refused(data):
    with pytest.raises(DataError, match="not a sentencepiece model"):
        model_proto.parse_model(data)
