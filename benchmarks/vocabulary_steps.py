"""Seconds of a training step by the size of the vocabulary: this project's, and the same model in plain torch.

One process, fp32. Ours: the DeepSpeed engine of the body (ZeRO 0), the embedding and its AdamW apart from it, the loss
by chunks. Plain torch: `nn.Embedding`, the block from torch's modules, the tied head, `F.cross_entropy` over all
logits, one fused AdamW, `clip_grad_norm_`. The token table and its moments are the same tensors in both, to have two
models in little more memory than one; their steps take turns.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dept.common.progress import Progress
from megatron_dept.config.load import validate_config
from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import ModelConfig, RunConfig
from megatron_dept.engine.build import build_engine
from megatron_dept.engine.embedding_owner import EmbeddingOwner
from megatron_dept.engine.silo_engine import SiloEngine
from megatron_dept.engine.world import World, start_world
from megatron_dept.models.attention import split_qkv
from megatron_dept.models.build import build_body
from megatron_dept.models.embedding import SourceEmbedding
from megatron_dept.models.flops import body_parameters, flops_per_token
from megatron_dept.models.initialise import init_rows
from megatron_dept.topology.launch import Launch
from megatron_dept.topology.layout import Layout

LENGTH = 256
RATE = 1e-5
SAME_LOSS = 1e-5
"""Relative: the first losses of two models of the same values, summed in another order."""


@dataclass
class Timings:
    """Of one vocabulary: seconds of each step after the first, by clock and by CPU, as they came."""

    vocabulary: int
    operations: float
    """Floating-point operations of a step (`models.flops`)."""
    optimizer_bytes: int
    """What AdamW reads and writes in a step: 28 bytes a parameter, body included."""
    wall: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "plain": []})
    cpu: dict[str, list[float]] = field(default_factory=lambda: {"ours": [], "plain": []})


@dataclass
class Steps:
    """All timings, what this machine multiplies and copies in a second, and the most memory the process has had."""

    timings: list[Timings]
    multiplies: float
    copies: float
    peak_bytes: int


class PlainBlock(nn.Module):
    """GPT-2's block, written with torch's modules."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.projection = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.ln1(x)).split(hidden, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, length, hidden))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class PlainModel(nn.Module):
    """Token and position table, blocks, tied head and loss."""

    def __init__(self, config: ModelConfig, token: nn.Parameter, blocks: nn.ModuleList, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.token = nn.Embedding(*token.shape, _weight=token.detach())
        self.token.weight = token
        self.position = nn.Embedding(config.seq_length, config.hidden_size)
        self.blocks, self.norm = blocks, norm

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.token.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_body(config: ModelConfig, state: dict[str, Tensor]) -> tuple[nn.ModuleList, nn.LayerNorm]:
    """Plain blocks and last norm with the values of our body."""
    blocks = nn.ModuleList(PlainBlock(config.hidden_size, config.num_attention_heads) for _ in range(config.num_layers))
    norm = nn.LayerNorm(config.hidden_size)
    with torch.no_grad():
        norm.weight.copy_(state["final_norm.weight"])
        for index, block in enumerate(blocks):
            assert isinstance(block, PlainBlock)
            own = {key: state[f"layers.{index}.{key}"] for key in BLOCK_KEYS}
            for part in ("weight", "bias"):
                block.ln1.get_parameter(part).copy_(own[f"attention_norm.{part}"])
                block.ln2.get_parameter(part).copy_(own[f"mlp_norm.{part}"])
                block.qkv.get_parameter(part).copy_(torch.cat(split_qkv(own[f"attention.qkv.{part}"], config)))
                block.up.get_parameter(part).copy_(own[f"mlp.up.{part}"])
                # Row-parallel weights are input-major.
                block.projection.get_parameter(part).copy_(own[f"attention.projection.{part}"].t())
                block.down.get_parameter(part).copy_(own[f"mlp.down.{part}"].t())
    return blocks, norm


BLOCK_KEYS = [
    f"{layer}.{part}"
    for layer in ("attention_norm", "attention.qkv", "attention.projection", "mlp_norm", "mlp.up", "mlp.down")
    for part in ("weight", "bias")
]


def config_of(run_dir: Path, sequences: int, threads: int) -> RunConfig:
    """The paper's 12 blocks of 768 on short sequences."""
    return validate_config(
        {
            "run_dir": str(run_dir),
            "model": {**PRESETS["dept-125m"], "seq_length": LENGTH},
            "sources": [{"name": "source", "own_data": "data"}],
            "dept": {"variant": "spec_opt", "rounds": 1, "n_local": 1},
            "parallel": {"zero_stage": 0},
            "training": {
                "micro_batch_size": sequences,
                "global_batch_size": sequences,
                "threads_per_rank": threads,
            },
        },
        "benchmark",
    )


def measure(
    launch: Launch, run_dir: Path, vocabularies: Sequence[int], sequences: int, repeats: int, threads: int
) -> Steps:
    """Steps of both at every vocabulary, in turns; says how far it is on stderr."""
    torch.set_num_threads(threads)
    config = config_of(run_dir, sequences, threads)
    world = start_world(launch, Layout.cut(config.parallel, 1), 600)
    body = build_body(config.model, config.seed)
    blocks, norm = plain_body(config.model, {name: value.detach() for name, value in body.named_parameters()})
    engine = build_engine(config, body, world)
    multiplies, copies = multiply_rate(), copy_rate()
    timings = []
    # Time goes with the operations: that is what the time left is reckoned by.
    work = {v: sequences * LENGTH * float(flops_per_token(config.model, v)) for v in vocabularies}
    with Progress("steps", total=sum(work.values()) * 2 * (repeats + 1) / 1e9, unit="GFLOP") as progress:
        for vocabulary in vocabularies:
            parameters = body_parameters(config.model) + (vocabulary + LENGTH) * config.model.hidden_size
            timing = Timings(vocabulary, work[vocabulary], 28 * parameters)
            take_turns(config, world, engine, blocks, norm, timing, repeats, progress, fresh=not timings)
            timings.append(timing)
    peak = int(next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line).split()[1])
    return Steps(timings, multiplies, copies, 1024 * peak)


