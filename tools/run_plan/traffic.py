"""Bytes that ranks send, by kind and link: leading terms in closed form.

A ring over n ranks sends (n - 1) / n of the data from each rank for a reduce-scatter or an all-gather, twice that for
an all-reduce. Kinds are the ledger's. Letters: S silos, P stages, D data ranks, T tensor ranks, m micro-batches,
b s h a micro-batch's hidden state.
"""

from dataclasses import dataclass

from megatron_dept.common.sizes import FP32_BYTES
from megatron_dept.config.schema import ModelConfig, Variant
from megatron_dept.dept.variants import VARIANTS
from megatron_dept.training.planning.cut import (
    Cut,
    layers_of_stages,
    parameters_of_rank,
    partition,
)
from megatron_dept.training.planning.steps import data_passes, stage_traffic, table_elements
from run_plan.cluster import Cluster


@dataclass(frozen=True)
class Flow:
    """One kind of traffic over one link, in one round of one-source-a-silo.

    `rank_bytes`: sent by the rank that sends most (between silos: a silo's bytes over its ranks); `all_bytes`: by all
    ranks of all silos. `per_step`: whether it is sent in every inner step, which `rank_bytes` then sums.
    """

    kind: str
    link: str
    rank_bytes: float
    all_bytes: float
    per_step: bool


def bytes_of_round(
    model: ModelConfig, cut: Cut, cluster: Cluster, variant: Variant, rows: int, n_local: int
) -> list[Flow]:
    """Everything a round of `n_local` steps sends, largest first; kinds that send nothing are left out.

    STD and ACT have no outer exchange: here all silos train one stream together, and every step's gradients also cross
    between silos.
    """
    between = cluster.between_silos
    flows = []
    if VARIANTS[variant].averages_body:
        for kind, all_bytes in exchange_bytes(model, cut, variant, rows).items():
            flows.append(Flow(kind, between, all_bytes / cut.silos / cut.silo_size, all_bytes, False))
        flows += _rows_inside(model, cut, cluster, variant, rows)
    elif cut.silos > 1:
        for kind, a_silo in synchronous_bytes(model, cut, rows).items():
            sent = a_silo * n_local
            flows.append(Flow(kind, between, sent / cut.silo_size, sent * cut.silos, True))
    ranks = [[stage_traffic(model, cut, rows, stage, t) for t in range(cut.tensor)] for stage in range(cut.pipe)]
    groups = {
        "tensor": ("activation", 1, cut.tensor),
        "pipe": ("activation", cut.data * cut.tensor, cut.pipe),
        "ends": ("gradient", cut.data * cut.tensor * max(1, cut.pipe - 1), 2),
        "gradient": ("gradient", cut.tensor, cut.data),
        "parameter": ("parameter", cut.tensor, cut.data),
    }
    if VARIANTS[variant].averages_body:
        # The outer step's new masters go to all data ranks in the compute precision, once.
        flows += _written_back(model, cut, cluster, rows)
    for name, (kind, stride, count) in groups.items():
        of_ranks = [getattr(rank, name) * n_local for stage in ranks for rank in stage]
        leaving = leaving_share(cut, cluster.gpus_per_node, stride, count, closed=name not in ("pipe", "ends"))
        for link, part in ((cluster.node_link, 1 - leaving), ("InfiniBand", leaving)):
            flows.append(Flow(kind, link, max(of_ranks) * part, sum(of_ranks) * cut.data * cut.silos * part, True))
    return sorted(_joined(flows), key=lambda flow: -flow.all_bytes)


def exchange_bytes(model: ModelConfig, cut: Cut, variant: Variant, rows: int) -> dict[str, float]:
    """Bytes between silos in one outer exchange, of all ranks, by kind.

    body: each silo sends the others their shares of its deltas, and its own share's new values to each of them.
    Shared rows: S silos fetch `rows` rows and return their deltas; (S - 1) / S of a row's owners are in other silos.
    """
    parts = [
        partition(parameters_of_rank(model, cut.tensor, layers, stage == cut.pipe - 1), cut)
        for stage, layers in enumerate(layers_of_stages(model, cut, rows))
    ]
    partitions = sum(parts) * cut.data * cut.tensor
    found = {"body": float(2 * (cut.silos - 1) * partitions * FP32_BYTES)}
    rule = VARIANTS[variant]
    a_row = 2.0 * (cut.silos - 1) * model.hidden_size * FP32_BYTES
    if rule.token_rows == "shared":
        found["embedding"] = rows * a_row
    if rule.position_rows == "shared" and model.has_position_table:
        found["position"] = model.seq_length * a_row
    return found


