"""The GPU check without a GPU: wheels, the plan of steps, running and losing them, what they print, the report."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu_check_steps import plan, report, run, sanitizer, wheels
from setup_environment import SetupError

TOOL = Path(gpu_check.__file__)
NEEDS = {
    "deepspeed": ["hjson", "torch", "pydantic>=2", 'old; python_version < "3.9"'],
    "pydantic": ["typing-extensions>=4.6", 'email-validator; extra == "email"'],
    "torch": ["nvidia-cublas", "triton"],
}


def closed(have: dict[str, str], wanted: list[str] | None = None) -> list[str]:
    found = wheels.closure(wanted or ["deepspeed==0.19.8"], have, lambda name: NEEDS.get(name, []), "3.12")
    return [each.name for each in found]


def test_what_is_missing_is_found_through_what_is_missing() -> None:
    assert closed({"torch": "2.11.0"}) == ["deepspeed", "hjson", "pydantic", "typing-extensions"]
    assert closed({"DeepSpeed": "0.19.8", "hjson": "", "pydantic": "2.1", "Typing_Extensions": "4.16"}) == []


def test_a_version_that_does_not_do_is_missing_and_torch_never_is() -> None:
    assert closed({"deepspeed": "0.18", "hjson": "", "pydantic": "1.10", "typing-extensions": "4.1"}) == [
        "deepspeed",
        "pydantic",
        "typing-extensions",
    ]
    assert closed({}, ["torch>=2.11", "triton"]) == []


def test_a_version_that_is_not_known_does_where_none_is_asked_for() -> None:
    """A carried package's bounds must hold on a machine of which names alone are known."""
    have = {"hjson": "", "pydantic": "", "typing-extensions": ""}
    assert closed(have) == ["deepspeed", "pydantic", "typing-extensions"]


def test_what_is_there_is_taken_to_have_what_it_needs() -> None:
    found = wheels.closure(
        ["deepspeed", "hjson"], {"deepspeed": ""}, lambda name: NEEDS.get(name, []), "3.12", through_present=False
    )
    assert [each.name for each in found] == ["hjson"]


def test_extras_are_followed_only_where_they_are_asked_for() -> None:
    have = {"pydantic": "2.1", "typing-extensions": "4.16"}
    assert closed(have, ["pydantic[email]"]) == ["email-validator"]


def test_the_package_needs_what_setup_py_says() -> None:
    required = wheels.roots()
    assert "deepspeed==0.19.8" in required and "pytest" in required
    assert not {"torch", "mpi4py", "matplotlib"} & {wheels._name(each) for each in required}


@pytest.mark.parametrize(
    "text",
    [
        "Package    Version\n---------- -------\nnumpy      2.5.2\nPyYAML     6.0\nmine 1.0 /src/mine\n",
        "numpy==2.5.2\nPyYAML==6.0\nmine @ file:///x\n",
        '[{"name": "numpy", "version": "2.5.2"}, {"name": "PyYAML", "version": "6.0"}, {"name": "mine"}]',
        "numpy, PyYAML,\nmine",
    ],
)
def test_pip_list_is_read_in_every_format(text: str) -> None:
    found = wheels.parse_installed(text)
    assert set(found) == {"numpy", "PyYAML", "mine"}
    assert found["numpy"] in ("2.5.2", "")


def test_the_commands_fetch_wheels_and_make_those_that_are_source_alone() -> None:
    missing = [wheels.Missing("deepspeed", "x"), wheels.Missing("orjson", "x")]
    download, make = wheels.download_commands(missing, "3.12", "W", "python3")
    assert download[:4] == ["python3", "-m", "pip", "download"] and download[-1].startswith("orjson==")
    assert download[download.index("--python-version") + 1] == "3.12"
    assert make[-1] == "deepspeed==0.19.8" and "wheel" in make


