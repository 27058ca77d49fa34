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

    def token_losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token, [B, L] fp32; inputs and targets int64 [B, L] of local ids."""
        rows = F.embedding(inputs, self.token)
        if self.position is not None:
            rows = rows + self.position[: inputs.shape[1]]
        weights = {name: parameter.to(self.dtype) for name, parameter in self.body.named_parameters()}
        hidden = functional_call(self.body, weights, (rows.to(self.dtype),))
        logits = (hidden @ self.token.to(self.dtype).t()).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    def backward(self, batch: Tensor) -> float:
        """Gradients of the mean loss over a whole batch int64 [B, L + 1]; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.token_losses(batch[:, :-1], batch[:, 1:]).mean()
        loss.backward()
        return float(loss.detach())

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

    def state(self) -> dict[str, Tensor]:
        """Copies of all fp32 parameters by name."""
        state = {name: parameter.detach().clone() for name, parameter in self.body.named_parameters()}
        state["token"] = self.token.detach().clone()
        if self.position is not None:
            state["position"] = self.position.detach().clone()
        return state
