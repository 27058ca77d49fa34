"""Plans as tables for people."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dept.common.progress import format_seconds
from run_plan.cluster import Cluster

MEMORY = (
    "weights", "gathered", "gradients", "buckets", "masters", "moments", "outer", "embedding", "activations", "logits",
    "device",
)  # fmt: skip


def show(console: Console, cluster: Cluster, plans: Sequence[dict[str, Any]]) -> None:
    """One model after another; of several numbers of silos, memory and bytes are the largest's."""
    console.print(
        f"{cluster.name}: {cluster.nodes_per_silo} nodes a silo x {cluster.gpus_per_node} "
        f"{cluster.device or 'devices'}, {cluster.memory_bytes() / 1e9:.0f} GB each, {cluster.achieved:.0%} of peak; "
        f"{cluster.node_link} in a node, {cluster.between_silos} between silos",
        markup=False,
    )
    for model in dict.fromkeys(plan["model"] for plan in plans):
        own = [plan for plan in plans if plan["model"] == model]
        most = max(plan["cut"]["silos"] for plan in own)
        largest = [plan for plan in own if plan["cut"]["silos"] == most]
        cut, first = largest[0]["cut"], largest[0]
        console.print(
            f"\n[bold]{model}[/bold]: body {first['body_parameters']:,} parameters; a silo: pipe {cut['pipe']} x data "
            f"{cut['data']} x tensor {cut['tensor']}, ZeRO {cut['zero_stage']}, {cut['precision']}, "
            f"{cut['micro_batches']} micro-batches of {cut['micro_batch']} sequences; pipeline bubble "
            f"{first['bubble']:.1%}, layers of stages {'+'.join(map(str, first['layers_of_stages']))}"
        )
        console.print(_memory_table(largest, most))
        console.print(_bytes_table(largest, most))
        console.print(_time_table(own))


def _memory_table(plans: Sequence[dict[str, Any]], silos: int) -> Table:
    """GB of the heaviest stage's rank, by part."""
    table = Table(
        "variant",
        "rows",
        *MEMORY,
        "optimizer (host)",
        "row table, deltas (host)",
        "row table (disk)",
        title=f"GB of a rank, heaviest stage, {silos} silos",
    )
    for plan in plans:
        memory = plan["memory"]
        total = "" if plan["fits"] else " [red]too much[/red]"
        figures = [f"{memory[part] / 1e9:,.2f}" for part in MEMORY]
        figures[-1] += total
        host = [memory["host"], memory["row_table"] + memory["row_deltas"], memory["row_files"]]
        table.add_row(plan["variant"], f"{plan['rows']:,}", *figures, *(f"{size / 1e9:,.2f}" for size in host))
    return table


def _bytes_table(plans: Sequence[dict[str, Any]], silos: int) -> Table:
    """Bytes of a round by kind and link."""
    columns = ("variant", "kind", "link", "when", "GB a rank", "TB all ranks")
    table = Table(*columns, title=f"Bytes sent in a round of {plans[0]['n_local']} steps, {silos} silos")
    for plan in plans:
        for index, flow in enumerate(plan["bytes_of_round"]):
            when = "steps" if flow["per_step"] else "exchange"
            label = plan["variant"] if index == 0 else ""
            rank, every = f"{flow['rank_bytes'] / 1e9:,.3f}", f"{flow['all_bytes'] / 1e12:,.4f}"
            table.add_row(label, flow["kind"], flow["link"], when, rank, every)
        table.add_section()
    return table


def _time_table(plans: Sequence[dict[str, Any]]) -> Table:
    columns = ("silos", "variant", "step s", "arithmetic", "bubble", "tensor + pipe", "data", "between")
    ends = ("exchange", "round", "busy", "tokens/s", "less sent (paper)")
    table = Table(*columns, *ends, title="Expected time")
    for plan in plans:
        step, times = plan["step_seconds"], plan["round_seconds"]
        parts = (step["arithmetic"], step["bubble"], step["tensor"] + step["pipe"], step["data"], step["between_silos"])
        table.add_row(
            str(plan["cut"]["silos"]),
            plan["variant"],
            *(f"{value:,.3f}" for value in (step["total"], *parts)),
            _exchange(times),
            format_seconds(times["total"]),
            f"{plan['busy']:.0%}",
            f"{plan['tokens_per_second']:,.0f}",
            f"{plan['paper']['reduction']:,.0f}x",
        )
    return table


def _exchange(times: dict[str, float]) -> str:
    """The exchange's seconds, and how much of them the next round's steps hide."""
    shown = format_seconds(times["exchange"])
    return f"{shown}, {times['hidden'] / times['exchange']:.0%} hidden" if times["hidden"] else shown
