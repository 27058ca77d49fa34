"""What a variant costs by the paper's formulas (DEPT, arXiv 2410.05021, Tables 1 and 9): memory and communication.

Counts are parameters as the paper counts them: one payload a round, not up plus down, averaged over its steps. Bytes
say what the count hides: STD sends low-precision gradients where DEPT sends fp32 deltas. What a run really moves is
the ledger's to say. Letters: `V` global vocabulary, `V_k` a source's, `L` position rows, `d` hidden size,
`M` = body + (V + L) d parameters of the whole model.
"""

from dataclasses import dataclass

from megatron_dept.dept.variants import VARIANTS


@dataclass(frozen=True)
class Sizes:
    """What the formulas are in; all counts, none negative."""

    body: int
    """Parameters of the transformer body, position table not included."""
    vocabulary: int
    """V, rows of the global table."""
    source_vocabulary: float
    """|V_k|: under the global tokenizer for TRIM and SPEC, of the own tokenizer for SPEC-OPT; a mean over sources."""
    positions: int
    """L, rows of the learned position table; 0 without one."""
    hidden: int
    n_local: int
    """Inner steps between two exchanges."""


def embedding_parameters(variant: str, sizes: Sizes) -> float:
    """Token-table parameters a silo holds in memory while it trains a source: V d, or V_k d (Table 1, column 1)."""
    whole = VARIANTS[variant].vocabulary == "global"
    return (sizes.vocabulary if whole else sizes.source_vocabulary) * sizes.hidden


def model_parameters(variant: str, sizes: Sizes) -> float:
    """Parameters of the model a silo trains: M, or M - (V - V_k) d."""
    return sizes.body + sizes.positions * sizes.hidden + embedding_parameters(variant, sizes)


def communication_per_step(variant: str, sizes: Sizes) -> float:
    """Parameters exchanged per inner step (Table 1, column 2).

    STD and ACT: M. GLOB: M / N_local. TRIM: (M - (V - V_k) d) / N_local. SPEC and SPEC-OPT: (M - (V + L) d) / N_local,
    the body alone.
    """
    rule = VARIANTS[variant]
    if rule.synchronous:
        return model_parameters(variant, sizes)
    exchanged = float(sizes.body)
    if rule.token_rows == "shared":
        exchanged += embedding_parameters(variant, sizes)
    if rule.position_rows == "shared":
        exchanged += sizes.positions * sizes.hidden
    return exchanged / sizes.n_local


def communication_bytes_per_step(variant: str, sizes: Sizes, gradient_bytes: int = 2, delta_bytes: int = 4) -> float:
    """`communication_per_step` in bytes: gradients of STD and ACT in bf16, deltas of the others in fp32 by default."""
    width = gradient_bytes if VARIANTS[variant].synchronous else delta_bytes
    return communication_per_step(variant, sizes) * width


def reduction(variant: str, sizes: Sizes) -> float:
    """How many times fewer parameters than STD a variant exchanges per step (the paper's 714x at 1.3B)."""
    return communication_per_step("std", sizes) / communication_per_step(variant, sizes)


def reduction_in_bytes(variant: str, sizes: Sizes, gradient_bytes: int = 2, delta_bytes: int = 4) -> float:
    """`reduction` in bytes: bf16 gradients against fp32 deltas halve it."""
    return communication_bytes_per_step("std", sizes, gradient_bytes) / communication_bytes_per_step(
        variant, sizes, delta_bytes=delta_bytes
    )
