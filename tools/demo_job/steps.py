"""Which steps the demo takes, in order, and what each needs: planned from the sources, before anything runs."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_dept.common.errors import UserError
from megatron_dept.common.files import read_json

EXAMPLES = "examples/demo"
GLOBAL_VOCABULARY, OWN_VOCABULARY = 8192, 2048
HELDOUT = ("--heldout-fraction", "0.01", "--min-heldout-documents", "12")  # 8 to 20 thousand tokens, all scored
PROMPTS = {"glob": "My fellow citizens, ", "spec_opt": "def __init__(self"}


@dataclass(frozen=True)
class Step:
    """One command. `files`: what it reads beside its arguments; a change in one of them makes the step anew."""

    name: str
    command: tuple[str, ...]
    seconds: float
    """Expected on two cores; replaced by what it took last time."""
    after: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    cores: int = 1
    run_dir: Path | None = None
    """Of a training step: deleted before the step is made anew, kept where it is resumed."""

    @property
    def text(self) -> str:
        """The command as typed in a shell."""
        return shlex.join(self.command)

    def fingerprint(self, root: Path, before: Iterable[str]) -> str:
        """Hash of the command, of the files it reads, and of the fingerprints of the steps before it."""
        digest = hashlib.sha256(json.dumps([self.command, *before]).encode())
        for file in self.files:
            digest.update((root / file).read_bytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Method:
    """A pre-training run of the demo: its file, and the flags that make it differ from the file."""

    name: str
    config: str
    seconds: float
    flags: tuple[str, ...] = ()
    vocabulary: str = "global"
    """global: one table scores any source, unseen ones too; own: a table for each source, none for unseen ones."""
    protocols: tuple[str, ...] = ("random",)
    default: bool = True
    """Whether `make demo` has it; `make demo-all` has all."""


BOTH = ("random", "own")
METHODS = (
    Method("std-tau1", "std", 75, protocols=BOTH),
    Method(
        "std-tau0", "std", 75, ("--dept.std_tau", "0", "--run_dir", "demo/runs/std-tau0"), protocols=BOTH, default=False
    ),
    Method("act", "act", 75, protocols=BOTH, default=False),
    Method("glob", "glob", 60, protocols=BOTH),
    Method("trim", "trim", 50, protocols=BOTH),
    Method("spec", "spec", 50, vocabulary="own", default=False),
    Method("spec_opt", "spec_opt", 45, vocabulary="own"),
)


@dataclass
class Sources:
    """The sources of the fetched text, in the order of the manifest."""

    trained: list[str]
    held_out: list[str]
    online: bool
    files: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, text: Path) -> "Sources":
        """From demo/text/manifest.json."""
        manifest: dict[str, Any] = read_json(text / "manifest.json")
        sources = manifest["sources"]
        return cls(
            trained=[name for name, entry in sources.items() if entry["role"] == "trained"],
            held_out=[name for name, entry in sources.items() if entry["role"] == "held_out"],
            online=manifest["mode"] == "online",
        )

    def flags(self, common: Path) -> tuple[str, ...]:
        """What tells pretrain_dept.py of sources other than those of examples/demo/common.yaml; nothing for those."""
        configured = [source["name"] for source in yaml.safe_load(common.read_text())["sources"]]
        if configured == self.trained:
            return ()
        if self.online:
            raise UserError(f"{common} names the sources {configured}, demo/text holds {self.trained}; make them agree")
        entries = [
            f"{{name: {name}, data: demo/data/global/{name}, own_data: demo/data/own/{name}}}" for name in self.trained
        ]
        return ("--sources", "[" + ", ".join(entries) + "]")


def fetch_step(offline: bool) -> Step:
    """The first step; the others depend on what it finds."""
    flags = ("--offline",) if offline else ()
    return Step("fetch", ("python", "tools/fetch_demo_corpora.py", "--output", "demo/text", *flags), 15)


def plan_steps(root: Path, sources: Sources, every_method: bool, offline: bool) -> list[Step]:
    """Every step in an order that respects what each needs."""
    methods = [method for method in METHODS if every_method or method.default]
    flags = sources.flags(root / EXAMPLES / "common.yaml")
    fetch = fetch_step(offline)
    tokenizers, data = _tokenizer_steps(sources), _data_steps(sources)
    steps = [fetch, *tokenizers, *data]
    ready = tuple(step.name for step in data)
    steps.append(_dry_run(root, flags, ready))
    steps += [_pretrain(root, method, flags, ready) for method in methods]
    steps += [_evaluate(method.name, method.vocabulary == "global", sources) for method in methods]
    steps += [
        _adapt(root, method, protocol, flags) for method in methods for protocol in _protocols(method, every_method)
    ]
    adapted = [f"{m.name}-adapt-{protocol}" for m in methods for protocol in _protocols(m, every_method)]
    steps += [_evaluate(name, True, sources) for name in adapted]
    steps += _export_steps(every_method)
    runs = [method.name for method in methods] + adapted
    steps.append(_report(runs))
    return steps


def _protocols(method: Method, every: bool) -> tuple[str, ...]:
    return method.protocols if every else method.protocols[:1]


def _tokenizer_steps(sources: Sources) -> list[Step]:
    train = ("python", "tools/train_tokenizer.py")
    all_text = [f"demo/text/{name}.jsonl" for name in (*sources.trained, *sources.held_out)]
    # The global one covers the held-out source too, as a general-purpose tokenizer would.
    steps = [
        Step(
            "tokenizer-global",
            (*train, "--input", *all_text, "--output", "demo/tokenizers/global", "--vocab-size", str(GLOBAL_VOCABULARY),
             "--model-type", "bpe", "--balance", "--sample-bytes", "6000000", "--overwrite"),
            4, ("fetch",),
        )
    ]  # fmt: skip
    for name in sources.trained:
        steps.append(
            Step(
                f"tokenizer-{name}",
                (*train, "--input", f"demo/text/{name}.jsonl", "--output", f"demo/tokenizers/{name}", "--vocab-size",
                 str(OWN_VOCABULARY), "--model-type", "unigram", "--sample-bytes", "1000000", "--overwrite"),
                5, ("fetch",),
            )
        )  # fmt: skip
    return steps


def _data_steps(sources: Sources) -> list[Step]:
    wanted = [(name, "global", "global") for name in (*sources.trained, *sources.held_out)]
    wanted += [(name, "own", name) for name in sources.trained]
    return [
        Step(
            f"data-{kind}-{name}",
            ("python", "tools/preprocess_data.py", "--input", f"demo/text/{name}.jsonl", "--tokenizer",
             f"demo/tokenizers/{tokenizer}", "--output", f"demo/data/{kind}/{name}", "--name", name,
             *HELDOUT, "--overwrite"),
            2, (f"tokenizer-{tokenizer}",),
        )
        for name, kind, tokenizer in wanted
    ]  # fmt: skip


def _dry_run(root: Path, flags: Sequence[str], ready: tuple[str, ...]) -> Step:
    """The plan of one of the runs, for people to read in the step's log."""
    config = f"{EXAMPLES}/trim.yaml"
    command = ("python", "pretrain_dept.py", config, "--dry-run", "--ranks", "2", *flags)
    return Step("plan", command, 6, ready, _bases(root, Path(config)))


