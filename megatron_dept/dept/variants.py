"""The variants as data: which vocabulary a source uses, and where its embedding rows come from and go to.

Nothing in the project branches on a variant's name; it asks this table. Letters as elsewhere: `V` the global
vocabulary, `V_k` the global tokens that occur in source k, `phi` the token table, `psi` the position table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Vocabulary = Literal["global", "trimmed", "own"]
"""global: all V ids; trimmed: V_k of the global tokenizer; own: the ids of the source's own tokenizer."""

Rows = Literal["shared", "local", "resident"]
"""shared: read from the global table, deltas averaged back; local: the source's own, stored between its rounds and
never averaged; resident: one table that stays in memory all along."""


@dataclass(frozen=True)
class VariantRule:
    """What a variant does with vocabulary, embedding rows and body (DEPT, arXiv 2410.05021, algorithm 1)."""

    vocabulary: Vocabulary
    token_rows: Rows
    position_rows: Rows
    averages_body: bool
    """Body deltas are averaged over the sampled sources at the end of a round (theta in algorithm 1)."""
    synchronous: bool
    """One blended stream on one silo, gradients reduced every step, no outer exchange."""
    resets_embedding: bool
    """Embeddings are drawn anew every N_local steps and follow a cosine per cycle (active forgetting)."""


VARIANTS: Mapping[str, VariantRule] = MappingProxyType(
    {
        # Algorithm 1, GLOB: theta, phi, psi all global; local SGD with a source per silo.
        "glob": VariantRule("global", "shared", "shared", True, False, False),
        # Algorithm 1, TRIM: theta, psi global; phi restricted to the rows V_k, averaged per row over its holders.
        "trim": VariantRule("trimmed", "shared", "shared", True, False, False),
        # Algorithm 1, SPEC: theta global; phi_k, psi_k local to the source, never aggregated.
        "spec": VariantRule("trimmed", "local", "local", True, False, False),
        # Algorithm 1, SPEC-OPT: SPEC with a tokenizer, and so a vocabulary, of the source's own.
        "spec_opt": VariantRule("own", "local", "local", True, False, False),
        # Baseline STD: synchronous training on a mixture, source k drawn with probability ~ n_k ** tau.
        "std": VariantRule("global", "resident", "resident", False, True, False),
        # Baseline ACT: STD with active forgetting (Chen et al., arXiv 2307.01163).
        "act": VariantRule("global", "resident", "resident", False, True, True),
    }
)