def take_turns(
    config: RunConfig,
    world: World,
    engine: SiloEngine,
    blocks: nn.ModuleList,
    norm: nn.LayerNorm,
    timing: Timings,
    repeats: int,
    progress: Progress,
    fresh: bool,
) -> None:
    """One warm-up step of each, then `repeats` of each in turns. `fresh`: the bodies are equal, so losses must be."""
    model, vocabulary = config.model, timing.vocabulary
    rows = init_rows(0, vocabulary, model.hidden_size, model.init_std, "benchmark")
    position = init_rows(0, LENGTH, model.hidden_size, model.init_std, "benchmark position")
    module = SourceEmbedding(rows, position, torch.float32, config.training.loss_chunk_tokens)
    owner = EmbeddingOwner(module, config.optimizer, world)
    plain = PlainModel(model, module.token, blocks, norm)
    with torch.no_grad():
        plain.position.weight.copy_(position)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (config.training.micro_batch_size, LENGTH + 1), generator=generator)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step_of_ours() -> float:
        return engine.train_step([(inputs, targets)], owner, RATE, RATE).loss

    def step_of_plain() -> float:
        loss = plain(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    steps: dict[str, Callable[[], float]] = {"ours": step_of_ours, "plain": step_of_plain}
    with torch.no_grad():
        first = float(plain(inputs, targets))
    for turn in range(repeats + 1):
        # Who goes first changes, should it matter.
        for name in ("ours", "plain") if turn % 2 == 0 else ("plain", "ours"):
            wall, cpu = time.perf_counter(), time.process_time()
            loss = steps[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn == 0 and name == "ours":
                # Later the bodies have trained, each with roundings of its own.
                assert not fresh or math.isclose(loss, first, rel_tol=SAME_LOSS), f"{loss}, {first}: two models"
                optimizer.state[module.token] = owner._optimizer.state[module.token]
            if turn:
                timing.wall[name].append(wall)
                timing.cpu[name].append(cpu)
            progress.advance(timing.operations / 1e9)
        if turn:
            best = {name: min(seconds) for name, seconds in timing.wall.items()}
            progress.note(f"V {vocabulary:,}: ours {best['ours']:.2f} s, plain {best['plain']:.2f} s")


def multiply_rate() -> float:
    """Floating-point operations a second of this machine's matrix product, best of five."""
    left, right = torch.randn(512, 3072), torch.randn(3072, 3072)
    out = torch.empty(512, 3072)
    return 2 * 512 * 3072 * 3072 / best_of(5, lambda: torch.mm(left, right, out=out))


def copy_rate() -> float:
    """Bytes a second that this machine reads and writes in a copy larger than its caches, best of five."""
    left, right = torch.zeros(1 << 26), torch.ones(1 << 26)
    return 2 * left.nbytes / best_of(5, lambda: left.copy_(right))


def best_of(times: int, action: Callable[[], object]) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