def wheel_of(folder: Path, name: str, version: str, text: str = "") -> Path:
    """A wheel by hand: one module."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", text)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_wheels_are_installed_apart_and_torch_never(tmp_path: Path) -> None:
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    with pytest.raises(SetupError, match="holds no wheels; .*--list-wheels"):
        wheels.check_folder(folder)
    wheel_of(folder, "carried", "1.0", "VALUE = 7\n")
    wheel_of(folder, "torch", "9.9")
    wheels.install(Path(sys.executable), folder, site, tmp_path / "log")
    assert (site / "carried.py").exists() and not (site / "torch.py").exists()
    stamp = (site / "installed.txt").stat().st_mtime_ns
    wheels.install(Path(sys.executable), folder, site, tmp_path / "log")
    assert (site / "installed.txt").stat().st_mtime_ns == stamp
    wheel_of(folder, "carried", "1.1")
    with pytest.raises(SetupError, match=r"carried-1\.0.*carried-1\.1.*keep one"):
        wheels.check_folder(folder)


def test_steps_are_chosen_by_name_and_keep_their_order() -> None:
    assert [step.name for step in plan.chosen("step, facts")] == ["facts", "step"]
    assert plan.chosen(None) == list(plan.STEPS)
    with pytest.raises(SetupError, match="turbo is no step; choose of facts, build"):
        plan.chosen("facts,turbo")
    with pytest.raises(SetupError, match="nothing is no step"):
        plan.chosen(",")


def test_a_steps_environment_has_the_tree_first_and_the_wheels_second() -> None:
    on_gpu = plan.environment_of("cuda", Path("/site"), {"PYTHONPATH": "/own"})
    assert on_gpu["PYTHONPATH"] == f"{plan.ROOT}:/site:/own"
    assert on_gpu["DS_ACCELERATOR"] == "cuda" and on_gpu["MEGATRON_DEPT_CUDA"] == "1"
    assert "MEGATRON_DEPT_CUDA" not in plan.environment_of("cpu", None, {})


def test_only_files_with_gpu_tests_are_given_to_pytest() -> None:
    files = plan.gpu_tests(plan.ROOT)
    assert "tests/engine/test_gpu_step.py" in files
    assert not [file for file in files if "test_loss" in file]


def bench(tmp_path: Path) -> run.Bench:
    return run.Bench(Path(sys.executable), "cpu", {}, tmp_path)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """{step: Python text that it runs}, its figures' file being `path`."""
    texts: dict[str, str] = {}

    def command_of(name: str, python: str, device: str, figures: Path, seconds: float) -> list[str]:
        return [python, "-c", f"path = {str(figures)!r}\n{texts[name]}"]

    monkeypatch.setattr(run, "command_of", command_of)
    return texts


WELL = "open(path, 'w').write('{\"card\": \"NVIDIA H200\"}')"


def test_a_failed_step_leaves_the_others_results(tmp_path: Path, commands: dict[str, str]) -> None:
    commands |= {"facts": WELL, "build": f"{WELL}\nprint('what broke')\nraise SystemExit(3)", "step": WELL}
    told: list[dict[str, Any]] = []
    entries = run.run_steps(bench(tmp_path), plan.chosen("facts,build,step"), 5, False, told.append)
    assert [entry["status"] for entry in entries] == ["ok", "failed", "ok"]
    assert entries == told
    assert entries[1]["message"] == "exit code 3" and entries[1]["tail"][-1] == "what broke"
    assert entries[1]["data"] == {"card": "NVIDIA H200"}, "what it had written before it failed is kept"


