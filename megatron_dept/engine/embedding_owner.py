"""The embedding shard of the source in training: fp32 masters, an AdamW of their own, gradients reduced in its silo.

DeepSpeed never sees these parameters, so nothing in it is sized by a vocabulary, and the next source's embedding takes
their place without touching the engine. Shapes: `v` rows of the source's vocabulary, `h` hidden, `L` positions.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_dept.config.schema import OptimizerConfig
from megatron_dept.engine.world import World
from megatron_dept.models.embedding import SourceEmbedding


def build_optimizer(parameters: list[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The inner optimizer of the recipe; the learning rate is set before every step."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


class EmbeddingOwner:
    """One source's embedding while its silo trains it; dropped whole when the silo turns to another source."""

    def __init__(self, module: SourceEmbedding, config: OptimizerConfig, world: World) -> None:
        """`module`: this rank's shard. Of a pipeline, the first and the last stage own one each of the same rows."""
        self.module = module
        self._data, self._ends = world.data, world.ends
        # Each row of the tables is counted once: tensor ranks hold different ones, everything else holds copies.
        self._counts = world.first_stage and world.place.data == 0
        self._optimizer = build_optimizer(list(module.parameters()), config)

    @torch.no_grad()
    def reduce_gradients(self) -> float:
        """Average the gradients over the data ranks and sum a pipeline's two ends' of the tied table, in place.

        Returns the squared L2 norm of what this rank counts for its silo: 0.0 where another holds the same rows.
        Collective over the data ranks, then over the ends. Both ends are left with the same bits.
        """
        norms = []
        for name, parameter in self.module.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                assert self._ends.size > 1, f"{name} took no part in the loss"
                gradient = parameter.grad = torch.zeros_like(parameter)
            if self._data.size > 1:
                self._data.all_reduce_sum(gradient, "gradient")
                gradient.div_(self._data.size)
            if name == "token":
                self._ends.all_reduce_sum(gradient, "gradient")
            norms.append(torch.linalg.vector_norm(gradient))
        # Read once: on a GPU every look at a number waits for all that was asked of it.
        return float(torch.stack(norms).double().square().sum()) if self._counts else 0.0

    @torch.no_grad()
    def token_square(self) -> float:
        """Squared L2 norm of the token rows that this rank counts for its silo; 0.0 where another holds the same."""
        return float(self.module.token.double().square().sum()) if self._counts else 0.0

    @torch.no_grad()
    def step(self, learning_rate: float, coefficient: float | None) -> None:
        """Scale the gradients by the joint clip `coefficient` and step; None discards them."""
        if coefficient is not None:
            if coefficient < 1:
                torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], coefficient)
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """State by "<moment>/<parameter>" shaped like the parameter, and "step" [1]; empty before the first step."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            own: dict[str, Any] = self._optimizer.state.get(parameter, {})
            for key, value in own.items():
                if key == "step":
                    state["step"] = torch.as_tensor(value, dtype=torch.float32).detach().cpu().reshape(1).clone()
                elif value is not None:
                    state[f"{key}/{name}"] = value
        return state

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `optimizer_state` gave; an empty dictionary forgets all state."""
        self._optimizer.state.clear()
        if not state:
            return
        for name, parameter in self.module.named_parameters():
            own = self._optimizer.state[parameter]
            own["step"] = state["step"].squeeze(0).to(parameter.device, copy=True)
            for key, value in state.items():
                moment, _, owner = key.partition("/")
                if owner == name:
                    own[moment] = value.to(parameter.device).clone()
