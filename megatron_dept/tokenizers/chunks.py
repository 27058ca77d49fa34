"""How text is cut before a sentencepiece model of ours sees it: at lines, and within very long ones.

The rule is part of a tokenizer of ours, in training, in encoding and in the Hugging Face export, and a regular
expression that Python and Oniguruma (Hugging Face tokenizers) read alike. It bounds the work and, with scores in steps
of `SCORE_STEP`, makes every sum of scores exact in float32 and float64 alike (see `to_huggingface`); sentencepiece's
own float32 sums over a whole document of a million characters would have lost the fraction.
"""

import re

# Line breaks lead their line, because sentencepiece's trainer strips them from a sentence's end. A longer line than
# 512 characters is cut before its last space in that window, or, where there is none, anywhere.
CHUNK_PATTERN = (
    r"(?>[\r\n]{0,64})(?:[^\r\n]{1,512}(?![^\r\n])|[^\r\n]{1,511}(?= )|[^\r\n]{1,512})"
    r"|[\r\n]{1,64}"
)
MAX_CHUNK_CHARACTERS = 64 + 512

SCORE_STEP = 2.0**-8  # unigram scores are log probabilities: a step of 0.4 % of a probability decides nothing

_CHUNK = re.compile(CHUNK_PATTERN)


def split_chunks(text: str) -> list[str]:
    """Cut `text` into chunks of at most `MAX_CHUNK_CHARACTERS` that joined give it back."""
    return _CHUNK.findall(text)
