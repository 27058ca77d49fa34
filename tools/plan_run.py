"""Plan a run on a cluster that need not be there: memory of a rank, bytes of a round by link, bubble, times.

    python tools/plan_run.py --cluster examples/clusters/h100_sites.yaml --model dept-1.3b --silos 1 8 64 1024
    python tools/plan_run.py --cluster examples/clusters/h100_sites.yaml --model llama-70b --tensor 8 --pipe 4

Everything is closed-form arithmetic (tools/run_plan/ states each formula and its source). Memory and bytes are counted;
times are expected ones, as good as the cluster file's rates. A round is one source on each silo.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from run_plan.cluster import load_cluster
from run_plan.models import MODELS
from run_plan.plan import FORMAT_VERSION, Vocabularies, build_plan, fill_silo
from run_plan.show import show

from megatron_dept.common.cli import ToolParser, non_negative_int, positive_int, run_tool
from megatron_dept.common.files import write_json
from megatron_dept.config.schema import Variant
from megatron_dept.training.planning.cut import Cut

COLUMNS = 160
"""Width of the tables where the output is no terminal."""


def build_parser() -> ToolParser:
    """The tool's options; vocabularies default to the paper's multilingual ones (MC4)."""
    parser = ToolParser(__doc__.splitlines()[0], prog="plan_run.py")
    parser.add_argument("--cluster", type=Path, required=True, help="YAML file; examples/clusters/ has some")
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=["dept-1.3b"], help="which bodies")
    parser.add_argument("--silos", nargs="+", type=positive_int, default=[8], help="how many silos, several to compare")
    parser.add_argument("--variant", nargs="+", choices=get_args(Variant), default=["std", "glob", "trim", "spec_opt"])
    parser.add_argument("--vocabulary", type=positive_int, default=250_112, help="V, rows of the global table")
    parser.add_argument(
        "--source-vocabulary", type=positive_int, default=216_135, help="the largest source's rows of it (trim, spec)"
    )
    parser.add_argument(
        "--own-vocabulary", type=positive_int, default=50_257, help="rows of the largest own tokenizer (spec_opt)"
    )
    parser.add_argument("--tensor", type=positive_int, default=1, help="tensor ranks")
    parser.add_argument("--pipe", type=positive_int, default=1, help="pipeline stages")
    parser.add_argument("--data", type=positive_int, help="data ranks; left out: as many as a silo's devices leave")
    parser.add_argument("--zero-stage", type=non_negative_int, default=1, choices=range(4))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--offload-optimizer", action="store_true", help="masters and moments in host memory")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--micro-batch-size", type=positive_int, default=1, help="sequences a rank computes at once")
    parser.add_argument("--global-batch-size", type=positive_int, default=256, help="sequences a silo trains a step")
    parser.add_argument("--loss-chunk-tokens", type=positive_int, default=256)
    parser.add_argument("--n-local", type=positive_int, default=500, help="steps of a round")
    parser.add_argument(
        "--overlap",
        type=non_negative_int,
        default=0,
        help="steps of the next round that the body's exchange may run on",
    )
    parser.add_argument("--outer-momentum", action="store_true", help="plan for an outer optimizer with momentum")
    parser.add_argument("--json", type=Path, help="write every figure here too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; `UserError` for what its user can mend."""
    options = build_parser().parse_args(argv)
    cluster = load_cluster(options.cluster)
    vocabularies = Vocabularies(options.vocabulary, options.source_vocabulary, options.own_vocabulary)
    plans = [
        build_plan(
            name,
            MODELS[name],
            cluster,
            fill_silo(_cut(options, silos), cluster, options.data),
            variant,
            vocabularies,
            options.n_local,
            options.outer_momentum,
        )
        for name in options.model
        for silos in options.silos
        for variant in options.variant
    ]
    console = Console(width=None if Console().is_terminal else COLUMNS)
    show(console, cluster, plans)
    if options.json is not None:
        card = {"format_version": FORMAT_VERSION, "cluster": cluster.model_dump(mode="json"), "plans": plans}
        write_json(options.json, card)
    return 0


def _cut(options: Namespace, silos: int) -> Cut:
    return Cut(
        silos=silos,
        pipe=options.pipe,
        tensor=options.tensor,
        zero_stage=options.zero_stage,
        precision=options.precision,
        offload_optimizer=options.offload_optimizer,
        sequence_parallel=options.sequence_parallel,
        activation_checkpointing=options.activation_checkpointing,
        micro_batch=options.micro_batch_size,
        global_batch=options.global_batch_size,
        loss_chunk_tokens=options.loss_chunk_tokens,
        overlap=options.overlap,
    )


if __name__ == "__main__":
    run_tool(main)
