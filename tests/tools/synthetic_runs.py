"""Run directories as pre-training, adapt and evaluation leave them, with made-up numbers: what the report is tested on.

Losses fall as a power of the tokens from a level that the method and source set, so that who wins where is known.
"""

import json
import math
from pathlib import Path
from typing import Any

from megatron_dept.config.load import dump_config, validate_config

SOURCES = ("english-speeches", "german-glosses", "hebrew-scripture", "python-code", "cpp-headers")
UNSEEN = "russian-recipes"
VOCABULARY = 8192
TRIMMED = (5200, 5600, 3100, 4300, 3900)
OWN = 2048
ROUNDS, N_LOCAL, BATCH, LENGTH, SILOS = 6, 20, 8, 128, 2
HIDDEN, LAYERS = 128, 4
BODY_BYTES = 4 * 793_088  # any figure will do; the report takes it from the ledger

# bits per byte that a method ends at, less a level of the source; lower is better
LEVEL = {"std": 1.00, "std0": 1.06, "act": 1.10, "glob": 0.97, "trim": 0.955, "spec": 0.98, "spec_opt": 0.94}
VARIANT = {name: ("std" if name == "std0" else name) for name in LEVEL}
SOURCE_LEVEL = dict(zip((*SOURCES, UNSEEN), (2.0, 2.3, 2.6, 1.9, 1.6, 3.4), strict=True))


def write_runs(
    root: Path, methods: tuple[str, ...] = tuple(LEVEL), protocols: tuple[str, ...] = ("random",)
) -> list[Path]:
    """Pre-training and adapt runs of the methods under root/runs; returns their directories."""
    paths = []
    for method in methods:
        paths.append(write_pretrain(root, method))
        for protocol in protocols:
            if protocol == "random" or VARIANT[method] in ("std", "act", "glob", "trim"):
                paths.append(write_adapt(root, method, protocol))
    return paths


def config_values(root: Path, method: str) -> dict[str, Any]:
    """Configuration of a pre-training run; STD and ACT take the same tokens in more steps one after another."""
    synchronous = VARIANT[method] in ("std", "act")
    return {
        "run_dir": str(root / "runs" / method),
        "model": {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4, "seq_length": LENGTH},
        "sources": [
            {"name": n, "data": str(root / "data/global" / n), "own_data": str(root / "data/own" / n)} for n in SOURCES
        ],
        "dept": {
            "variant": VARIANT[method],
            "rounds": ROUNDS,
            "n_local": N_LOCAL * (len(SOURCES) if synchronous else 1),
            "std_tau": 0.0 if method == "std0" else 1.0,
        },
        "parallel": {"silos": 1 if synchronous else SILOS},
        "training": {"micro_batch_size": 4, "global_batch_size": BATCH},
    }


def write_pretrain(root: Path, method: str) -> Path:
    run = root / "runs" / method
    values = config_values(root, method)
    _write_config(run, values)
    n_local, baseline = values["dept"]["n_local"], values["parallel"]["silos"] == 1
    lines: list[dict[str, Any]] = []
    for step in range(ROUNDS * n_local):
        for source in ("mixture",) if baseline else SOURCES:
            done = (step + 1) / (ROUNDS * n_local)
            line = {
                "kind": "step", "step": step, "round": step // n_local, "source": source, "silo": 0,
                "tokens": (step + 1) * BATCH * LENGTH,
                "loss": 4.0 + 4.5 * math.exp(-6 * done) + 0.05 * math.sin(7 * step),
                "learning_rate": 6e-4, "grad_norm": 1.0, "tokens_per_second": 9000.0, "mfu": 0.4, "skipped": False,
            }  # fmt: skip
            if step % 10 == 0:
                climb = 14 * done**2 if baseline else 1.5 * done
                line |= {"activation_norm": 11.3 + climb, "parameter_norm": 20 + climb / 3, "embedding_norm": 9.0}
            lines.append(line)
    for number in range(ROUNDS):
        lines += _validations(method, number, n_local, 1.0 + 1.4 * math.exp(-0.7 * (number + 1)))
        lines.append(_round(number, n_local, len(SOURCES) * N_LOCAL, list(SOURCES)))
    _write_metrics(run, lines)
    _write_plan(run, baseline)
    _write_ledger(run, method, n_local)
    _write_evaluation(run, method, VARIANT[method], "pretrain", unseen=method not in ("spec", "spec_opt"))
    return run


