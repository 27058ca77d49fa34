"""Which layers each pipeline stage has: balanced by operations, the head counted. Pure arithmetic."""

from megatron_dept.config.schema import ModelConfig
from megatron_dept.models.flops import head_flops_per_token, layer_flops_per_token


def stage_layers(config: ModelConfig, stages: int, largest_vocabulary: int) -> tuple[range, ...]:
    """Contiguous layers of each of `stages` stages, such that the stage with the most operations has fewest.

    The head of `largest_vocabulary` rows is on the last stage, which alone may be left without layers. Layers cost the
    same, so the other stages share the rest evenly; where that cannot be, the earlier ones have one fewer: under 1F1B
    they keep the activations of more micro-batches. Of several best ways the one whose next largest stage is smallest
    is taken, and of those the one with the fewest layers beside the head.
    Raises `ValueError` where a stage before the last would have no layer.
    """
    if stages < 1 or config.num_layers < stages - 1:
        raise ValueError(
            f"{config.num_layers} layers cannot be cut into {stages} pipeline stages: every stage but the last needs "
            f"one; use 1 to {config.num_layers + 1} stages"
        )
    layer, head = layer_flops_per_token(config), head_flops_per_token(config, largest_vocabulary)

    def cost(counts: list[int]) -> list[int]:
        loads = [count * layer for count in counts]
        loads[-1] += head
        return sorted(loads, reverse=True)

    largest_last = config.num_layers - (stages - 1) if stages > 1 else config.num_layers
    smallest_last = 0 if stages > 1 else config.num_layers
    best = min((_counts(config.num_layers, stages, last) for last in range(smallest_last, largest_last + 1)), key=cost)
    bounds = [sum(best[:stage]) for stage in range(stages + 1)]
    return tuple(range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False))


def _counts(layers: int, stages: int, last: int) -> list[int]:
    """Layers of each stage where the last has `last` and the others share the rest, the later ones one more."""
    if stages == 1:
        return [last]
    share, more = divmod(layers - last, stages - 1)
    return [share + (stage >= stages - 1 - more) for stage in range(stages - 1)] + [last]
