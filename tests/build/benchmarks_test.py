# SPDX-License-Identifier: Apache-2.0
"""Tests the benchmarks' harness: agreement, clocks, ratios, goals and tables.

Runs of the benchmarks are tested in `benchmark_runs_test.py`.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
import types
from unittest import mock

import contenders_torch
import numpy as np
import pytest
import report as reports
import run
import timing
import worker

ROOT = pathlib.Path(run.__file__).parents[1]


@pytest.fixture(autouse=True)
def clean_keras() -> None:
    """Overrides the fixture of the same name: no TensorFlow is needed here."""


def time_of(ms: float, ratio: float | None = None) -> dict:
    found = {"median_ms": ms, "q25_ms": 0.99 * ms, "q75_ms": 1.01 * ms}
    return found if ratio is None else found | {"ratio": ratio}


def make_row(contender: str, ms: float | None, **fields: object) -> dict:
    """Makes a row of a table; forward + backward takes three times as long."""
    row = {
        "op": "conv",
        "shape": "1x56x56x256->256",
        "contender": contender,
        "disagreement": {"output": 1e-6, "kernel": 3e-6},
        "errors": {},
        "extra_mib": {},
    }
    if ms is not None:
        row |= {"forward": time_of(ms), "both": time_of(3 * ms)}
    return {**row, **fields}


def with_ratios(rows: list[dict], ratio_to: str) -> list[dict]:
    """Adds the ratios of a table, at one shape and setting."""
    (reference,) = (row for row in rows if row["contender"] == ratio_to)
    for row in rows:
        for kind in ("forward", "both"):
            one, other = row[kind]["median_ms"], reference[kind]["median_ms"]
            row[kind]["ratio"] = one / other
    return rows


def make_report(rows: list[dict], **fields: object) -> dict:
    settings = {"baseline": "tf_deform", "dtype": "float32", "tolerance": 1e-4}
    return {"rows": rows, "settings": settings, "missing": {}, "errors": []} | (
        fields
    )


# Agreement.


def test_results_that_differ_are_named():
    expected = {"output": np.ones(8, "float32"), "kernel": np.ones(4)}
    result = {"output": expected["output"] + 2e-4, "kernel": np.ones(4)}
    found, error = timing.agree(result, expected, 1e-4)
    assert found["kernel"] == 0 and 1.9e-4 < found["output"] < 2.1e-4
    assert error == "differs from the baseline: output by 0.0002"
    assert timing.agree(result, expected, 1e-3)[1] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_agrees_with_nothing(value):
    broken = np.array([1, value], "float32")
    for result, expected in ((broken, np.ones(2)), (broken, broken)):
        _, error = timing.agree({"output": result}, {"output": expected}, 1e9)
        assert error


def test_a_difference_is_measured_in_units_of_the_root_mean_square():
    expected = np.array([3.0, -4.0, 3.0, -4.0])
    scale = math.sqrt(12.5)
    result = expected + [0, 0, 0, 0.5]
    assert timing.disagreement(result, expected) == pytest.approx(0.5 / scale)
    assert timing.disagreement(np.zeros(0), np.zeros(0)) == 0
    assert timing.disagreement(np.full(3, 0.25), np.zeros(3)) == 0.25


def test_results_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\). Received: \(1, 3\)"):
        timing.disagreement(np.zeros((1, 3)), np.zeros(3))


# Time.


def test_all_take_turns_in_random_order():
    calls: list[int] = []
    samplers = {k: lambda k=k: calls.append(k) or float(k) for k in range(4)}
    samples = timing.take_turns(samplers, 30)
    assert samples == {key: [key] * 30 for key in range(4)}
    rounds = [tuple(calls[i : i + 4]) for i in range(0, 120, 4)]
    assert all(set(one) == {0, 1, 2, 3} for one in rounds)
    assert len(set(rounds)) > 10


@pytest.mark.parametrize(("long_ms", "expected"), [(1e9, 10), (1e-9, 6)])
def test_an_untimed_call_comes_before_all_but_long_calls(
    monkeypatch, long_ms, expected
):
    monkeypatch.setattr(timing, "LONG_CALL_MS", long_ms)
    calls: list[None] = []
    samplers = timing.HostClock().samplers({0: lambda: calls.append(None)})
    timing.take_turns(samplers, 5)
    assert len(calls) == expected  # one call before it is known to be long


def test_medians_of_calls():
    calls = {
        "short": lambda: time.sleep(0.002),
        "long": lambda: time.sleep(0.02),
    }
    found = timing.medians(calls, 5, untimed=1)
    assert 2 <= found["short"] < found["long"]
    assert found["long"] >= 20


class FakeCuda:
    """Stands in for `torch.cuda`; a launch takes as long as `launch` says."""

    Stream = current_stream = stream = mock.MagicMock()
    synchronize = empty_cache = mock.MagicMock()

    def __init__(self, can_capture: bool):
        self.can_capture, self.now, self.captured = can_capture, 0.0, None

    def launch(self, ms: float) -> None:
        if self.captured is None:
            self.now += ms
        else:
            self.captured.append(ms)

    def Event(self, enable_timing: bool):
        event = types.SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "time", self.now)
        event.elapsed_time = lambda end: end.time - event.time
        return event

    def CUDAGraph(self):
        graph = types.SimpleNamespace()
        graph.replay = lambda: [self.launch(ms) for ms in graph.work]
        return graph

    @contextlib.contextmanager
    def graph(self, graph):
        if not self.can_capture:
            raise RuntimeError("cannot be captured\nno")
        self.captured = []
        yield
        graph.work, self.captured = self.captured, None


@pytest.mark.parametrize("mode", ["graph", "launches"])
def test_clock_of_a_gpu(monkeypatch, mode):
    cuda = FakeCuda(can_capture=mode == "graph")
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(timing, "WARM_UP_S", 0)
    clock = timing.CudaClock()
    times = {"long": 7.0, "short": 0.25, "none": 1e-9}
    samplers = clock.samplers(
        {name: lambda ms=ms: cuda.launch(ms) for name, ms in times.items()}
    )
    samples = timing.take_turns(samplers, 3)
    assert samples["long"] == pytest.approx([7.0] * 3)
    assert samples["short"] == pytest.approx([0.25] * 3)
    launches = {"long": 1, "short": 4, "none": timing.MOST_LAUNCHES}
    for name in samplers:
        expected = {"mode": mode, "launches": launches[name]}
        assert clock.describe(name) == expected


# Numbers.


@pytest.mark.parametrize("count", [6, 7, 9, 21, 40])
def test_interval_of_the_median_holds_what_it_promises(count):
    low, high = reports.interval(list(range(count)))
    assert low + high == count - 1  # the same rank from both ends

    # The interval from the k-th value misses the median if at most k - 1
    # values lie below it, or above it.
    def missed(k: int) -> float:
        return 2 * sum(math.comb(count, i) for i in range(k)) / 2**count

    k = int(low) + 1
    assert missed(k) <= 0.05 < missed(k + 1)


def test_interval_of_few_values_bounds_nothing():
    assert reports.interval([1.0] * 5) == (-math.inf, math.inf)
    assert reports.interval([3, 1, 2, 6, 5, 4]) == (1, 6)


def test_ratios_are_taken_round_by_round():
    found = reports.summary([2.0, 40.0, 6.0], [1.0, 10.0, 2.0])
    assert found["ratio"] == 3 and found["median_ms"] == 6
    assert found["ratio_by_round"] == {"median": 3, "q25": 2.5, "q75": 3.5}
    assert "ratio" not in reports.summary([1.0], None)


# Goals.


def notes_about(text: str, rows: list[dict], op: str, suite) -> list[str]:
    notes = reports.notes(make_report(rows), op, suite)
    return [note for note in notes if text in note and "Goals not" not in note]


CPU, GPU = worker.CPU_SUITES["conv"], contenders_torch.CONV


@pytest.mark.parametrize(
    ("setting", "peer", "ours", "theirs", "is_met"),
    [
        (2, "tf.nn.conv2d", 1.3, 1.0, True),
        (2, "tf.nn.conv2d", 1.36, 1.0, False),
        (2, "onnxruntime", 1.0, 1.25, True),
        (2, "onnxruntime", 1.0, 1.24, False),
        ("float32", "torchvision", 1.0, 2.0, True),
        ("float32", "torchvision", 1.0, 1.99, False),
        ("tf32", "torchvision", 1.0, 2.5, True),
        ("float16", "torchvision", 1.0, 3.9, False),
        ("float16", "torchvision", 1.0, 4.1, True),
        ("bfloat16", "cudnn, plain", 1.59, 1.0, True),
        ("bfloat16", "cudnn, plain", 1.7, 1.0, False),
    ],
)
def test_goals(setting, peer, ours, theirs, is_met):
    suite, place = (CPU, "threads") if setting == 2 else (GPU, "precision")
    rows = [
        make_row(name, ms, **{place: setting})
        for name, ms in (("tf_deform", ours), (peer, theirs))
    ]
    if peer == suite.ratio_to:
        with_ratios(rows, peer)
    # Peers on the CPU have no goal for forward + backward.
    kinds = ["forward", "forward + backward"]
    for kind in kinds[:1] if peer == "onnxruntime" else kinds:
        name = f"threads {setting}" if setting == 2 else setting
        text = f"tf_deform, {kind}, {name}: "
        (found, *_) = notes_about(text, rows, "conv", suite)
        assert "; goal: at" in found
        assert ("MISSED at 1x56x56x256->256" in found) != is_met
        assert found.endswith("met.") == is_met
    if suite is GPU:
        notes = reports.notes(make_report(rows), "conv", suite)
        assert not any("Goals not measured" in note for note in notes)
    else:  # With another number of threads there is no goal.
        for row in rows:
            row["threads"] = 1
        assert not notes_about("goal: at", rows, "conv", suite)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_goal_of_pooling_on_a_gpu_is_about_psroi_alone(precision):
    rows = []
    shapes = {"psroi:1x2x2x4->1x2x2x1": 5.5, "psroi:1x2x2x4->2x2x2x1": 4.5}
    for shape, theirs in (shapes | {"align:1x2x2x1->1x2x2x1": 1.0}).items():
        fields = {"op": "roi", "shape": shape, "precision": precision}
        rows.append(make_row("tf_deform", 1.0, **fields))
        rows.append(make_row("torchvision", theirs, **fields))
    suite = contenders_torch.POOLING
    psroi = notes_about("torchvision, psroi", rows, "roi", suite)
    assert len(psroi) == 2  # forward, forward + backward
    for note in psroi:
        assert "4.50 to 5.50 times as fast as torchvision" in note
        assert "MISSED at psroi:1x2x2x4->2x2x2x1 (4.50, not 5.00)" in note
    align = notes_about("torchvision, align", rows, "roi", suite)
    assert len(align) == 2 and not any("goal" in note for note in align)


def test_goals_that_were_not_measured_are_named():
    rows = [
        make_row("tf_deform", 1.0, precision="float32"),
        make_row(
            "torchvision",
            None,
            precision="float32",
            errors={"forward": "differs"},
        ),
    ]
    notes = reports.notes(make_report(rows), "conv", contenders_torch.CONV)
    assert notes[-1] == (
        "Goals not measured: forward, float32, torchvision (2); forward + "
        "backward, float32, torchvision (2)."
    )


def test_noisy_timings_are_named():
    noisy = make_row("tf_deform", 1.0, threads=2)
    noisy["both"]["q75_ms"] *= 1.2
    rows = [noisy, make_row("gather", 1.0, threads=2, shape="1x2x2x2->2")]
    (note,) = notes_about("NOISE", rows, "conv", worker.CPU_SUITES["conv"])
    assert "in 1 timings" in note
    assert note.endswith("ratios of 1x56x56x256->256 at threads 2.")


# Tables.


def cells_of(table: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.splitlines()
    ]


def test_table_of_a_gpu():
    flop = {"forward": 4e9, "both": 12e9}
    of_all = {"precision": "float32", "flop": flop}
    rows = with_ratios(
        [
            make_row("tf_deform", 0.5, **of_all),
            make_row("torchvision", 1.25, **of_all),
            make_row("cudnn, plain", 0.4, **of_all),
        ],
        "cudnn, plain",
    )
    of_all["precision"] = "tf32"
    rows += [
        make_row("tf_deform", 1.0, **of_all, disagreement={"output": None}),
        make_row("torchvision", None, **of_all, errors={"both": "wrong"}),
        make_row("cudnn, plain", 1.0, **of_all, disagreement={}),
        make_row("torchvision", None, **of_all, unsupported="bfloat16"),
    ]
    report = make_report(rows, device="cuda", peaks={"float32": 16.0})
    header, rule, *body = cells_of(reports.table(report, "conv"))
    assert header[:6] == [
        "shape",
        "precision",
        "contender",
        "forward ms (25-75 %)",
        "ratio",
        "TFLOP/s (of peak)",
    ]
    assert all(len(line) == len(header) for line in [rule, *body])
    assert len(body) == 6
    assert body[0][3:6] == ["0.500 (0.495-0.505)", "1.25", "8 (50%)"]
    assert body[1][4] == "3.12" and body[2][4] == "1.00"
    assert body[0][-1] == "3.0e-06"
    assert body[3][5] == "4"  # the peak is not known
    assert body[3][-1] == "not finite" and body[5][-1] == ""
    assert body[4][3] == "" and body[4][6] == "error"


def test_a_row_that_failed_is_an_error_of_the_run():
    rows = [make_row("gather", None, threads=2, errors={"forward": "wrong"})]
    assert reports.errors(make_report(rows)) == [
        "1x56x56x256->256, threads 2, gather, forward: wrong"
    ]


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("results.json", "conv"),
        ("results_kinds.json", "conv_kinds"),
        ("results_roi.json", "roi"),
    ],
)
def test_recorded_results_give_the_tables_of_the_page(name, op):
    recorded = json.loads((ROOT / "benchmarks" / name).read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert reports.table(recorded, op) in page
    text = reports.document(recorded, worker.CPU_SUITES)
    assert recorded["command"] in text and "Largest difference" in text


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "results.json"
    reports.save(str(path), {"rows": [1]})
    with pytest.raises(TypeError):
        reports.save(str(path), {"rows": object()})
    assert json.loads(path.read_text()) == {"rows": [1]}
    assert os.listdir(tmp_path) == ["results.json"]


# The other benchmarks.


def test_only_the_harness_holds_a_stopwatch():
    files = (ROOT / "benchmarks").glob("*.py")
    found = {f.name for f in files if "perf_counter" in f.read_text()}
    assert found == {"timing.py"}
