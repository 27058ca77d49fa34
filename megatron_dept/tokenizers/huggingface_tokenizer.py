"""Tokenizers in Hugging Face's `tokenizer.json` format, read by the `tokenizers` package.

Byte-level (GPT-2, Llama 3) and U+2581 families with byte fallback (Llama 2, Gemma) alike: what text an id stands for is
read from the file's own decoder.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers.base import Tokenizer
from megatron_dept.tokenizers.byte_alphabet import character_bytes

# The end-of-document token, by the names that the common families give it, first found first taken.
END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|end▁of▁sentence|>", "[EOS]")

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_KEEPS_TOKEN = {"Fuse", "Strip"}  # joins tokens, or takes the added space off the whole text's start


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. `DataError`: not such a file, no end token, or a decoder that is not text joined."""

    kind = "huggingface"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            text = self.path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except FileNotFoundError as error:
            raise DataError(f"tokenizer {path} does not exist; give a tokenizer.json") from error
        except Exception as error:  # the package raises plain Exception for all that it cannot parse
            raise DataError(f"{path} is not a Hugging Face tokenizer.json ({error}); give one") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # the letters of a special in a document stay letters
        self._spec: dict[str, Any] = json.loads(text)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self._names: list[str | None] = [None] * self.vocab_size  # ids may have gaps
        for name, index in vocabulary.items():
            self._names[index] = name
        self.eod_id = self._find_end(vocabulary)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items() if not token.special}
        self.special_ids = np.array(
            sorted({i for i, token in added.items() if token.special} | {self.eod_id}), np.int64
        )

    def _find_end(self, vocabulary: dict[str, int]) -> int:
        for name in END_NAMES:
            if name in vocabulary:
                return vocabulary[name]
        raise DataError(f"{self.path} has no end-of-document token; add one of {', '.join(END_NAMES)} to it")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(index) for index in ids]
        self._check_ids(ids)
        specials = set(self.special_ids.tolist())
        return self._tokenizer.decode([index for index in ids if index not in specials], skip_special_tokens=True)

    def _token_bytes(self) -> list[bytes]:
        to_bytes = self._token_decoder()
        specials = set(self.special_ids.tolist())
        out = []
        for index, name in enumerate(self._names):
            if name is None or index in specials:
                out.append(b"")
            elif index in self._added:
                out.append(self._added[index].encode())
            else:
                out.append(to_bytes(name))
        return out

    def _token_decoder(self) -> Callable[[str], bytes]:
        """What one token's name stands for, by the decoder's steps."""
        decoder = self._spec.get("decoder") or {"type": "none"}
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        replacements: list[tuple[str, str]] = []
        byte_level = byte_fallback = False
        for step in steps:
            kind = step["type"]
            if kind == "ByteLevel":
                byte_level = True
            elif kind == "ByteFallback":
                byte_fallback = True
            elif kind == "Metaspace":
                replacements.append((step["replacement"], " "))
            elif kind == "Replace" and "String" in step["pattern"]:
                replacements.append((step["pattern"]["String"], step["content"]))
            elif kind not in _KEEPS_TOKEN:
                raise DataError(
                    f"{self.path} has decoder step {kind}, which does not give each token's own bytes; use a "
                    "byte-level tokenizer or one with byte fallback"
                )
        alphabet = character_bytes()

        def to_bytes(name: str) -> bytes:
            if byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
                return bytes([int(match[1], 16)])
            for old, new in replacements:
                name = name.replace(old, new)
            if byte_level and all(character in alphabet for character in name):
                return bytes(alphabet[character] for character in name)
            return name.encode()

        return to_bytes
