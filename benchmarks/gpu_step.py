"""Tokens a second and MFU of the trainer's own step, for the paper's three sizes, in one process.

    python -m benchmarks.gpu_step [--json FILE] [--seconds 480]     on a GPU
    python -m benchmarks.gpu_step --device cpu                      a rehearsal: tiny sizes, figures without meaning

Every case is a process of its own: what one leaves behind is not the next one's peak, and one that does not fit ends
alone. A step is `Trainer._step`: batch, forward, backward, joint clip, both optimizers, report; bf16, ZeRO 1, sequences
of 2,048. Events mark the steps' ends, the median counts. MFU counts operations as `models.flops` states, the head
included and recomputation left out, against the datasheet and against the product rate measured in the same process.
Then the round's end: what packing the delta, the outer step of one process and writing the masters back take.

Before the cases the head alone is timed by `loss_chunk_tokens`.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_measure import add_device_option, product_rate, run_within, synchronize, time_calls, write_figures
from megatron_dept.common.seeding import generator_for
from megatron_dept.config.load import validate_config
from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import RunConfig
from megatron_dept.models.flops import body_parameters, flops_per_token
from megatron_dept.models.loss import _add_outer, linear_cross_entropy
from megatron_dept.training.hardware import datasheet_flops

CASE_SECONDS = 240.0
CHUNKS = (256, 1024, 4096)
WARM_UP_STEPS = 3
REHEARSAL = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 32}


@dataclass(frozen=True)
class StepCase:
    """A preset, or a rehearsal's small model, with a vocabulary: `micro` sequences, `accumulate` times a step."""

    preset: str
    vocabulary: int
    micro: int
    accumulate: int = 2
    chunk: int = 4096
    checkpointing: bool = False
    steps: int = 8

    @property
    def model(self) -> dict[str, object]:
        return dict(PRESETS.get(self.preset, REHEARSAL))

    @property
    def name(self) -> str:
        extra = ", activation checkpointing" if self.checkpointing else ""
        return f"{self.preset}, V = {self.vocabulary:,}, {self.micro} sequences, chunk {self.chunk:,}{extra}"


def step_cases(on_gpu: bool) -> list[StepCase]:
    """By importance: the paper's sizes with both vocabularies, then what the chunk and checkpointing change."""
    if not on_gpu:
        return [StepCase("rehearsal", 700, 1, 2, chunk=16, checkpointing=True, steps=2)]
    small, large = 50_304, 250_112
    sizes = [("dept-125m", 16), ("dept-350m", 8), ("dept-1.3b", 8)]
    cases = [StepCase(preset, vocabulary, micro) for vocabulary in (small, large) for preset, micro in sizes]
    cases += [StepCase("dept-125m", large, 16, chunk=chunk) for chunk in (256, 1024)]
    cases += [StepCase(preset, small, 2 * micro, 1, checkpointing=True) for preset, micro in sizes]
    return cases + [StepCase("dept-125m", small, 32, 1), StepCase("dept-125m", small, 16, chunk=256)]


