"""Small tokenizers, made once: ours on a text of several scripts, code and every kind of space, and other families'."""

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_dept.common.seeding import generator_for
from megatron_dept.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from megatron_dept.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from megatron_dept.tokenizers.train import train_sentencepiece

WORDS = (
    "return",
    "def",
    "self.x",
    "(a)",
    "für",
    "naïve",
    "שלום",
    "日本",
    "語",
    "привет",
    "==",
    "---",
    "x1",
    "the",
    "of",
)
SPACES = (" ", " ", " ", "  ", "    ", "\n", "\n\n", "\n    ", "\t", "\r\n")


def corpus(count: int = 60) -> list[str]:
    """Documents of `WORDS` with random letters grown on, between `SPACES`."""
    draw = generator_for("tests", "tokenizer corpus")
    documents = []
    for _ in range(count):
        parts = []
        for _ in range(60):
            tail = "".join(draw.choice(list("abcde"), size=draw.integers(0, 4)))
            parts += [str(draw.choice(WORDS)), tail, str(draw.choice(SPACES))]
        documents.append("".join(parts))
    return documents


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return corpus()


@pytest.fixture(scope="session", params=["unigram", "bpe"])
def trained(request, documents, tmp_path_factory) -> SentencePieceTokenizer:
    path = tmp_path_factory.mktemp("trained") / f"{request.param}.model"
    path.write_bytes(train_sentencepiece(documents, 420, request.param))
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="session")
def train_foreign():
    def train(path, **options):
        """A model as others train them: sentencepiece's own defaults but for `options`."""
        with open(path, "wb") as handle:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(["the cat sat on the mat ﬁne"] * 20),
                model_writer=handle,
                hard_vocab_limit=False,
                minloglevel=2,
                **options,
            )
        return path

    return train


def gpt2_like(documents: list[str]) -> Tokenizer:
    """Byte-level BPE, with a plain added token and a post-processor that would add specials."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    built.train_from_iterator(documents, trainer)
    built.add_tokens([AddedToken("für", special=False, normalized=False)])
    built.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)])
    built.enable_truncation(5)
    built.enable_padding()
    return built


def llama2_like(documents: list[str]) -> Tokenizer:
    """BPE over U+2581 with byte fallback and an added space, as Llama 2's."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581a"]
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [("a", "b"), ("\u2581", "a")]
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    built.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", "<s>", "</s>"])
    return built


def metaspace_unigram(documents: list[str]) -> Tokenizer:
    """Unigram over U+2581 without bytes, as T5's."""
    pieces = [("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0), ("b", -3.0), ("\u2581ab", -4.0)]
    built = Tokenizer(models.Unigram(pieces, unk_id=1))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    built.add_special_tokens(["</s>", "<unk>"])
    return built


@pytest.fixture(scope="session")
def families(documents, tmp_path_factory) -> dict[str, HuggingFaceTokenizer]:
    directory = tmp_path_factory.mktemp("families")
    made = {}
    for family in (gpt2_like, llama2_like, metaspace_unigram):
        path = directory / f"{family.__name__}.json"
        family(documents).save(str(path))
        made[family.__name__] = HuggingFaceTokenizer(path)
    return made
