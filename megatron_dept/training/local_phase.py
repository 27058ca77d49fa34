"""How far a silo is in its turn of one source: what the round loop keeps while it trains."""

from dataclasses import dataclass

from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.training.embeddings import HeldEmbedding
from megatron_dept.training.sources import Source


@dataclass
class LocalPhase:
    """This silo's turn of one source in one slot; an idle silo has none but keeps step with the others."""

    source: Source | None
    held: HeldEmbedding | None
    step: int = 0
    bad: int = 0
    trained: int = 0
    """Steps since the silos last met."""
    skipped: int = 0
    """Of those, the skipped ones."""
    stop: bool = False

    @property
    def name(self) -> str | None:
        return self.source.name if self.source is not None else None

    @property
    def owner(self) -> EmbeddingOwner | None:
        """None on an idle silo, and on the middle stages of a pipeline."""
        return self.held.owner if self.held is not None else None
