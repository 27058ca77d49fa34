"""The README.md of an exported model: what it is, where it comes from, how it is loaded."""

from collections.abc import Mapping

_TEMPLATE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- dept
---

# {title}

A language model pre-trained with DEPT (Decoupled Embeddings for Pre-training Language Models, Iacob et al., ICLR 2025)
by megatron_dept. The architecture is transformers' own `{architecture}`; no remote code is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

## Facts

| | |
|---|---|
{facts}

## Vocabulary

{vocabulary}

## Check

{check}
"""


def model_card(
    title: str,
    architecture: str,
    facts: Mapping[str, str],
    vocab_size: int,
    absent: int,
    difference: float,
    positions: int,
) -> str:
    """The card's text. `facts` are shown as given; `difference` is the parity check's, over `positions` positions."""
    if absent:
        vocabulary = (
            f"The tokenizer has {vocab_size:,} ids; the model has embeddings of {vocab_size - absent:,} of them, those "
            f"its training text used, all bytes and all special ones. The other {absent:,} rows are zeros, and "
            "`generation_config.json` suppresses their ids, so `generate()` never gives one. In a prompt such an id "
            "means nothing to the model."
        )
    else:
        vocabulary = f"All {vocab_size:,} ids of the tokenizer have embeddings."
    check = (
        f"When it was exported, the logits of this directory, loaded by `AutoModelForCausalLM` in fp32, differed from "
        f"those of the training code by {difference:.2e} at most over {positions:,} positions, and its tokenizer gave "
        "the ids of the one used in training."
    )
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    return _TEMPLATE.format(title=title, architecture=architecture, facts=rows, vocabulary=vocabulary, check=check)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
