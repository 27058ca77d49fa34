"""The house's floors: imports go down only, the engine alone knows DeepSpeed, and files stay readable in a minute."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "megatron_dept"

FLOORS = (
    {"config", "topology", "common"},
    {"tensor_parallel", "tokenizers", "ops"},
    {"models", "dept", "federation", "data", "export"},
    {"engine", "checkpoint", "evaluation"},
    {"training"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Rooms of one floor do not import each other, but for these.
NEIGHBOURS = {
    ("config", "common"),  # errors and files are what every room needs
    ("topology", "common"),
    ("topology", "config"),  # the layout is read off the configuration's sizes
    ("export", "models"),  # an export maps the parameters that a model has
    ("federation", "dept"),  # the exchange applies the rules to what it gathered; the rules know of no exchange
}
WITHOUT_TORCH = ("config", "topology")
LINES_AT_MOST = 500


def sources() -> list[Path]:
    """Every Python file of the project that a person wrote."""
    folders = [PACKAGE, *(PROJECT / name for name in ("tools", "tests", "benchmarks", "examples"))]
    return sorted(PROJECT.glob("*.py")) + sorted(path for folder in folders for path in folder.rglob("*.py"))


def imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names that a module of `package` imports, anywhere in it: late, relative and by a string's name too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def floor_violations(room: str, names: Iterator[str]) -> list[str]:
    """What a file of `room` imports from a floor above, or from a neighbour that it may not."""
    wrong = []
    for name in names:
        parts = name.split(".")
        if parts[0] != "megatron_dept" or len(parts) < 2:
            continue
        other = parts[1]
        if other == "__version__":
            continue  # stated by the package itself, below all rooms
        if other not in FLOOR_OF:
            wrong.append(f"{name} is in no room")
        elif other != room and FLOOR_OF[other] > FLOOR_OF[room]:
            wrong.append(f"{room} (floor {FLOOR_OF[room]}) imports {name} (floor {FLOOR_OF[other]})")
        elif other != room and FLOOR_OF[other] == FLOOR_OF[room] and (room, other) not in NEIGHBOURS:
            wrong.append(f"{room} imports its neighbour {name}")
    return wrong


def parsed(path: Path) -> tuple[ast.Module, str]:
    """The file's syntax tree and the package its relative imports start from."""
    package = ".".join(path.relative_to(PROJECT).parent.parts)
    return ast.parse(path.read_text(encoding="utf-8"), str(path)), package


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def test_every_file_is_in_a_room():
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(files) > 20
    assert [str(path) for path in files if room_of(path) not in FLOOR_OF] == []


def test_imports_go_down_only():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "__init__.py":
            wrong += [
                f"{path.relative_to(PROJECT)}: {line}"
                for line in floor_violations(room_of(path), imports(*parsed(path)))
            ]
    assert wrong == []


def test_the_package_itself_imports_no_room():
    assert [name for name in imports(*parsed(PACKAGE / "__init__.py")) if name.startswith("megatron_dept")] == []


def test_only_the_engine_imports_deepspeed():
    importers = {
        path.relative_to(PROJECT).parts[:2]
        for path in sources()
        if any(name.split(".")[0] == "deepspeed" for name in imports(*parsed(path)))
    }
    # The tests' fork server imports it ahead, so that a rank need not; benchmarks have plain DeepSpeed as their peer.
    peers = {("benchmarks", "layouts.py"), ("benchmarks", "gpu_kernels.py")}
    assert importers <= {("megatron_dept", "engine"), ("tests", "support"), *peers}


@pytest.mark.parametrize("room", WITHOUT_TORCH)
def test_arithmetic_and_configuration_need_no_torch(room):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    assert [path.name for path in files if any(name.split(".")[0] == "torch" for name in imports(*parsed(path)))] == []


def test_no_file_is_too_long():
    native = [path for kind in ("*.cpp", "*.cu", "*.h", "*.cuh") for path in (PROJECT / "csrc").rglob(kind)]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources() + native}
    too_long = {str(path.relative_to(PROJECT)): lines for path, lines in lengths.items() if lines > LINES_AT_MOST}
    assert too_long == {}


@pytest.mark.parametrize(
    "room, line",
    [
        ("dept", "from megatron_dept.training.loop import run"),
        ("dept", "import megatron_dept.engine.silo_engine"),
        ("models", "from megatron_dept import evaluation"),
        ("models", "from ..data import sampler"),
        ("models", "from megatron_dept.export import gpt2"),
        ("data", "def late():\n    from megatron_dept.models.build import build_body"),
        ("common", "from megatron_dept.config.schema import RunConfig"),
        ("config", "importlib.import_module('megatron_dept.data.directory')"),
        ("config", "from megatron_dept.attic import anything"),
    ],
)
def test_a_wrong_import_is_seen(room, line):
    assert len(floor_violations(room, imports(ast.parse(line), f"megatron_dept.{room}"))) == 1


@pytest.mark.parametrize(
    "room, line",
    [
        ("training", "from megatron_dept.engine.silo_engine import SiloEngine"),
        ("export", "from megatron_dept.models.build import build_body"),
        ("data", "from megatron_dept.tokenizers.base import Tokenizer"),
        ("models", "from . import tags"),
        ("models", "from .tags import tag\nimport torch"),
    ],
)
def test_a_right_import_is_let_through(room, line):
    assert floor_violations(room, imports(ast.parse(line), f"megatron_dept.{room}")) == []
