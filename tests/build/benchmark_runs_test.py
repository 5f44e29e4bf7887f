# SPDX-License-Identifier: Apache-2.0
"""Tests runs of the benchmarks: a failure costs one unit; builds are compared.

Child processes run the toy units of `toy_worker.py` instead of the operators.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import against
import contenders_torch
import convolution
import gpu_check
import processes
import pytest
import run
import timing
import toy_worker
import worker


@pytest.fixture(autouse=True)
def clean_keras() -> None:
    """Overrides the fixture of the same name: no TensorFlow is needed here."""


# Child processes.


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_run_program_returns_what_is_said():
    script = "print('one'); exit(3)"
    assert processes.run_program(python(script), 60) == (3, "one\n")


def test_run_program_ends_what_hangs_and_its_children(tmp_path):
    file = tmp_path / "alive"
    child = (
        "import time\n"
        f"while True: open({str(file)!r}, 'a').write('x'); time.sleep(0.05)"
    )
    script = (
        "import os, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not os.path.exists({str(file)!r}): time.sleep(0.05)\n"
        "print('begun', flush=True); time.sleep(600)"
    )
    assert processes.run_program(python(script), 3) == (None, "begun\n")
    size = file.stat().st_size
    time.sleep(0.2)
    assert file.stat().st_size == size


@pytest.fixture
def run_toys(tmp_path, monkeypatch):
    """Returns a function that runs toys: exit status, report and table."""
    monkeypatch.setattr(worker, "CPU_SUITES", toy_worker.SUITES)
    for module in (processes, against):
        monkeypatch.setattr(module, "WORKER", toy_worker.__file__)

    def main(*arguments: object) -> tuple[int, dict, str]:
        options = ["--threads", "1", "--out", tmp_path / "out", *arguments]
        status = run.main(list(map(str, options)))
        report = json.loads((tmp_path / "out/results.json").read_text())
        return status, report, (tmp_path / "out/table.md").read_text()

    return main


def test_failures_cost_their_unit_and_no_more(run_toys, capsys, monkeypatch):
    def run_worker(job: dict, timeout: float) -> tuple:
        assert timeout == 321
        return processes.run_worker(job, 2 if job["shape"] == "hang" else 321)

    monkeypatch.setattr(run, "run_worker", run_worker)
    status, report, table = run_toys("--timeout", 321)
    assert status == 1
    assert report["complete"]
    rows = {(row["shape"], row["contender"]): row for row in report["rows"]}
    good = ["right", "wrong", "raise", "lacks", "late"]
    assert [shape for shape, _ in rows] == [s for s in good for _ in range(2)]
    # A wrong result gets no time; the right results beside it do.
    assert rows["wrong", "peer"]["errors"] == {
        "forward": "differs from the baseline: output by 0.00099"
    }
    assert "forward" not in rows["wrong", "peer"]
    assert "both" in rows["wrong", "peer"]
    assert "RuntimeError: no such operator" in str(rows["raise", "peer"])
    assert rows["lacks", "peer"]["unsupported"] == "toys"
    for shape in good:
        assert len(rows[shape, "tf_deform"]["forward"]["samples_ms"]) == 3
    assert rows["right", "peer"]["forward"]["ratio"] > 0
    # Processes that end or hang cost one unit each; no failure is left out.
    late, crash, hang = report["errors"]
    assert late.startswith("late, threads 1, after the last result: the proc")
    assert "ended with exit status 9" in late
    assert crash == (
        "crash, threads 1, float32: the process ended with exit status 7: "
        "illegal memory access"
    )
    assert hang == "hang, threads 1, float32: not finished after 2 s"
    assert table == capsys.readouterr().out
    assert "| wrong | 1 | peer | error |" in table
    assert "- Not supported by peer: toys." in table
    assert "- ERROR crash, threads 1" in table


def test_the_environment_names_no_folder_of_results(
    tmp_path, monkeypatch, run_toys
):
    monkeypatch.setenv("OUT", str(tmp_path / "other"))
    assert run_toys("--only", "right")[0] == 0
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["roi"], list(toy_worker.SUITES["roi"].shapes)),
        (["ri", "la"], ["right", "lacks", "late"]),
    ],
)
def test_only_takes_operators_and_parts_of_shapes(run_toys, words, expected):
    options = run.parse_arguments(["--threads", "1", "--only", *words])
    assert [unit.shape for unit in options.units] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--only right nothing", "a part of a shape. Received: nothing"),
        ("--shapes a2", "Expected a toy. Received: a2"),
        ("--threads 9999", "--threads 9999: this process may use"),
        ("--contenders peer who", "who: not one of tf_deform, peer"),
        ("--repeats 0", "--repeats must be at least 1"),
        ("--emulate", "go with --device cuda"),
        ("--against /nowhere", "without tf_deform/_ops*.so"),
    ],
)
def test_bad_arguments(run_toys, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run.parse_arguments(arguments.split())
    assert error.value.code == 2
    assert message in capsys.readouterr().err


# Two builds side by side.


@pytest.fixture
def compare_builds(tmp_path, run_toys, monkeypatch):
    """Returns a function that compares two packages, by their functions."""

    def compare(*doubles: str, timeout: int = 60) -> tuple[int, dict, str]:
        for name, double in zip(("this", "other"), doubles, strict=True):
            package = tmp_path / name / "tf_deform"
            package.mkdir(parents=True)
            (package / "_ops_2.21.so").touch()
            (package / "__init__.py").write_text(
                f"import os, time\ndef double(inputs):\n    {double}\n"
            )
        monkeypatch.setattr(against, "ROOT", str(tmp_path / "this"))
        options = ["--shapes", "built", "--against", tmp_path / "other"]
        return run_toys(*options, "--timeout", timeout)

    return compare


RIGHT = "return 2 * inputs"
SLOW = "time.sleep(0.01); return 2 * inputs"
SLOWER = "time.sleep(0.02); return 2 * inputs"


def test_a_slower_build_is_found(compare_builds):
    status, report, text = compare_builds(SLOWER, SLOW)
    assert status == 0  # failed timings are no failure
    assert [row["kind"] for row in report["rows"]] == ["forward", "both"]
    for row in report["rows"]:
        low, high = row["interval"]
        assert 1.5 < low <= row["this"]["ratio_by_round"]["median"] <= high
        assert len(row["this"]["samples_ms"]) == run.AGAINST_REPEATS
        assert len(row["ratio_by_pair"]) == against.PAIRS
    bits, mean, slower = text.splitlines()[-3:]
    assert bits == "- Results are equal to the bit in all 2 rows."
    assert "MISSED" in mean
    assert "above 1.02: built, threads 1, forward (" in slower


def test_a_build_is_not_slower_than_a_slower_one(compare_builds):
    _, _, text = compare_builds(SLOW, SLOWER)
    assert "(goal: at most 1.01, met)" in text
    assert text.endswith("lies wholly above 1.02: none.\n")


def test_other_bits_are_named_and_other_results_refused(compare_builds):
    other = "return 2 * inputs * type(inputs[0])(1 + 1e-6)"
    status, report, text = compare_builds(RIGHT, other)
    assert status == 0
    # The gradients of the toy units are constants.
    assert [row["equal_bits"] for row in report["rows"]] == [False, True]
    assert "DIFFER in 1 of 2 rows" in text


def test_a_build_whose_results_are_wrong_is_not_timed(compare_builds):
    status, report, text = compare_builds(RIGHT, "return 2.01 * inputs")
    assert status == 1
    assert (
        "ERROR built, threads 1, tf_deform, forward: differs from the "
        "baseline: forward output by 0.0"
    ) in text
    timed = {row["kind"]: "interval" in row for row in report["rows"]}
    assert timed == {"forward": False, "both": True}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("os._exit(3)", "the process ended: "),
        ("raise OSError('no such file')", "the process ended: OSError: no"),
        ("time.sleep(600)", "not finished after 2 s"),
    ],
)
def test_a_build_that_fails_costs_its_unit(compare_builds, other, message):
    timeout = 2 if "sleep" in other else 60
    status, report, text = compare_builds(RIGHT, other, timeout=timeout)
    assert status == 1 and report["rows"] == []
    assert f"- ERROR built, threads 1: {message}" in text


def test_a_build_must_be_that_of_its_tree(compare_builds, monkeypatch):
    def environment(job: dict) -> dict[str, str]:
        tree = pathlib.Path(job["tree"]).with_name("other")
        return processes.worker_environment(job | {"tree": str(tree)})

    monkeypatch.setattr(against, "worker_environment", environment)
    status, _, text = compare_builds(RIGHT, RIGHT)
    assert status == 1
    assert "Expected tf_deform to be imported from" in text


# On a GPU.


def test_says_in_one_line_what_is_missing():
    result = subprocess.run(
        [sys.executable, gpu_check.__file__],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert re.search("Missing: a GPU", result.stderr)


FILES = ["tests/core/deformable_conv2d_cuda_test.py", "tests/core/x_test.py"]
SHAPES = {"conv": ("8x56x56x256->256",), "roi": ("psroi:1->2",)}
DEFAULT = ["table", "tests", "memcheck", "racecheck"]


@pytest.mark.parametrize(
    ("words", "sections", "of_table", "files"),
    [
        ([], DEFAULT, [], FILES),
        (["racecheck", "table"], ["table", "racecheck"], [], FILES),
        (["56x56"], ["table"], ["56x56"], []),
        (["conv"], DEFAULT, ["conv"], FILES[:1]),
        (["x_test"], DEFAULT[1:], [], FILES[1:]),
        (["psroi", "tests"], ["tests"], ["psroi"], []),
    ],
)
def test_only_takes_sections_and_units(words, sections, of_table, files):
    found = gpu_check.choose_units(words, FILES, SHAPES)
    assert found == (sections, of_table, files)


def test_only_refuses_other_words():
    with pytest.raises(ValueError, match="Received: nothing"):
        gpu_check.choose_units(["table", "nothing"], FILES, SHAPES)


def test_a_few_cases_of_every_test():
    listed = [
        "tests/core/a_test.py::test_one[0]",
        "tests/core/a_test.py::test_one[1 - x]",
        "tests/core/a_test.py::test_one[2]",
        "tests/core/a_test.py::test_two",
        "tests/core/b_test.py::test_one[0]",
        "",
        "5 tests collected in 0.1s",
    ]
    assert gpu_check.choose_cases(listed, 2) == [*listed[:2], *listed[3:5]]


@pytest.mark.parametrize(
    ("status", "printed", "text", "failed"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "0 errors", False),
        (86, "========= ERROR SUMMARY: 3 errors", "3 errors", True),
        (1, "1 failed", "exit status 1", True),
        (1, "========= Error: Device not supported", "not support", False),
        (None, "...", "nothing found until then", False),
        (None, "========= Invalid __global__ read", "errors until", True),
    ],
)
def test_what_compute_sanitizer_says(status, printed, text, failed):
    found, is_failure = gpu_check.judge_check(status, printed, 7)
    assert text in found
    assert is_failure == failed


def test_shapes_and_precisions_for_a_gpu():
    for suite in contenders_torch.SUITES.values():
        for shape in (*suite.shapes, *suite.quick_shapes):
            case = suite.case.parse(shape, "float32", True)
            assert str(case) == shape
            if suite.case is convolution.Case:
                # torchvision and cuDNN pad both sides by the same amount.
                assert all(one == two for one, two in case.padding)
    assert tuple(contenders_torch.PRECISIONS) == run.PRECISIONS
    assert set(run.PRECISIONS) <= set(timing.TOLERANCES)


CRASHES = """
import json, os, sys
job = json.loads(sys.argv[1])
def end(status):
    print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
    os._exit(status)
