"""What `report.json` holds: every number that the page shows, with its unit.

The descriptions here are the documentation: `describe()` writes docs/report-schema.md, and a test holds the two equal.
Numbers that were not measured are null, never zero.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

FORMAT_VERSION = 1

Measured = Annotated[
    float,
    BeforeValidator(lambda value: math.inf if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, return_type=float | None, when_used="json"),
]
"""A score that may have overflowed: infinite in Python, null in JSON, which knows no infinity."""


class Entry(BaseModel):
    """Base of all parts: an unknown field is an error, so that a typing mistake is not a silent loss."""

    model_config = ConfigDict(extra="forbid")


class Run(Entry):
    """One run directory."""

    name: str = Field(description="name of the run directory")
    method: str = Field(description="label used in every figure and table, e.g. `GLOB`, `STD τ=1`")
    variant: str = Field(description="dept.variant of pre-training (for an adapt run: of the run it continues)")
    phase: Literal["pretrain", "adapt"]
    protocol: Literal["random", "own"] | None = Field(description="adapt runs: the embedding they start from")
    base_run: str | None = Field(description="adapt runs: name of the run whose body they continue")
    seed: int
    sequential_steps: int = Field(
        description="inner steps one after another (a source's, in DEPT; all, in STD and ACT)"
    )
    total_tokens: int = Field(description="tokens trained by the whole federation")
    skipped_steps: int = Field(description="steps skipped for a non-finite gradient")
    silos: int
    n_local: int = Field(description="steps between two exchanges (STD: of a cycle)")
    evaluated: bool = Field(description="whether evaluation.json was there; if not, the run is in the curves alone")


class Curve(Entry):
    """One line of a figure."""

    run: str
    method: str
    source: str | None = Field(description="null: mean over the sources")
    tokens: list[float] = Field(description="horizontal axis: tokens trained by the whole federation so far")
    values: list[float] = Field(description="vertical axis, same length")


class Curves(Entry):
    """Every line of every figure of curves."""

    heldout_bits_per_byte: list[Curve] = Field(description="pre-training, held-out text; comparable across tokenizers")
    training_loss: list[Curve] = Field(
        description="pre-training, nats a token, mean of up to 60 stretches; STD and ACT: of the blend (source null); "
        "not comparable across tokenizers"
    )
    adapt_bits_per_byte: list[Curve] = Field(description="adapt from random embeddings, held-out text")
    activation_norm: list[Curve] = Field(description="mean L2 norm over tokens of the body's output, mean of sources")
    parameter_norm: list[Curve] = Field(description="L2 norm of the body's parameters, mean of sources")


class Score(Entry):
    """Held-out text of one source under one run."""

    perplexity: Measured = Field(
        description="exp of nats a token; comparable on the same tokenizer only; null where it overflowed"
    )
    bits_per_byte: Measured = Field(description="comparable across tokenizers; null where it is not finite")
    tokens: int = Field(description="scored tokens")
    replaced_tokens: int = Field(description="held-out tokens outside the vocabulary, scored by their byte pieces")
    vocabulary_size: int = Field(description="ids the softmax ran over")
    perplexity_compares: bool = Field(
        description="false where the tokenizer is not the global one, or where so many tokens were replaced by byte "
        "pieces that scored tokens differ by over 1 % from the baselines'"
    )
    perplexity_improvement: float | None = Field(
        description="percent below the best baseline's perplexity of this source (negative: worse); null for "
        "baselines, without a baseline, or where perplexities do not compare"
    )
    bits_per_byte_improvement: float | None = Field(description="the same in bits per byte; null only for baselines")


class Row(Entry):
    """One method in a table of scores."""

    method: str
    run: str
    baseline: bool = Field(description="STD or ACT")
    same_tokenizer: bool = Field(description="scored under the global tokenizer, so perplexities compare")
    sources: dict[str, Score] = Field(description="by source name")
    average: Score | None = Field(
        description="plain mean over the sources, improvement against the best baseline's mean; tokens and replaced "
        "tokens are sums; null where a source has no score"
    )


class Table(Entry):
    """Methods by sources at one moment, on trained or on held-out sources."""

    title: str
    when: Literal["after_adapt_random", "after_adapt_own", "before_adapt"]
    sources: list[str]
    out_of_distribution: bool = Field(description="sources that no run was pre-trained on")
    best_baseline: dict[str, str | None] = Field(
        description="by source and `average`: the baseline of lowest perplexity"
    )
    rows: list[Row]


class Memory(Entry):
    """Embedding that is in memory while a source is trained."""

    method: str
    run: str
    vocabulary_mean: float = Field(description="ids, mean over trained sources")
    vocabulary_largest: int
    parameters_mean: float = Field(description="token table parameters, mean over trained sources (formula: V_k d)")
    parameters_largest: int
    megabytes_mean: float = Field(description="the token table in fp32, 10^6 bytes")
    model_parameters_mean: float = Field(description="body, position table and token table")
    reduction: float | None = Field(
        description="global table / mean table; null without a run on the global vocabulary"
    )


class Communication(Entry):
    """Bytes a run sent, as its ledger counted them, beside what the formulas say."""

    method: str
    run: str
    baseline: bool = Field(description="STD or ACT")
    steps: int = Field(description="sequential steps")
    bytes_by_kind: dict[str, int] = Field(description="`scope/kind`: bytes sent in the whole run, summed over ranks")
    training_bytes_per_step: float = Field(description="gradient, parameter, body, embedding and position bytes a step")
    training_bytes_per_token: float
    predicted_bytes_per_step: float | None = Field(description="what --dry-run computed for the same kinds")
    formula_parameters_per_step: float = Field(description="the paper's Table 1: one payload, a step's share")
    formula_bytes_per_step: float | None = Field(
        description="the formula in bytes of this run, times 2 (n - 1): what n ranks send to exchange one payload; "
        "null where n is not known"
    )
    exchanging_ranks: int | None = Field(description="n: silos, or the data-parallel ranks of STD and ACT")
    reduction_measured: float | None = Field(
        description="training bytes a step of STD (tau 1 where there is one) / of this run"
    )
    reduction_measured_per_token: float | None = Field(description="the same per trained token")
    reduction_formula_parameters: float | None = Field(
        description="by the formula at this configuration, in parameters, as the paper counts"
    )
    reduction_formula_bytes: float | None = Field(
        description="by the formula at this configuration, in bytes of its precision (bf16 gradients, fp32 deltas)"
    )


class PaperSetting(Entry):
    """The formulas at the sizes of the paper."""

    setting: str
    method: str
    embedding_parameters: float
    model_parameters: float
    parameters_per_step: float
    reduction_parameters: float = Field(description="against STD, as the paper counts; 714 at 1.3B with SPEC-OPT")
    reduction_bytes: float = Field(description="against STD, bf16 gradients against fp32 deltas")


class Report(Entry):
    """The whole of `report.json`."""

    format_version: int = FORMAT_VERSION
    findings: list[str] = Field(description="the page's opening sentences: what was found, also where DEPT loses")
    notes: list[str] = Field(description="what is missing or differs between runs, e.g. unequal total tokens")
    runs: list[Run]
    trained_sources: list[str]
    curves: Curves
    tables: list[Table]
    memory: list[Memory]
    communication: list[Communication]
    paper: list[PaperSetting]
    figures: dict[str, str] = Field(description="figure name: file name beside this file")


def describe() -> str:
    """docs/report-schema.md: every part with its fields, types and units."""
    lines = [
        "# The schema of `report.json`",
        "",
        f"Format version {FORMAT_VERSION}. `tools/report.py` writes it beside `index.html`; it holds every number that "
        "the page shows. Numbers that were not measured are `null`. Written by "
        "`python -m megatron_dept.evaluation.report.schema`; a test holds the two equal.",
    ]
    for part in _parts(Report, []):
        lines += ["", f"## {part.__name__}", "", (part.__doc__ or "").strip(), ""]
        lines += ["| field | type | meaning |", "|---|---|---|"]
        for name, field in part.model_fields.items():
            lines.append(f"| `{name}` | {_type_text(field.annotation)} | {field.description or ''} |")
    return "\n".join(lines) + "\n"


def _parts(part: type[Entry], seen: list[type[Entry]]) -> Iterator[type[Entry]]:
    if part in seen:
        return
    seen.append(part)
    yield part
    for field in part.model_fields.values():
        for inner in _entries(field.annotation):
            yield from _parts(inner, seen)


def _entries(annotation: Any) -> Iterator[type[Entry]]:
    if isinstance(annotation, type) and issubclass(annotation, Entry):
        yield annotation
    for inner in get_args(annotation):
        yield from _entries(inner)


def _type_text(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        text = "null" if annotation is type(None) else annotation.__name__
        return f"[{text}](#{text.lower()})" if issubclass(annotation, Entry) else text
    arguments = get_args(annotation)
    origin = getattr(annotation, "__origin__", None)
    if origin is Literal:
        return " or ".join(f'"{value}"' for value in arguments)
    if origin is list:
        return f"list of {_type_text(arguments[0])}"
    if origin is dict:
        return f"object of {_type_text(arguments[1])}"
    return " or ".join(_type_text(argument) for argument in arguments)


if __name__ == "__main__":
    print(describe(), end="")