def write_adapt(root: Path, method: str, protocol: str) -> Path:
    run = root / "runs" / f"adapt-{method}-{protocol}"
    values = config_values(root, "std") | {
        "run_dir": str(run),
        "phase": "adapt",
        "adapt": {"checkpoint": str(root / "runs" / method), "embedding": protocol},
    }
    values["dept"]["n_local"], values["dept"]["rounds"] = 20, 4
    _write_config(run, values)
    lines: list[dict[str, Any]] = []
    for number in range(4):
        lines += _validations(method, number, 20, 1.0 + 1.2 * math.exp(-0.9 * (number + 1)))
        lines.append(_round(number, 20, 20, ["mixture"]))
    _write_metrics(run, lines)
    _write_evaluation(run, method, "std", "adapt", unseen=True)
    return run


def bits_per_byte(method: str, source: str) -> float:
    """What a method's runs score on a source. C++ headers go against DEPT."""
    against = 0.12 if source == "cpp-headers" and VARIANT[method] not in ("std", "act") else 0.0
    return SOURCE_LEVEL[source] * (LEVEL[method] + against)


def _validations(method: str, number: int, n_local: int, factor: float) -> list[dict[str, Any]]:
    return [
        {
            "kind": "validation", "round": number, "step": (number + 1) * n_local, "source": source, "silo": 0,
            "loss": 3.0, "perplexity": 20.0, "bits_per_byte": factor * bits_per_byte(method, source), "tokens": 20_000,
        }
        for source in SOURCES
    ]  # fmt: skip


def _round(number: int, n_local: int, steps: int, sources: list[str]) -> dict[str, Any]:
    return {
        "kind": "round", "round": number, "step": (number + 1) * n_local, "sources": sources, "seconds": 30.0,
        "exchange_seconds": 0.4, "body_hash": "0" * 16, "silo": 0,
        "total_tokens": (number + 1) * steps * BATCH * LENGTH,
    }  # fmt: skip


def _write_config(run: Path, values: dict[str, Any]) -> None:
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(validate_config(values, "test")))


def _write_metrics(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.silo0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_plan(run: Path, baseline: bool) -> None:
    whole = dict.fromkeys(SOURCES, VOCABULARY)
    trimmed, own = dict(zip(SOURCES, TRIMMED, strict=True)), dict.fromkeys(SOURCES, OWN)
    sizes = {"glob": whole, "trim": trimmed, "spec": trimmed, "spec_opt": own, "std": whole, "act": whole}
    plan = {
        "layout": {"silos": 1, "shapes": [{"data": 2}]}
        if baseline
        else {"silos": SILOS, "shapes": [{"data": 1}] * SILOS},
        "variants": {variant: {"vocabulary_sizes": of_sources} for variant, of_sources in sizes.items()},
    }
    (run / "plan.json").write_text(json.dumps(plan))


def _write_ledger(run: Path, method: str, n_local: int) -> None:
    variant = VARIANT[method]
    if variant in ("std", "act"):
        gradient = 2 * (BODY_BYTES + 4 * (VOCABULARY + LENGTH) * HIDDEN) * n_local
        groups, predicted = {"silo/gradient": gradient, "silo/control": 900}, {}
    else:
        rows = {"glob": 5 * VOCABULARY, "trim": sum(TRIMMED)}.get(variant, 0)
        positions = 5 * LENGTH if variant in ("glob", "trim") else 0
        predicted = {"body": 2 * BODY_BYTES, "embedding": rows * HIDDEN * 4, "position": positions * HIDDEN * 4}
        groups = {f"federation/{kind}": count for kind, count in predicted.items()} | {"federation/control": 4000}
    entries = [{"round": r, "kinds": {}, "groups": groups, "predicted": predicted} for r in range(ROUNDS)]
    steps = ROUNDS * N_LOCAL * len(SOURCES)
    (run / "ledger.json").write_text(json.dumps({"per_round": entries, "totals": {}, "steps": steps}))


def _write_evaluation(run: Path, method: str, variant: str, phase: str, unseen: bool) -> None:
    sources = {}
    for source in (*SOURCES, UNSEEN) if unseen else SOURCES:
        bits = bits_per_byte(method, source)
        sources[source] = {
            "perplexity": math.exp(bits * math.log(2) * 3.0), "bits_per_byte": bits, "nats_per_token": 3.0,
            "tokens": 20_000, "bytes": 60_000, "replaced_tokens": 12, "vocabulary_size": VOCABULARY,
            "out_of_distribution": source == UNSEEN,
        }  # fmt: skip
    vocabulary = {"trim": "trimmed", "spec": "trimmed", "spec_opt": "own"}.get(variant, "global")
    evaluation = {
        "run": str(run),
        "checkpoint": "step-00000120",
        "variant": variant,
        "phase": phase,
        "sources": sources,
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation | {"vocabulary": vocabulary}))
