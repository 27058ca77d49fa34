"""The same training in plain torch, in one process, on the whole batch: what every engine is held against.

Nothing of DeepSpeed, of the chunked loss or of the embedding module is used; of the project only the body's forward is.
Shapes: `B` sequences of a batch, `L` tokens, `v` vocabulary, `h` hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from megatron_dept.config.schema import RunConfig
from megatron_dept.models.build import build_body


class Plain:
    """fp32 masters of body and embedding; the forward in `compute_dtype`; one torch optimizer over all of them."""

    def __init__(self, config: RunConfig, token: Tensor, position: Tensor | None) -> None:
        self.config = config
        self.dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self.body = build_body(config.model, config.seed)
        self.token = token.clone().requires_grad_()
        self.position = None if position is None else position.clone().requires_grad_()
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """Forget moments and step count."""
        rule = self.config.optimizer
        groups = [{"params": list(self.body.parameters())}, {"params": self.embedding_parameters()}]
        if rule.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, weight_decay=rule.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(
                groups, lr=1.0, betas=(rule.beta1, rule.beta2), eps=rule.epsilon, weight_decay=rule.weight_decay
            )

    def embedding_parameters(self) -> list[Tensor]:
        return [self.token] if self.position is None else [self.token, self.position]

    def parameters(self) -> list[Tensor]:
        return [*self.body.parameters(), *self.embedding_parameters()]

    def hidden(self, inputs: Tensor) -> Tensor:
        """The body's output [B, L, h] for local ids int64 [B, L], in the compute dtype."""
        rows = F.embedding(inputs, self.token)
        if self.position is not None:
            rows = rows + self.position[: inputs.shape[1]]
        weights = {name: parameter.to(self.dtype) for name, parameter in self.body.named_parameters()}
        return functional_call(self.body, weights, (rows.to(self.dtype),))

    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token, [B, L] fp32; inputs and targets int64 [B, L] of local ids."""
        logits = (self.hidden(inputs) @ self.token.to(self.dtype).t()).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    def backward(self, batch: Tensor) -> float:
        """Gradients of the mean loss over a whole batch int64 [B, L + 1]; returns the loss.

        In bf16 by micro-batches whose gradients are summed in fp32: each is rounded to 8 bits on its own, and those of
        the whole batch at once are a percent or two away.
        """
        self.optimizer.zero_grad(set_to_none=True)
        size = self.config.training.micro_batch_size if self.dtype == torch.bfloat16 else len(batch)
        total = 0.0
        for piece in batch.split(size):
            loss = self.token_losses(piece[:, :-1], piece[:, 1:]).mean() * (len(piece) / len(batch))
            loss.backward()
            total += float(loss.detach())
        return total

    def step(
        self, batch: Tensor, learning_rate: float, embedding_learning_rate: float | None = None
    ) -> tuple[float, float]:
        """One step on a whole batch, clipped as configured: (loss, gradient norm before clipping)."""
        loss = self.backward(batch)
        clip = self.config.optimizer.clip_grad
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), clip or float("inf"))
        body, embedding = self.optimizer.param_groups
        body["lr"] = learning_rate
        embedding["lr"] = learning_rate if embedding_learning_rate is None else embedding_learning_rate
        self.optimizer.step()
        return loss, float(norm)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients by name, as the last backward or step left them."""
        named = [*self.body.named_parameters(), ("token", self.token), ("position", self.position)]
        return {name: parameter.grad for name, parameter in named if parameter is not None}

    def state(self) -> dict[str, Tensor]:
        """Copies of all fp32 parameters by name."""
        state = {name: parameter.detach().clone() for name, parameter in self.body.named_parameters()}
        state["token"] = self.token.detach().clone()
        if self.position is not None:
            state["position"] = self.position.detach().clone()
        return state