def synchronous_bytes(model: ModelConfig, cut: Cut, rows: int) -> dict[str, float]:
    """Bytes that one silo sends to others in one step of synchronous training, by kind.

    Inside a silo each data rank has reduced its part of the gradient; the parts are then reduced among silos, by as
    many passes as inside.
    """
    found = {"gradient": 0.0, "parameter": 0.0}
    gradient, parameter = data_passes(cut)
    hops = (cut.silos - 1) / cut.silos
    for stage, layers in enumerate(layers_of_stages(model, cut, rows)):
        held = cut.tensor * sum(parameters_of_rank(model, cut.tensor, layers, stage == cut.pipe - 1))
        table = sum(table_elements(model, cut, rows, stage, rank) for rank in range(cut.tensor))
        found["gradient"] += hops * (held * gradient + 2 * table) * FP32_BYTES
        found["parameter"] += hops * held * parameter * cut.width
    return found


def leaving_share(cut: Cut, per_node: int, stride: int, count: int, closed: bool = True) -> float:
    """Largest share of the hops of a group of `count` ranks, `stride` apart, that leave a node.

    Ranks fill nodes in order. `closed`: a ring, whose last rank sends to its first; else a line, of
    which the worst hop counts.
    """
    if count == 1:
        return 0.0
    worst = 0.0
    for start in range(cut.silo_size):
        # A group's first rank is the one that none of its members precedes.
        ranks = range(start, start + stride * count, stride)
        if ranks[-1] >= cut.silo_size or (start // stride) % count:
            continue
        nodes = [rank // per_node for rank in ranks]
        hops = list(zip(nodes, nodes[1:] + nodes[:1] if closed else nodes[1:], strict=False))
        crossed = sum(here != there for here, there in hops)
        worst = max(worst, crossed / len(hops) if closed else float(crossed > 0))
    return worst


def _written_back(model: ModelConfig, cut: Cut, cluster: Cluster, rows: int) -> list[Flow]:
    held = [
        sum(parameters_of_rank(model, cut.tensor, layers, stage == cut.pipe - 1))
        for stage, layers in enumerate(layers_of_stages(model, cut, rows))
    ]
    each = cut.width * (cut.data - 1) / cut.data
    leaving = leaving_share(cut, cluster.gpus_per_node, cut.tensor, cut.data)
    every = sum(held) * each * cut.data * cut.tensor * cut.silos
    return [
        Flow("parameter", link, max(held) * each * part, every * part, False)
        for link, part in ((cluster.node_link, 1 - leaving), ("InfiniBand", leaving))
    ]


def _rows_inside(model: ModelConfig, cut: Cut, cluster: Cluster, variant: Variant, rows: int) -> list[Flow]:
    """Shared rows inside silos: what one embedding rank fetched the others of the first stage need too, and the last's.

    Embedding rank e = data T + tensor brings the e-th part of the rows; each tensor rank needs its range of them.
    """
    rule, ranks = VARIANTS[variant], cut.data * cut.tensor
    # Parts that the rank which brings them needs itself.
    own = sum(rank % cut.tensor == rank // cut.data for rank in range(ranks)) / ranks
    tokens = (rows * (cut.data - own) + rows * (1 - own)) * (rule.token_rows == "shared")
    tokens += rows * cut.data * (cut.pipe > 1) * (rule.token_rows == "shared")
    positions = model.seq_length * model.has_position_table * (rule.position_rows == "shared")
    # Position rows all belong to tensor rank 0.
    mine = sum(rank % cut.tensor == 0 for rank in range(ranks)) / ranks
    positions_moved = positions * (cut.data - mine) + positions * (1 - mine)
    link = cluster.node_link if cut.silo_size <= cluster.gpus_per_node else "InfiniBand"
    return [
        Flow(kind, link, moved * model.hidden_size * FP32_BYTES / ranks, a_silo * cut.silos, False)
        for kind, moved in (("embedding", tokens), ("position", positions_moved))
        for a_silo in (moved * model.hidden_size * FP32_BYTES,)
    ]


def _joined(flows: list[Flow]) -> list[Flow]:
    """Flows of one kind, link and rhythm together; those that carry nothing left out."""
    found: dict[tuple[str, str, bool], Flow] = {}
    for flow in flows:
        if flow.all_bytes:
            key = (flow.kind, flow.link, flow.per_step)
            old = found.get(key, Flow(flow.kind, flow.link, 0.0, 0.0, flow.per_step))
            found[key] = Flow(
                flow.kind, flow.link, old.rank_bytes + flow.rank_bytes, old.all_bytes + flow.all_bytes, flow.per_step
            )
    return list(found.values())
