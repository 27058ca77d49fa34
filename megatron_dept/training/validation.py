"""Every source's held-out text, scored with the global body at a round's end; silos share the sources."""

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_dept.common.lazy import LazyMapping
from megatron_dept.config.schema import RunConfig
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World
from megatron_dept.evaluation.heldout import HeldoutText, heldout_windows
from megatron_dept.evaluation.perplexity import Score, score
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.training.embeddings import EmbeddingBroker
from megatron_dept.training.metrics import Metrics
from megatron_dept.training.sources import KEPT_OPEN, SourceSet


class Validation:
    """Scores the sources; a source that has no embedding yet (SPEC, never sampled) is left out."""

    def __init__(
        self, config: RunConfig, world: World, sources: SourceSet, engine: SiloEngine, broker: EmbeddingBroker
    ) -> None:
        self._config = config
        self._world = world
        self._sources = sources
        self._engine = engine
        self._broker = broker
        self._slots = sources.slots(sources.names, world.layout.silos)
        own = [name for slot in self._slots if (name := slot[world.place.silo]) is not None]
        self._texts = LazyMapping(own, self._heldout, KEPT_OPEN)
        for name in own:
            self._texts[name]  # what is wrong with it is found before a step is trained

    def run(self) -> dict[str, tuple[Score, int]]:
        """(score, tokens replaced by their bytes) of each source this silo evaluates, of whole texts; collective."""
        scores: dict[str, tuple[Score, int]] = {}
        # Under a global vocabulary all sources have one embedding: fetched once, not once a source.
        common = self._sources.kind == "global"
        embedding = self._view(next(iter(self._sources.vocabularies))) if common else None
        for slot in self._slots:
            name = slot[self._world.place.silo]
            if not common:
                embedding = self._view(name)
            if name is not None and self._broker.has(name):
                text = self._texts[name]
                parts = self._world.data.all_gather_object((self._score(embedding, text), text.replaced))
                replaced = sum(part[1] for part in parts)
                scores[name] = (sum((part[0] for part in parts[1:]), parts[0][0]), replaced)
            if not common:
                embedding = None  # gone before the next is fetched
        return scores

    def _view(self, name: str | None) -> SourceEmbedding | None:
        return self._broker.view(name, self._sources.vocabularies[name] if name is not None else None)

    def _score(self, embedding: SourceEmbedding | None, text: HeldoutText) -> Score:
        device = self._world.device

        def forward(inputs: Tensor, targets: Tensor) -> Tensor:
            return self._engine.token_losses(embedding, inputs.to(device), targets.to(device))

        with torch.no_grad():
            return score(forward, text, self._config.training.micro_batch_size)

    def _heldout(self, name: str) -> HeldoutText:
        text = heldout_windows(
            self._sources.directories[name],
            self._config.model.seq_length,
            self._config.evaluation.max_tokens,
            self._sources.vocabularies[name],
        )
        return text.share(self._world.data.rank, self._world.data.size)


def report_scores(
    scores: Mapping[str, tuple[Score, int]], metrics: Metrics, engine: SiloEngine, round: int, step: int
) -> None:
    """Write what `Validation.run` returned after `round`, at sequential step `step`."""
    for name, (of_source, replaced) in scores.items():
        metrics.write(
            "validation",
            round=round,
            step=step,
            source=name,
            loss=of_source.nats_per_token,
            perplexity=of_source.perplexity,
            bits_per_byte=of_source.bits_per_byte,
            tokens=of_source.tokens,
            replaced_tokens=replaced,
        )
        engine.write_monitor([(f"{name}/validation_bits_per_byte", of_source.bits_per_byte, step)])
        metrics.say(f"round {round + 1} validation {name}: {of_source.bits_per_byte:.4f} bits per byte")