def _pretrain(root: Path, method: Method, flags: Sequence[str], ready: tuple[str, ...]) -> Step:
    config = f"{EXAMPLES}/{method.config}.yaml"
    return Step(
        f"pretrain-{method.name}", (*_launch(config), *method.flags, *flags), method.seconds, ready,
        _bases(root, Path(config)), cores=2, run_dir=Path("demo/runs") / method.name,
    )  # fmt: skip


def _adapt(root: Path, method: Method, protocol: str, flags: Sequence[str]) -> Step:
    config, run_dir = f"{EXAMPLES}/adapt.yaml", f"demo/runs/{method.name}-adapt-{protocol}"
    own = ("--adapt.checkpoint", f"demo/runs/{method.name}", "--adapt.embedding", protocol, "--run_dir", run_dir)
    return Step(
        f"adapt-{method.name}-{protocol}", (*_launch(config), *own, *flags), 35, (f"pretrain-{method.name}",),
        _bases(root, Path(config)), cores=2, run_dir=Path(run_dir),
    )  # fmt: skip


def _launch(config: str) -> tuple[str, ...]:
    return ("deepspeed", "-q", "--num_accelerators", "2", "pretrain_dept.py", config)


def _bases(root: Path, config: Path) -> tuple[Path, ...]:
    """A run's file and the files it builds on."""
    base = yaml.safe_load((root / config).read_text()).get("base")
    return (config, *(_bases(root, config.parent / base) if base else ()))


def _evaluate(run: str, scores_unseen: bool, sources: Sources) -> Step:
    unseen = [f"{name}=demo/data/global/{name}" for name in sources.held_out] if scores_unseen else []
    flags = ("--ood", *unseen) if unseen else ()
    made_by = f"adapt-{run.replace('-adapt-', '-')}" if "-adapt-" in run else f"pretrain-{run}"
    return Step(f"evaluate-{run}", ("python", "tools/evaluate.py", "--run", f"demo/runs/{run}", *flags), 15, (made_by,))


def _export_steps(every_method: bool) -> list[Step]:
    export = ("python", "tools/convert_to_hf.py", "--checkpoint")
    glob = (*export, "demo/runs/glob", "--output", "demo/hf/glob", "--overwrite")
    own = (*export, "demo/runs/spec_opt", "--all-sources", "--output", "demo/hf/spec_opt", "--overwrite")
    trim = (*export, "demo/runs/trim", "--output", "demo/hf/trim", "--overwrite")
    steps = [
        Step("export-glob", glob, 12, ("pretrain-glob",)),
        Step("export-spec_opt", own, 20, ("pretrain-spec_opt",)),
    ]
    if every_method:
        steps.append(Step("export-trim", trim, 12, ("pretrain-trim",)))
    generate = ("python", "tools/generate.py", "--model")
    steps += [
        Step("generate-glob", (*generate, "demo/hf/glob", "--prompt", PROMPTS["glob"]), 8, ("export-glob",)),
        Step(
            "generate-spec_opt", (*generate, "demo/hf/spec_opt/python-code", "--prompt", PROMPTS["spec_opt"]), 8,
            ("export-spec_opt",),
        ),
    ]  # fmt: skip
    return steps


def _report(runs: Sequence[str]) -> Step:
    command = ("python", "tools/report.py", "--runs", *(f"demo/runs/{run}" for run in runs), "--output", "demo/report")
    return Step("report", command, 12, tuple(f"evaluate-{run}" for run in runs))