def test_what_went_well_is_not_run_again_unless_the_tree_changes(
    tmp_path: Path, commands: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands |= {"facts": WELL, "build": "raise SystemExit(1)"}
    steps = plan.chosen("facts,build")
    run.run_steps(bench(tmp_path), steps, 5, False, lambda entry: None)
    commands |= {"facts": "raise SystemExit(1)", "build": WELL}
    again = run.run_steps(bench(tmp_path), steps, 5, False, lambda entry: None)
    assert [entry["status"] for entry in again] == ["ok", "ok"]
    monkeypatch.setattr(run, "fingerprint", lambda: "another")
    assert run.run_steps(bench(tmp_path), steps, 5, False, lambda entry: None)[0]["status"] == "failed"


def test_a_step_that_wrote_nothing_has_failed(tmp_path: Path, commands: dict[str, str]) -> None:
    commands["facts"] = "pass"
    (entry,) = run.run_steps(bench(tmp_path), plan.chosen("facts"), 5, False, lambda entry: None)
    assert entry["status"] == "failed" and "wrote no figures" in entry["message"]


def test_without_time_a_step_is_not_begun(tmp_path: Path, commands: dict[str, str]) -> None:
    (entry,) = run.run_steps(bench(tmp_path), plan.chosen("facts"), 0.1, False, lambda entry: None)
    assert entry["status"] == "out of time" and "goes on from here" in entry["message"]


def test_a_step_past_its_limit_is_ended_with_its_children(tmp_path: Path) -> None:
    child = tmp_path / "child"
    late = f"import time; time.sleep(1.5); open({str(child)!r}, 'w')"
    text = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {late!r}]); time.sleep(60)"
    began = time.monotonic()
    assert run.run_limited([sys.executable, "-c", text], {}, tmp_path / "log", 0.7) is None
    assert time.monotonic() - began < 15
    time.sleep(2)
    assert not child.exists()


def test_pytest_past_its_limit_still_writes_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("import time\ndef test_fine(): pass\ndef test_slow(): time.sleep(60)\n")
    figures = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", str(tmp_path), "--junit-xml", str(figures)]
    assert run.run_limited(command, {}, tmp_path / "log", 6) is None
    assert run.read_junit(figures)["passed"] == 1


