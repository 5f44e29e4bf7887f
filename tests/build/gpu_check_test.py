# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check` on a machine without a GPU: all but the GPU's part."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import gpu_check
import gpu_worker
import pytest

SCRIPT = pathlib.Path(gpu_check.__file__)


@pytest.fixture(autouse=True)
def clean_keras() -> None:
    """Overrides the fixture of the same name: no TensorFlow is needed here."""


def row(contender: str, forward: float | None, **fields: object) -> dict:
    """A row as gpu_worker.py makes it; `both` takes three times as long."""
    made = {
        "suite": "conv",
        "shape": "8x28x28x512->512",
        "precision": "float32",
        "contender": contender,
        "flop": {"forward": 4e9, "both": 12e9},
        "difference": {"output": 1e-6, "kernel": 3e-6},
        "error": None,
    }
    if forward is not None:
        for pass_, ms in (("forward", forward), ("both", 3 * forward)):
            made[pass_] = {
                "median_ms": ms,
                "q25_ms": 0.99 * ms,
                "q75_ms": 1.01 * ms,
            }
    return {**made, **fields}


def lines_about(text: str, rows: list[dict]) -> list[str]:
    return [line for line in gpu_check.judge(rows) if text in line]


# Without a GPU.


def test_says_in_one_line_what_is_missing():
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert re.search("Missing: a GPU", result.stderr)


def test_the_tree_can_travel():
    size = gpu_check.tree_mib()
    if size is None:
        pytest.skip("no Git checkout")
    assert 0 < size < gpu_check.SIZE_LIMIT_MIB


# Goals.


@pytest.mark.parametrize(
    ("precision", "peer", "ours", "theirs", "is_met"),
    [
        ("float32", "torchvision", 1.0, 2.0, True),
        ("float32", "torchvision", 1.0, 1.99, False),
        ("tf32", "torchvision", 1.0, 2.5, True),
        ("float16", "torchvision", 1.0, 3.9, False),
        ("float16", "torchvision", 1.0, 4.1, True),
        ("bfloat16", "cudnn, plain", 1.59, 1.0, True),
        ("bfloat16", "cudnn, plain", 1.7, 1.0, False),
    ],
)
def test_goals_of_the_convolution(precision, peer, ours, theirs, is_met):
    rows = [
        row("tf_deform", ours, precision=precision),
        row(peer, theirs, precision=precision),
    ]
    found = lines_about(f"deformable convolution, {precision}, ", rows)
    assert len(found) == 2  # forward, forward + backward
    for line in found:
        assert line.startswith("met: " if is_met else "missed: ")
    others = [line for line in gpu_check.judge(rows) if line not in found]
    assert all(line.startswith("not measured: ") for line in others)
    assert ("MISSED" in gpu_check.table(rows, {})) != is_met


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_goal_of_pooling_is_about_psroi_alone(precision):
    rows = []
    for shape, theirs in (("psroi:1->2", 5.5), ("psroi:3->4,c1", 4.5)):
        fields = {"suite": "roi", "shape": shape, "precision": precision}
        rows += [row("tf_deform", 1, **fields)]
        rows += [row("torchvision", theirs, **fields)]
    fields = {"suite": "roi", "shape": "align:1->2", "precision": precision}
    rows += [row("tf_deform", 1, **fields), row("torchvision", 1, **fields)]
    for line in lines_about(f"PS-ROI pooling, {precision}, ", rows):
        assert line.startswith("missed: ")
        assert "4.50 to 5.50 times as fast as torchvision" in line
        assert "MISSED at psroi:3->4,c1 (4.50)" in line


def test_a_row_without_time_is_not_judged():
    rows = [row("tf_deform", 1.0), row("torchvision", None, error="wrong: x")]
    assert all(
        line.startswith("not measured: ") for line in gpu_check.judge(rows)
    )


# The table.


def cells(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    ]


def test_table():
    rows = [
        row("tf_deform", 0.5),
        row("torchvision", 1.25),
        row("cudnn, plain", 0.4),
        row("torchvision", None, precision="tf32", error="wrong: differs"),
        row("cudnn, plain", None, precision="tf32", error="RuntimeError: no"),
        row("tf_deform", None, precision="bfloat16"),
        row("tf_deform", 1, precision="tf32", difference={"output": None}),
        row("torchvision", 1, precision="float16", difference={}),
    ]
    header, rule, *body = cells(gpu_check.table(rows, {"float32": 16.0}))
    assert header == list(gpu_check.HEADER)
    assert all(len(line) == len(header) for line in [rule, *body])
    assert body[0][3:6] == ["0.500 (0.495-0.505)", "8 (50%)", ""]
    assert body[1][5] == "2.50 x as fast, met"
    assert body[2][5] == "1.25 x the time"  # no goal in float32
    assert body[0][-1] == "3.0e-06"
    assert body[3][3] == "WRONG" and body[4][3] == "ERROR"
    assert body[5][3] == "no time"
    assert body[6][4] == "4"  # its peak is not known
    assert body[6][-1] == "not finite" and body[7][-1] == ""


