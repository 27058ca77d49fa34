"""From a configuration to a body, ready to train."""

import torch

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.gpt import GPTBody
from megatron_dept.models.initialise import initialise_body
from megatron_dept.models.llama import LlamaBody
from megatron_dept.models.parts import WHOLE, BodyPart
from megatron_dept.models.tags import tag
from megatron_dept.models.transformer import Transformer


def build_body(
    config: ModelConfig, seed: int, activation_checkpointing: bool = False, part: BodyPart = WHOLE
) -> Transformer:
    """The fp32 body of `config` on the CPU, or a part of it; each parameter's values given by (seed, its name) alone.

    With `activation_checkpointing` each layer's activations are computed again in the backward instead of kept.
    Raises `ValueError` where the body cannot be cut as `part` says.
    """
    body = empty_body(config, activation_checkpointing, part)
    initialise_body(body, config, seed)
    return body


def body_from_state(config: ModelConfig, state: dict[str, torch.Tensor]) -> Transformer:
    """A body of `config` whose parameters are `state`'s, by name; for evaluation and export.

    Raises `ValueError` naming what is missing, foreign or of another shape.
    """
    expected = body_shapes(config)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name, "absent") != found.get(name, "absent")
    )
    if wrong:
        listed = "; ".join(
            f"{name}: {found.get(name, 'absent')}, not {expected.get(name, 'absent')}" for name in wrong[:3]
        )
        raise ValueError(f"{len(wrong)} parameters are not this model's ({listed})")
    body = empty_body(config)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            tag(parameter, "body").copy_(state[name])
    return body


def body_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The whole shape of each parameter of the whole body of `config`, by name; nothing is allocated."""
    with torch.device("meta"):
        body = empty_body(config)
    return {name: tuple(parameter.shape) for name, parameter in body.named_parameters()}


def empty_body(config: ModelConfig, activation_checkpointing: bool = False, part: BodyPart = WHOLE) -> Transformer:
    """A body without values. Its layers draw none, so torch's global random state is left alone."""
    kind = GPTBody if config.family == "gpt" else LlamaBody
    return kind(config, activation_checkpointing, part)
