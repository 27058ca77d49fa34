"""From files and flags to a configuration: what is read, what is merged, and what a mistake is told as."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.errors import ConfigError
from megatron_dept.config.load import describe_fields, dump_config, load_config, validate_config
from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import RunConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LEAST: dict[str, Any] = {"run_dir": "runs/a", "sources": [{"name": "de", "data": "data/de"}]}


@pytest.fixture
def write(tmp_path: Path):
    """Writes YAML files: `write("name.yaml", values or text)` -> path."""

    def writer(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return writer


def refusal(path: Path, *flags: str) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_papers_recipe():
    config = validate_config(LEAST, "least")
    optimizer, dept = config.optimizer, config.dept
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon, optimizer.weight_decay) == (0.9, 0.95, 1e-8, 0.0)
    assert (optimizer.clip_grad, optimizer.warmup_steps, optimizer.schedule) == (1.0, 100, "cosine")
    assert (optimizer.learning_rate, optimizer.min_learning_rate_ratio) == (6e-4, 0.1)
    assert (dept.outer.optimizer, dept.outer.learning_rate, dept.outer.momentum) == ("fedavg", 1.0, 0.0)
    assert dept.inner_state == "reset"
    assert (config.model.family, config.model.position_embedding) == ("gpt", "learned")
    assert config.model.ffn_hidden_size == 4 * config.model.hidden_size


def test_no_source_shares_a_section_with_another_run():
    with pytest.raises(Exception, match="frozen"):
        validate_config(LEAST, "least").dept.rounds = 3


@pytest.mark.parametrize(
    "text, value", [("3e-4", 3e-4), ("1E-3", 1e-3), ("5e-5", 5e-5), ("2.5e-4", 2.5e-4), (".5e-3", 5e-4)]
)
def test_scientific_notation_is_a_number_in_files_and_flags(write, text, value):
    from_file = load_config(write("run.yaml", yaml.safe_dump(LEAST) + f"optimizer: {{learning_rate: {text}}}\n"))
    from_flag = load_config(write("run.yaml", LEAST), ["--optimizer.learning_rate", text])
    assert from_file.optimizer.learning_rate == from_flag.optimizer.learning_rate == value


def test_flags_override_the_file_and_take_either_form(write):
    path = write("run.yaml", {**LEAST, "dept": {"rounds": 7, "n_local": 5}})
    config = load_config(path, ["--dept.rounds=3", "--dept.outer.optimizer", "nesterov", "--seed", "-4"])
    assert (config.dept.rounds, config.dept.n_local, config.dept.outer.optimizer, config.seed) == (3, 5, "nesterov", -4)


def test_a_flag_can_clear_a_field(write):
    path = write("run.yaml", {**LEAST, "tokenizer": "t.model"})
    assert load_config(path).tokenizer == Path("t.model")
    assert load_config(path, ["--tokenizer", "null"]).tokenizer is None


def test_a_base_is_merged_under_section_by_section(write):
    write(
        "common/base.yaml", {**LEAST, "model": {"preset": "tiny", "num_layers": 6}, "dept": {"rounds": 9, "n_local": 4}}
    )
    middle = write("middle.yaml", {"base": "common/base.yaml", "dept": {"rounds": 5}})
    config = load_config(write("run.yaml", {"base": middle.name, "run_dir": "runs/b", "model": {"num_layers": 8}}))
    assert config.run_dir == Path("runs/b")
    assert (config.dept.rounds, config.dept.n_local) == (5, 4)
    assert (config.model.num_layers, config.model.hidden_size) == (8, PRESETS["tiny"]["hidden_size"])


def test_a_list_is_replaced_not_merged(write):
    write("base.yaml", {**LEAST, "sources": [{"name": "a", "data": "a"}, {"name": "b", "data": "b"}]})
    config = load_config(write("run.yaml", {"base": "base.yaml", "sources": [{"name": "c", "data": "c"}]}))
    assert [source.name for source in config.sources] == ["c"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_by_file_and_by_flag(write, preset):
    by_file = load_config(write("run.yaml", {**LEAST, "model": {"preset": preset}}))
    by_flag = load_config(write("run.yaml", LEAST), ["--model.preset", preset])
    assert by_file == by_flag
    assert {name: getattr(by_file.model, name) for name in PRESETS[preset]} == PRESETS[preset]


def test_presets_are_the_papers_and_a_tiny_one():
    shapes = {name: (p["num_layers"], p["hidden_size"], p["num_attention_heads"]) for name, p in PRESETS.items()}
    assert shapes.pop("tiny")[1] <= 128
    assert shapes == {"dept-125m": (12, 768, 12), "dept-350m": (24, 1024, 16), "dept-1.3b": (24, 2048, 16)}
    assert all(PRESETS[name]["seq_length"] == 2048 for name in shapes)


def bases(path: Path) -> set[Path]:
    """The file that a configuration names as its base, if any."""
    base = yaml.safe_load(path.read_text()).get("base")
    return {(path.parent / base).resolve()} if base else set()


# Clusters are what tools/plan_run.py reads.
SHIPPED = sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "clusters")
SHIPPED_BASES = set().union(*map(bases, SHIPPED))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_shipped_configuration_loads(path):
    """A base that others build on need not say where it runs; every other file is a run as it stands."""
    missing = ["--run_dir", "runs/a"] if path in SHIPPED_BASES else []
    if path == EXAMPLES / "two_sites" / "run.yaml":
        # What its two sites have in common: which of them a launch is, and where its sources are, they say.
        missing += ["--federation.silo", "0", "--sources", "[{name: a, home: 0, own_data: a}]"]
    assert load_config(path, missing).sources


run_configs = st.fixed_dictionaries(
    {
        "run_dir": st.just("runs/a"),
        "sources": st.lists(
            st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True), min_size=1, max_size=4, unique=True
        ).map(lambda names: [{"name": name, "data": f"data/{name}", "own_data": None} for name in names]),
    },
    optional={
        "seed": st.integers(-(2**70), 2**70),
        "model": st.fixed_dictionaries(
            {}, optional={"family": st.sampled_from(["gpt", "llama"]), "norm_epsilon": st.floats(1e-12, 1)}
        ),
        "dept": st.fixed_dictionaries(
            {},
            optional={"variant": st.sampled_from(["glob", "trim", "spec", "std", "act"]), "std_tau": st.floats(0, 9)},
        ),
        "optimizer": st.fixed_dictionaries({}, optional={"learning_rate": st.floats(1e-300, 1e300)}),
        "logging": st.fixed_dictionaries({}, optional={"csv": st.booleans(), "peak_tflops": st.floats(1e-3, 1e6)}),
    },
)


@given(run_configs)
def test_what_is_dumped_reads_back_equal(tmp_path_factory, values):
    config = validate_config(values, "drawn")
    file = tmp_path_factory.getbasetemp() / "dumped.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_help_lists_every_field_that_can_be_set():
    listed = {line.split()[0].removeprefix("--") for line in describe_fields()}

    def leaves(values: dict[str, Any], prefix: str = "") -> set[str]:
        names = set()
        for name, value in values.items():
            names |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
        return names

    full = {**LEAST, "phase": "adapt", "adapt": {"checkpoint": "runs/b"}, "dept": {"variant": "std"}}
    expected = leaves(validate_config(full, "full").model_dump(mode="json")) - {"sources"}
    assert listed == expected | {
        "model.preset",
        "sources[].name",
        "sources[].data",
        "sources[].own_data",
        "sources[].home",
    }


def test_every_flag_that_help_shows_is_one(write):
    """Each `--flag` of the help, given a value of no sense, is refused by its own name and not as unknown."""
    path = write("run.yaml", {**LEAST, "phase": "adapt", "adapt": {"checkpoint": "runs/b"}, "dept": {"variant": "std"}})
    flags = [line.split()[0] for line in describe_fields() if line.split()[0].startswith("--")]
    assert len(flags) > 40
    for flag in flags:
        message = refusal(path, flag, "{no: sense}")
        assert flag[2:] in message and "unknown field" not in message, message


@pytest.mark.parametrize(
    "values, unknown, nearest",
    [
        ({"optimiser": {"learning_rate": 1}}, "optimiser", "optimizer"),
        ({"dept": {"n_locl": 5}}, "dept.n_locl", "n_local"),
        ({"dept": {"outer": {"momentun": 0.9}}}, "dept.outer.momentun", "momentum"),
        ({"sources": [{"name": "de", "dat": "x"}]}, "sources.0.dat", "data"),
        ({"phase": "adapt", "adapt": {"checkpoint": "x", "embeding": "own"}}, "adapt.embeding", "embedding"),
    ],
)
def test_an_unknown_field_is_told_with_the_nearest_one(write, values, unknown, nearest):
    message = refusal(write("run.yaml", {**LEAST, **values}))
    assert f"unknown field {unknown} " in message and f"did you mean {nearest}?" in message
    assert message.startswith(str(write("run.yaml", LEAST)))


def test_an_unknown_field_like_no_other_is_told_with_all(write):
    message = refusal(write("run.yaml", LEAST), "--parallel.zzzzzz", "1")
    assert "unknown field parallel.zzzzzz (value 1); known fields: silos, " in message


def test_several_mistakes_are_told_together_and_none_twice(write):
    message = refusal(write("run.yaml", {"run_dir": "r", "sources": [{"nam": "de"}], "dept": {"rounds": 0}}))
    assert "field sources.0.name is missing" in message and "dept.rounds" in message
    assert "too_short" not in message and "at least 1 item" not in message


@pytest.mark.parametrize(
    "content, says",
    [
        ("", "must hold a mapping of fields, not NoneType"),
        ("- a\n- b\n", "must hold a mapping of fields, not list"),
        ("run_dir: [\n", "is not valid YAML"),
        ("run_dir: a\nrun_dir: b\n", "field run_dir stands twice"),
        ("model: {num_layers: 2, num_layers: 3}\n", "field num_layers stands twice"),
        ("base: [other.yaml]\n", "base ['other.yaml'] is not the path of a file"),
        ("base: run.yaml\n", "in a circle; remove one 'base:'"),
        ("base: nowhere.yaml\n", "nowhere.yaml does not exist"),
        (
            "model: {preset: huge}\n",
            "model.preset 'huge' is unknown; choose one of tiny, dept-125m, dept-350m, dept-1.3b",
        ),
        ("model: {preset: [tiny]}\n", "model.preset ['tiny'] is unknown"),
    ],
)
def test_a_file_that_cannot_be_read_as_a_run(write, content, says):
    assert says in refusal(write("run.yaml", content))


def test_a_file_that_is_no_text_or_no_file(write, tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not valid YAML" in refusal(tmp_path / "binary.yaml")
    assert "cannot be read" in refusal(tmp_path)
    assert "does not exist; give the path of a run's YAML file" in refusal(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "flags, says",
    [
        (["extra"], "argument 'extra' is not a field; write --section.field value"),
        (["--dept.rounds"], "flag --dept.rounds has no value; write --dept.rounds VALUE"),
        (["--dept.rounds", "["], "flag --dept.rounds: '[' is not a YAML value"),
        (["--dept.rounds", "many"], "dept.rounds: Input should be a valid integer"),
        (["--sources.0.data", "x"], "flag --sources.0.data: sources is not a section; set it in the file"),
        (["--run_dir.x", "1"], "flag --run_dir.x: run_dir is not a section"),
        (["--model", "5"], "model: Input should be a valid dictionary"),
    ],
)
def test_flags_that_are_none(write, flags, says):
    assert says in refusal(write("run.yaml", LEAST), *flags)


def test_the_least_configuration_is_indeed_enough():
    assert isinstance(validate_config(LEAST, "least"), RunConfig)
