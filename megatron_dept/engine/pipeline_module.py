"""A body's stages as DeepSpeed's pipeline sees them: one module a stage, the embedding behind a plain object.

Shapes: `b` sequences of a micro-batch, `s` tokens a sequence, `h` hidden; with sequence parallelism hidden states are
[b, s/T, h] on each of T tensor ranks.
"""

import contextlib
import io
from collections.abc import Iterator

from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.topology.layout import SiloShape


class EmbeddingSlot:
    """Where a stage finds the embedding of the source at work: the first to embed, the last for the loss.

    No module, so that DeepSpeed never sees the parameters; another source is put in without touching the engine.
    """

    def __init__(self) -> None:
        self._module: SourceEmbedding | None = None
        self._training = False
        self._output: Tensor | None = None

    @contextlib.contextmanager
    def holding(self, module: SourceEmbedding | None, training: bool) -> Iterator[None]:
        """`module` (None on stages between the ends) for the length of a block; afterwards nothing of it is kept."""
        self._module, self._training = module, training
        try:
            yield
        finally:
            self._module = self._output = None

    def embed(self, ids: Tensor) -> Tensor:
        """Local ids [b, s] -> hidden states, on the first stage."""
        assert self._module is not None, "the first stage has no embedding"
        return self._module.embed(ids)

    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The last stage's `loss_fn`: the mean loss (scalar) in training, else each token's [b, s]."""
        assert self._module is not None, "the last stage has no embedding"
        if not self._training:
            return self._module.token_losses(hidden, targets)
        self._output = hidden.detach()
        return self._module.loss(hidden, targets)

    def output_norm(self) -> float | None:
        """Mean over tokens of the L2 norm of the body's last output here; None on stages that have none."""
        return None if self._output is None else float(self._output.float().norm(dim=-1).mean())


class Stage(nn.Module):
    """This rank's part of the body, behind the embedding on the first stage."""

    def __init__(self, body: nn.Module, slot: EmbeddingSlot, embeds: bool) -> None:
        super().__init__()
        self.body = body
        self._slot = slot
        self._embeds = embeds

    def forward(self, arriving: Tensor) -> Tensor:
        """Ids [b, s] on the first stage, the previous stage's hidden states elsewhere -> hidden states."""
        return self.body(self._slot.embed(arriving) if self._embeds else arriving)


def pipeline_module(body: nn.Module, slot: EmbeddingSlot, shape: SiloShape, stage: int) -> PipelineModule:
    """`body`, the part of `stage`, as one of `shape.pipe` layers, one a stage. Collective over the silo."""
    # What the other stages hold is built there alone.
    layers: list[nn.Module | LayerSpec] = [LayerSpec(nn.Identity)] * shape.pipe
    layers[stage] = Stage(body, slot, embeds=stage == 0)
    topology = PipeModelDataParallelTopology(num_pp=shape.pipe, num_mp=shape.tensor, num_dp=shape.data)
    # DeepSpeed prints seeds, topology and stages with bare prints.
    with contextlib.redirect_stdout(io.StringIO()):
        return PipelineModule(layers, topology=topology, loss_fn=slot.score, partition_method="uniform")