def write_source(directory: Path, vocabulary: int, tokens: int) -> Path:
    """A dataset directory of seeded ids, frequent ones far more often, under a tokenizer of `vocabulary` entries."""
    from megatron_dept.data.indexed import IndexedDatasetWriter
    from megatron_dept.tokenizers.byte_alphabet import character_bytes
    from megatron_dept.tokenizers.load import HUGGINGFACE_FILE, load_tokenizer
    from megatron_dept.tokenizers.vocabulary import source_vocabulary

    directory.mkdir(parents=True)
    entries = [*sorted(character_bytes()), "<|endoftext|>"]
    entries += [f"t{number}" for number in range(vocabulary - len(entries))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    spec = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {entry: index for index, entry in enumerate(entries)}, "merges": []},
    }
    (directory / HUGGINGFACE_FILE).write_text(json.dumps(spec))
    tokenizer = load_tokenizer(directory / HUGGINGFACE_FILE)
    drawn = (vocabulary ** generator_for("gpu step").random(tokens)).astype(np.int64) - 1
    counts = np.bincount(drawn, minlength=vocabulary)
    for split, part in (("train", drawn), ("heldout", drawn[:100])):
        with IndexedDatasetWriter(directory / split, vocabulary) as writer:
            for document in np.array_split(part, max(1, len(part) // 4096)):
                writer.add_document(document)
            writer.finalize()
    np.save(directory / "token_counts.npy", counts)
    size = {"documents": 1, "tokens": tokens, "bytes": 4 * tokens}
    card = {
        "format_version": 1,
        "name": "drawn",
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "file": HUGGINGFACE_FILE,
        },
        "splits": {"train": size, "heldout": size},
        "tokens_per_byte": 0.25,
        "vocabulary_size": len(source_vocabulary(counts, tokenizer)),
        "command": "benchmarks/gpu_step.py",
    }
    (directory / "card.json").write_text(json.dumps(card))
    return directory


def config_of(case: StepCase, data: Path, run_dir: Path) -> RunConfig:
    """The run that the case is: one source, GLOB, outer Nesterov."""
    return validate_config(
        {
            "run_dir": str(run_dir),
            "model": case.model,
            "sources": [{"name": "drawn", "data": str(data)}],
            "dept": {
                "variant": "glob",
                "rounds": 1,
                "n_local": 1000,
                "outer": {"optimizer": "nesterov", "learning_rate": 0.7, "momentum": 0.9},
            },
            "training": {
                "precision": "bf16",
                "micro_batch_size": case.micro,
                "global_batch_size": case.micro * case.accumulate,
                "activation_checkpointing": case.checkpointing,
                "loss_chunk_tokens": case.chunk,
            },
            "evaluation": {"interval_rounds": 0},
            "checkpoint": {"save_interval": 0},
            "logging": {"peak_tflops": 1.0, "interval_steps": 10_000, "norm_interval_steps": 10_000},
        },
        "gpu step",
    )


def run_case(case: StepCase, device: torch.device) -> dict[str, Any]:
    """The figures of one case, in this process."""
    from megatron_dept.engine.world import start_world
    from megatron_dept.topology.launch import Launch
    from megatron_dept.topology.layout import Layout
    from megatron_dept.training.setup import build_trainer
    from megatron_dept.training.sources import SourceSet

    began = time.perf_counter()
    on_gpu = device.type == "cuda"
    product = product_rate(device)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sequence = int(case.model["seq_length"])  # type: ignore[call-overload]
        steps = WARM_UP_STEPS + case.steps
        tokens = steps * case.micro * case.accumulate * sequence + 4096
        data = write_source(root / "drawn", case.vocabulary, tokens)
        config = config_of(case, data, root / "run")
        world = start_world(Launch(0, 1, 0, 1, "127.0.0.1", 0), Layout.cut(config.parallel, 1), 600)
        assert world.device.type == device.type, f"the trainer is on {world.device}"
        trainer = build_trainer(config, world, SourceSet(config))
        built = time.perf_counter() - began
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds, losses = _steps(trainer, steps, device)
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        ending = _round_end(trainer, device)
        peak_of_round = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        world.close()
    batch_tokens = config.training.global_batch_size * sequence
    median = statistics.median(seconds)
    operations = flops_per_token(config.model, case.vocabulary) * batch_tokens / median
    sheet = datasheet_flops(device)
    return {
        "case": case.name,
        **asdict(case),
        "body_parameters": body_parameters(config.model),
        "batch_tokens": batch_tokens,
        "step_ms": round(1000 * median, 3),
        "best_ms": round(1000 * min(seconds), 3),
        "tokens_per_second": round(batch_tokens / median),
        "tflops": round(operations / 1e12, 3),
        "mfu_datasheet": round(operations / sheet, 4) if sheet else None,
        "mfu_measured_product": round(operations / product, 4),
        "product_tflops": round(product / 1e12, 3),
        "peak_gib": None if peak is None else round(peak, 2),
        "peak_of_round_gib": None if peak_of_round is None else round(peak_of_round, 2),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "round_end_ms": ending,
        "build_seconds": round(built, 1),
    }


def _steps(trainer: Any, steps: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Seconds of the steps after the warm-up, between the ends of two, and all losses."""
    local = trainer._begin_phase("drawn")
    losses: list[float] = []
    train_step = trainer._engine.train_step

    def recorded(*arguments: Any, **named: Any) -> Any:
        result = train_step(*arguments, **named)
        losses.append(result.loss)
        return result

    trainer._engine.train_step = recorded
    ends: list[Any] = []
    for _ in range(steps):
        trainer._step(local, local.source)
        local.step += 1
        if device.type == "cuda":
            ends.append(torch.cuda.Event(enable_timing=True))
            ends[-1].record()
        else:
            ends.append(time.perf_counter())
    synchronize(device)
    ends = ends[WARM_UP_STEPS - 1 :]
    assert all(np.isfinite(losses)), f"a loss is not finite: {losses}"
    if device.type == "cuda":
        return [a.elapsed_time(b) / 1000 for a, b in zip(ends, ends[1:], strict=False)], losses
    return [b - a for a, b in zip(ends, ends[1:], strict=False)], losses


def _round_end(trainer: Any, device: torch.device) -> dict[str, float]:
    """Milliseconds of the round's end on the body by part, the second time each is done."""
    taken: dict[str, float] = {}
    exchange, shards = trainer._exchange, trainer._engine.shards

    def timed(name: str, call: Any) -> None:
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        taken[name] = round(1000 * (time.perf_counter() - began), 3)

    for _ in range(2):
        timed("pack", lambda: exchange.add(shards.read()))
        timed("outer step", lambda: exchange.finish(1))
        timed("write back", lambda: shards.write(exchange.value))
    return taken


def head_by_chunk(device: torch.device) -> list[dict[str, Any]]:
    """Forward and backward of head and loss alone, by tokens a chunk: milliseconds and share of the product rate."""
    on_gpu = device.type == "cuda"
    product, tokens = product_rate(device), 16_384 if on_gpu else 64
    shapes = [(768, 50_304), (2048, 250_112)] if on_gpu else [(32, 700)]
    figures = []
    for hidden, vocabulary in shapes:
        states = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16, requires_grad=True)
        table = (0.02 * torch.randn(vocabulary, hidden, device=device)).requires_grad_()
        targets = torch.randint(0, vocabulary, (tokens,), device=device)
        for chunk in (*CHUNKS, tokens) if on_gpu else (16, tokens):
            step = functools.partial(_head_step, states, table, targets, chunk)
            entry: dict[str, Any] = {"hidden": hidden, "vocabulary": vocabulary, "chunk": chunk, "tokens": tokens}
            try:
                seconds = time_calls(step, 1, device, seconds=0.3).median
            except torch.OutOfMemoryError:
                figures.append(entry | {"error": "out of memory"})
                continue
            rate = 6 * vocabulary * hidden * tokens / seconds
            figures.append(entry | {"ms": round(1000 * seconds, 3), "of_product_rate": round(rate / product, 4)})
    return figures


def table_gradient(device: torch.device) -> list[dict[str, Any]]:
    """The head's gradient of one chunk onto the fp32 table: as it is formed now, a block of rows at a time in bf16, and
    in one product that accumulates in fp32, which torch has on GPUs alone."""
    on_gpu = device.type == "cuda"
    shapes = [(768, 50_304, 4096), (2048, 250_112, 1024)] if on_gpu else [(32, 700, 16)]
    figures = []
    for hidden, vocabulary, chunk in shapes:
        total = torch.zeros(vocabulary, hidden, device=device)
        gradient = torch.randn(chunk, vocabulary, device=device, dtype=torch.bfloat16)
        states = torch.randn(chunk, hidden, device=device, dtype=torch.bfloat16)
        ways = {
            "ms": functools.partial(_in_blocks, total, gradient, states),
            "ms_one_product": functools.partial(_in_one_product, total, gradient, states),
        }
        entry: dict[str, Any] = {"hidden": hidden, "vocabulary": vocabulary, "chunk": chunk}
        for name, way in ways.items():
            try:
                entry[name] = round(1000 * time_calls(way, 1, device, seconds=0.3).median, 3)
            except (TypeError, RuntimeError) as error:
                entry[name] = f"not present: {str(error).splitlines()[0][:80]}"
        figures.append(entry)
        del total, gradient, states, ways
    return figures


def _in_blocks(total: torch.Tensor, gradient: torch.Tensor, states: torch.Tensor, _: int) -> None:
    _add_outer(total, gradient, states, first=False)


def _in_one_product(total: torch.Tensor, gradient: torch.Tensor, states: torch.Tensor, _: int) -> None:
    torch.addmm(total, gradient.t(), states, out_dtype=torch.float32, out=total)


def _head_step(states: torch.Tensor, table: torch.Tensor, targets: torch.Tensor, chunk: int, _: int) -> None:
    states.grad = table.grad = None
    linear_cross_entropy(states, table, targets, chunk).backward()


def run_apart(case: StepCase, device: str, limit: float) -> dict[str, Any]:
    """`run_case` in a process of its own; what became of it where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "case.json"
        command = [sys.executable, "-m", "benchmarks.gpu_step", "--device", device, "--json", str(target)]
        command += ["--case", json.dumps(asdict(case))]
        code, lines = run_within(command, limit)
        if target.exists():
            figures: dict[str, Any] = json.loads(target.read_text())
            return figures
    if code is None:
        return {"case": case.name, "error": f"not done within {limit:.0f} s"}
    if any("OutOfMemoryError" in line for line in lines):
        return {"case": case.name, "error": "out of memory"}
    return {"case": case.name, "error": f"exit code {code}", "tail": lines[-25:]}


def run_all(device: str, path: Path | None, seconds: float) -> int:
    """All cases, begun as long as `seconds` are not over; the number that failed (too large for the card is none)."""
    began = time.monotonic()
    figures: dict[str, Any] = {"device": device, "head": [], "cases": [], "left_out": []}
    figures["head"] = head_by_chunk(torch.device(device))
    figures["table_gradient"] = table_gradient(torch.device(device))
    if device == "cuda":
        torch.cuda.empty_cache()
    write_figures(path, figures)
    for case in step_cases(device == "cuda"):
        left = seconds - (time.monotonic() - began)
        if left < 20:
            figures["left_out"].append(case.name)
            continue
        figures["cases"].append(run_apart(case, device, min(CASE_SECONDS, left)))
        print(_line(figures["cases"][-1]), flush=True)
        write_figures(path, figures)
    write_figures(path, figures)
    for entry in figures["cases"]:
        print("\n".join(entry.get("tail", [])))
    return sum(entry.get("error", "out of memory") != "out of memory" for entry in figures["cases"])


def _line(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"{entry['case']}: {entry['error']}"
    sheet = entry["mfu_datasheet"]
    against = f"MFU {sheet:.1%} of the datasheet, " if sheet else ""
    peak = f", peak {entry['peak_gib']} GiB" if entry["peak_gib"] is not None else ""
    return (
        f"{entry['case']}: {entry['tokens_per_second']:,} tokens/s, {against}"
        f"{entry['mfu_measured_product']:.1%} of the measured product rate{peak}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_option(parser)
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no case after so long (default 480)")
    parser.add_argument("--case", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is None:
        return run_all(arguments.device, arguments.json, arguments.seconds)
    figures = run_case(StepCase(**json.loads(arguments.case)), torch.device(arguments.device))
    write_figures(arguments.json, figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(min(1, main()))