def test_noisy_timings_are_named():
    noisy = row("tf_deform", 1.0)
    noisy["both"]["q75_ms"] *= 1.2
    found = gpu_check.noisy([row("torchvision", 1.0), noisy])
    assert found == ["8x28x28x512->512, float32, forward + backward, tf_deform"]


# Time.


def test_budget():
    now = [100.0]
    budget = gpu_check.Budget(60, clock=lambda: now[0])
    assert budget.left() == 60
    now[0] += 25
    assert budget.left() == 35
    assert budget.left(reserve=10) == 25
    now[0] += 50
    assert budget.left() == 0


@pytest.mark.parametrize(
    ("seconds", "round_s", "expected"),
    [(10, 0.1, 30), (2, 0.1, 20), (0.5, 0.1, 5), (0.49, 0.1, 0), (-1, 0.1, 0)],
)
def test_repeats_are_dropped_before_rows(seconds, round_s, expected):
    assert gpu_worker.affordable_repeats(seconds, round_s, 30) == expected


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_run_shows_what_a_program_prints(capfd, tmp_path):
    results = []
    script = "print('result: 1'); print('one'); print('two'); exit(3)"
    status, last = gpu_check.run(
        python(script), 60, str(tmp_path / "log"), results.append
    )
    assert status == 3
    assert last == "one\ntwo\n" == (tmp_path / "log").read_text()
    assert results == ["1\n"]
    assert capfd.readouterr().out == "  one\n  two\n"


def test_run_ends_what_takes_too_long():
    script = "import time\nfor _ in range(600): print(1); time.sleep(0.1)"
    started = time.monotonic()
    status, last = gpu_check.run(python(script), 2)
    assert status is None
    assert last.startswith("1\n")
    assert time.monotonic() - started < 30


def test_run_ends_what_hangs():
    script = "import time; print(1); time.sleep(60)"
    started = time.monotonic()
    status, _ = gpu_check.run(python(script), 60, silence=2)
    assert status is not None and status < 0
    assert time.monotonic() - started < 30


# Sections.


def new_run(tmp_path, *arguments: str) -> gpu_check.Run:
    return gpu_check.Run(
        gpu_check.parse_arguments(["--out", str(tmp_path), *arguments])
    )


CRASHES_AT_THE_SECOND = """
import json, os, sys
job = json.loads(sys.argv[1])
if job["peaks"]:
    print("result:", json.dumps({"peaks": {"float32": 50.0}}), flush=True)
for unit in job["units"]:
    if unit[2] == "tf32":
        print("CUDA error: an illegal memory access", flush=True)
        os._exit(1)
    rows = ROWS
    print("result:", json.dumps({"unit": unit, "rows": rows}), flush=True)
"""


def test_a_kernel_that_crashes_costs_its_own_row(tmp_path, monkeypatch):
    rows = [row("tf_deform", 1.0), row("torchvision", 3.0)]
    script = CRASHES_AT_THE_SECOND.replace("ROWS", repr(rows))
    (tmp_path / "gpu_worker.py").write_text(script)
    monkeypatch.setattr(gpu_check, "HERE", str(tmp_path))
    check = new_run(tmp_path, "--shapes", "28x28")
    units = gpu_check.unit_list(check.options)
    assert [unit[2] for unit in units] == list(gpu_check.PRECISIONS)
    check.table(units)
    assert len(check.report["rows"]) == 2 * 3
    [error] = check.report["errors"]
    assert "8x28x28x512->512, tf32: " in error
    assert "illegal memory access" in error
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["peaks"] == {"float32": 50.0}
    assert len(stored["rows"]) == 2 * 3
    assert "3.00 x as fast" in (tmp_path / "table.md").read_text()


def test_without_time_everything_is_dropped_and_named(tmp_path):
    check = new_run(tmp_path, "--minutes", "0", "--shapes", "28x28", "align")
    units = gpu_check.unit_list(check.options)
    check.table(units)
    assert len(check.report["dropped"]) == len(units) == 4 + 2 * 3


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
    assert gpu_check.few(listed, 2) == [*listed[:2], *listed[3:5]]


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


def test_shapes_are_those_of_the_benchmark():
    for suite, shapes in [
        *gpu_check.SHAPES.items(),
        *gpu_check.EMULATED_SHAPES.items(),
    ]:
        for shape in shapes:
            case = gpu_worker.parse_case(suite, shape)
            assert str(case) == shape
            if suite == "conv":
                # torchvision and cuDNN pad both sides alike.
                assert all(one == two for one, two in case.padding)


def test_results_and_precisions_of_both_scripts_agree():
    assert gpu_check.RESULT == gpu_worker.RESULT
    assert gpu_check.PRECISIONS == tuple(gpu_worker.PRECISIONS)
    assert tuple(gpu_check.PASSES) == gpu_worker.PASSES


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch not installed"
)
def test_the_whole_table_emulated(tmp_path):
    arguments = ["--emulate", "--only", "table", "--repeats", "5"]
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "results.json").read_text())
    ours = [r for r in report["rows"] if r["contender"] == "tf_deform"]
    assert len(ours) == 4 + 3 + 3
    assert all("both" in row for row in report["rows"])