if job["mode"] == "describe":
    if CRASH == "describe":
        end(1)
    machine = {"gpu": "toy", "capability": "9.0"}
    print(json.dumps({"machine": machine, "versions": {"torch": "0"}}))
    print(json.dumps({"peaks": {"float32": 50.0}}), flush=True)
    os._exit(0)
for precision in job["precisions"]:
    if precision == CRASH:
        end(1)
    rows = [row | {"precision": precision} for row in ROWS]
    print(json.dumps({"precision": precision, "rows": rows}), flush=True)
"""


@pytest.fixture
def crash(tmp_path, monkeypatch):
    """Returns a function that runs a table with a crash: report and table."""
    rows = []
    for contender, ms in (("tf_deform", 1.0), ("torchvision", 3.0)):
        row = {"contender": contender, "disagreement": {}, "errors": {}}
        time_ = {"median_ms": ms, "q25_ms": ms, "q75_ms": ms}
        rows.append(row | {"forward": time_, "both": time_})
    child = tmp_path / "child.py"
    monkeypatch.setattr(processes, "WORKER", str(child))

    def main(where: str) -> tuple[dict, str]:
        child.write_text(f"CRASH, ROWS = {where!r}, {rows!r}\n{CRASHES}")
        options = ["--device", "cuda", "--only", "28x28", "--out"]
        assert run.main([*options, str(tmp_path)]) == 1
        report = json.loads((tmp_path / "results.json").read_text())
        return report, (tmp_path / "table.md").read_text()

    return main


def test_a_kernel_that_crashes_costs_its_own_rows(crash):
    report, table = crash("tf32")
    assert report["complete"]
    assert len(report["rows"]) == 2 * 3
    (error,) = report["errors"]
    assert "8x28x28x512->512, tf32: " in error
    assert "illegal memory access" in error
    assert report["peaks"] == {"float32": 50.0}
    assert "3.00 to 3.00 times as fast as torchvision" in table
    assert "EMULATED" not in table


def test_a_gpu_that_cannot_be_described_ends_the_run(crash):
    report, table = crash("describe")
    assert not report["complete"] and not report["rows"]
    assert "- ERROR the GPU: the process ended with exit status 1" in table


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch not installed"
)
def test_the_whole_table_emulated(tmp_path):
    arguments = ["--emulate", "--only", "table", "--repeats", "5"]
    if core := os.environ.get("TF_DEFORM_CORE"):  # else it builds one
        arguments += ["--core", core]
    result = subprocess.run(
        [sys.executable, gpu_check.__file__, *arguments]
        + ["--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    ours = [r for r in report["rows"] if r["contender"] == "tf_deform"]
    assert len(ours) == 4 + 3 + 3
    assert all(
        "both" in row for row in report["rows"] if "unsupported" not in row
    )
    assert (tmp_path / "summary.md").read_text() == "- table: see table.md\n"