def test_the_fingerprint_is_of_sources_alone(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("x")
    first = run.fingerprint(tmp_path)
    (tmp_path / "csrc" / "built.so").write_text("x")
    assert run.fingerprint(tmp_path) == first
    (tmp_path / "csrc" / "a.cu").write_text("y")
    assert run.fingerprint(tmp_path) != first


def test_pytests_file_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "junit.xml"
    file.write_text(
        "<testsuites><testsuite>"
        '<testcase classname="a" name="fine" time="1.5"/>'
        '<testcase classname="a" name="bad" time="0.5"><failure message="assert 1 == 2">long</failure></testcase>'
        '<testcase classname="a" name="broke" time="0"><error message="no fixture"/></testcase>'
        '<testcase classname="a" name="left" time="0"><skipped message="one GPU here"/></testcase>'
        "</testsuite></testsuites>"
    )
    found = run.read_junit(file)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["cases"][1] == {"name": "a::bad", "seconds": 0.5, "status": "failed", "message": "assert 1 == 2"}


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void mdept::body_pack<(Wire)1>(const float *)+0x50 in body.cuh:200
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
INITCHECK = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x1e0
========= ERROR SUMMARY: 12 errors
"""


def test_the_memory_checkers_words_are_counted() -> None:
    found = sanitizer.parse(f"body_pack bf16: equal\n{MEMCHECK}")
    assert (found["errors"], found["ours"]) == (1, 1)
    found = sanitizer.parse(INITCHECK)
    assert (found["errors"], found["ours"]) == (12, 0)
    found = sanitizer.parse("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert found["errors"] == 0
    assert sanitizer.parse("========= Error: Device not supported\n")["errors"] is None


def entry(step: str, status: str, data: Any = None, **more: Any) -> dict[str, Any]:
    base = {"step": step, "status": status, "seconds": 1.0, "command": f"run {step}", "data": data, "tail": []}
    return base | {"at": "then", "device": "cuda", "tree": "t"} | more


def whole_report() -> list[dict[str, Any]]:
    figures = {"microseconds": 812.0, "best_microseconds": 800.0, "spread": 0.01, "gb_per_second": 1.0}
    case = {
        "case": "body_pack bf16",
        "bytes": 2_000_000_000,
        "goal": True,
        "variants": {"kernel": figures | {"of_copy": 0.91}, "torch eager": figures | {"of_copy": 0.4}},
    }
    slow = case | {"case": "trim_gather to bf16", "variants": {"kernel": figures | {"of_copy": 0.8}}}
    bandwidth = {"copy_tb_per_second": 4.3, "goal": 0.88, "cases": [case, slow], "peers": {"apex": "not present"}}
    step = {
        "head": [{"hidden": 768, "vocabulary": 50_304, "chunk": 256, "ms": 9.0, "of_product_rate": 0.5}],
        "cases": [{"case": "dept-1.3b", "error": "out of memory"}],
        "table_gradient": [{"hidden": 768, "vocabulary": 50_304, "chunk": 256, "ms": 1.0, "ms_one_product": 0.5}],
        "left_out": ["dept-125m"],
    }
    return [
        entry("facts", "ok", {"card": "NVIDIA H200", "copy_tb_per_second": 4.3}),
        entry("build", "ok", {"seconds": 60, "native": True, "registers": {"f<|>": {"sm_90": {"registers": 40}}}}),
        entry("parity", "failed", {"passed": 1}, tail=["E  assert 1 == 2"], message="exit code 1"),
        entry("bandwidth", "ok", bandwidth | {"failed": {"body_mean": "it broke"}}),
        entry("step", "ok", step),
        entry("sanitizer", "not present"),
    ]


def test_the_report_tells_figures_goals_and_failures(tmp_path: Path) -> None:
    data, text = report.write(tmp_path, whole_report(), "make gpu-check", "cuda")
    assert data.name == "gpu-h200.json" and text.name == "gpu-h200.md"
    assert [step["step"] for step in json.loads(data.read_text())["steps"]] == [step.name for step in plan.STEPS]
    words = text.read_text()
    assert "| body_pack bf16* | 2.00 | 91.0% (812) | yes | 40.0% (812) |" in words
    assert "| trim_gather to bf16* | 2.00 | 80.0% (812) | NO |" in words
    assert "E  assert 1 == 2" in words and "Its figures are not complete" in words
    assert "out of memory" in words and "left out for time: dept-125m" in words
    assert "body_mean failed: it broke" in words and "rehearsal" not in words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-h200.json", "gpu-h200.md"]


@pytest.mark.parametrize(("card", "name"), [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3")])
def test_reports_are_called_after_the_card(card: str, name: str) -> None:
    assert report.slug(card) == name


def tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_it_ends_in_one_line(tmp_path: Path) -> None:
    done = tool("--out", str(tmp_path))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "sees no GPU" in done.stderr and "--device cpu" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_list_of_wheels_names_what_the_machine_lacks(tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    have = set(wheels.parse_installed((plan.ROOT / "constraints.txt").read_text())) - {"deepspeed", "orjson", "hjson"}
    listed.write_text("\n".join(have))
    done = tool("--list-wheels", "--installed", str(listed))
    assert done.returncode == 0, done.stderr
    assert "# hjson: needed by deepspeed" in done.stdout
    assert "pip wheel --no-deps -w wheels deepspeed==0.19.8" in done.stdout and "orjson==" in done.stdout
    assert "numpy" not in done.stdout


@pytest.mark.slow
def test_a_rehearsal_goes_through_measuring_and_the_report(tmp_path: Path) -> None:
    done = tool("--device", "cpu", "--again", "--only", "facts,bandwidth,sanitizer", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert written["rehearsal"] and written["facts"]["device"] == "cpu"
    words = (tmp_path / "gpu-rehearsal.md").read_text()
    assert "A rehearsal" in words and "body_unpack int8*" in words


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    done = tool("--device", "cpu", "--again", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {step["step"]: step for step in json.loads((tmp_path / "gpu-rehearsal.json").read_text())["steps"]}
    assert {name: step["status"] for name, step in steps.items()} == {
        **dict.fromkeys(("facts", "build", "parity", "bandwidth", "step"), "ok"),
        "sanitizer": "not present",
    }
    assert steps["parity"]["data"]["failed"] == 0 and steps["parity"]["data"]["passed"] >= 6
