# SPDX-License-Identifier: Apache-2.0
"""The benchmark's harness: what it refuses, what it survives, what it says.

Children run a suite of toys, planted failures included, instead of operators.
"""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
import types

import against
import contenders_torch
import convolution
import gpu_check
import numpy as np
import processes
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
    """A row of a table; forward + backward takes three times as long."""
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
    """Adds what a table's ratios are, at one shape and setting."""
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
    """`torch.cuda` on which a launch takes as long as `launch` is told."""

    def __init__(self, can_capture: bool):
        self.now = 0.0
        self.captured = None
        self.is_capturing = False
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self):
                self.time = cuda.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.time - self.time

        class Stream:
            def wait_stream(self, other):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *_):
                pass

        class Graph:
            def __init__(self, graph):
                if not can_capture:
                    raise RuntimeError("cannot be captured\nno")
                self.graph = graph

            def __enter__(self):
                cuda.is_capturing, cuda.captured = True, []

            def __exit__(self, *_):
                cuda.is_capturing = False
                self.graph.work = cuda.captured

        class CUDAGraph:
            def replay(self):
                for ms in self.work:
                    cuda.launch(ms)

        self.Event, self.Stream, self.graph = Event, Stream, Graph
        self.CUDAGraph, self.stream = CUDAGraph, lambda stream: stream
        self.current_stream = Stream
        self.synchronize = self.empty_cache = lambda: None

    def launch(self, ms: float) -> None:
        if self.is_capturing:
            self.captured.append(ms)
        else:
            self.now += ms


@pytest.mark.parametrize(
    ("eager", "can_capture", "mode"),
    [
        (False, True, "graph"),
        (False, False, "launches"),
        (True, True, "launches"),
    ],
)
def test_clock_of_a_gpu(monkeypatch, eager, can_capture, mode):
    cuda = FakeCuda(can_capture)
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(timing, "WARM_UP_S", 0)
    clock = timing.CudaClock(eager)
    samplers = clock.samplers(
        {
            "long": lambda: cuda.launch(7.0),
            "short": lambda: cuda.launch(0.25),
            "none": lambda: cuda.launch(1e-9),
        }
    )
    samples = timing.take_turns(samplers, 3)
    assert samples["long"] == pytest.approx([7.0] * 3)
    assert samples["short"] == pytest.approx([0.25] * 3)
    launches = {name: clock.describe(name)["launches"] for name in samplers}
    assert launches == {"long": 1, "short": 4, "none": timing.MOST_LAUNCHES}
    assert {clock.describe(name)["mode"] for name in samplers} == {mode}


# Numbers.


@pytest.mark.parametrize("count", [6, 7, 9, 21, 40])
def test_interval_of_the_median_holds_what_it_promises(count):
    low, high = reports.interval(list(range(count)))
    assert low + high == count - 1  # the same from both ends

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


@pytest.mark.parametrize(
    ("peer", "ours", "theirs", "is_met"),
    [
        ("tf.nn.conv2d", 1.3, 1.0, True),
        ("tf.nn.conv2d", 1.36, 1.0, False),
        ("onnxruntime or openvino", 1.0, 1.25, True),
        ("onnxruntime or openvino", 1.0, 1.24, False),
    ],
)
def test_goals_on_the_cpu(peer, ours, theirs, is_met):
    contender = peer.split(" ")[0]
    rows = [
        make_row("tf_deform", ours, threads=2),
        make_row(contender, theirs, threads=2),
    ]
    if peer == "tf.nn.conv2d":
        with_ratios(rows, peer)
    suite = worker.CPU_SUITES["conv"]
    (found, *_) = notes_about(
        f"forward, threads 2: {ours / theirs:.2f}"
        if peer == "tf.nn.conv2d"
        else f"fast as {peer}",
        rows,
        "conv",
        suite,
    )
    assert ("MISSED at 1x56x56x256->256" in found) != is_met
    assert "; goal: at" in found
    # With another number of threads there is no goal.
    for row in rows:
        row["threads"] = 1
    assert not notes_about("goal: at", rows, "conv", suite)


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
def test_goals_on_a_gpu(precision, peer, ours, theirs, is_met):
    rows = [
        make_row("tf_deform", ours, precision=precision),
        make_row(peer, theirs, precision=precision),
    ]
    if peer == "cudnn, plain":
        with_ratios(rows, peer)
    suite = contenders_torch.CONV
    for kind in ("forward", "forward + backward"):
        text = f"tf_deform, {kind}, {precision}: "
        (found,) = notes_about(text, rows, "conv", suite)
        assert found.endswith("met.") == is_met
        assert ("MISSED at 1x56x56x256->256" in found) != is_met
    notes = reports.notes(make_report(rows), "conv", suite)
    assert not any("Goals not measured" in note for note in notes)


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
    assert body[3][5] == "4"  # its peak is not known
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


# Child processes.


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_run_program_returns_what_is_said():
    script = "print('one'); exit(3)"
    assert processes.run_program(python(script), 60) == (3, "one\n")


def test_run_program_ends_what_hangs_and_its_children(tmp_path):
    child = f"import time; time.sleep(4); open({str(tmp_path / 'x')!r}, 'w')"
    script = (
        "import subprocess, sys, time; print('begun', flush=True)\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert processes.run_program(python(script), 2) == (None, "begun\n")
    time.sleep(max(0.0, 7 - (time.monotonic() - started)))
    assert not (tmp_path / "x").exists()


# Toys: the shape says what goes wrong, and in whom.
TOYS = """
import dataclasses, os, re, sys, time
import numpy as np
from contenders import Contender, Suite, Unsupported

@dataclasses.dataclass(frozen=True)
class Case:
    text: str
    dtype: str = "float32"

    @classmethod
    def parse(cls, text, dtype, with_mask):
        if not re.fullmatch("[a-z]+[0-9]*", text):
            raise ValueError(f"Expected a toy. Received: {text}")
        return cls(text, dtype)

    def __str__(self):
        return self.text

@dataclasses.dataclass(frozen=True)
class Operands:
    inputs: np.ndarray

    @classmethod
    def random(cls, case):
        return cls(np.arange(1, 9, dtype=case.dtype))

class Ours(Contender):
    name = "tf_deform"

    def __init__(self, case, arrays, setting):
        self.case, self.inputs = case, arrays["inputs"]

    @classmethod
    def prepare(cls, case, operands):
        return {"inputs": operands.inputs}

    def forward(self):
        self.outputs()

    def both(self):
        self.outputs()

    def outputs(self):
        print("libraries print", flush=True)
        return 2 * self.inputs

    def gradients(self, kind="both"):
        return {"inputs": np.full_like(self.inputs, 2)}

class Built(Ours):
    def outputs(self):
        import tf_deform
        return tf_deform.double(self.inputs)

class Peer(Ours):
    def __init__(self, case, arrays, setting):
        super().__init__(case, arrays, setting)
        if case.text == "raise":
            raise RuntimeError("no such operator\\nat all")
        if case.text == "lacks":
            raise Unsupported("toys")
        if case.text == "crash":
            print("illegal memory access", file=sys.stderr, flush=True)
            os._exit(7)
        if case.text == "hang":
            time.sleep(600)

    def outputs(self):
        wrong = 0.01 * (self.case.text == "wrong")
        return super().outputs() + np.float32(wrong)

def suite(ours):
    return Suite(
        title="Toys", case=Case, operands=Operands,
        contenders={"tf_deform": (ours, ()), "peer": (Peer, ())},
        shapes=("right", "wrong", "raise", "lacks", "crash", "hang", "last"),
        quick_shapes=(), ratio_to="tf_deform", peers=(("peer",),),
        repeats=3, memory_repeats=0, memory_at_all_threads=True)
"""
# Of the shapes above, those that leave their process alive.
GOOD_TOYS = ["right", "wrong", "raise", "lacks", "last"]
CHILD = """
import sys
sys.path[:0] = {path!r}
import worker, toys
worker.CPU_SUITES.clear()
worker.CPU_SUITES["conv"] = toys.suite({ours})
worker.main()
"""


@pytest.fixture
def use_toys(tmp_path, monkeypatch):
    """Returns a function that puts toys in the operators' place."""

    def use(ours: str) -> None:
        folder = tmp_path / "toys"
        folder.mkdir()
        (folder / "toys.py").write_text(TOYS)
        path = [str(folder), str(ROOT / "benchmarks")]
        child = folder / "child.py"
        child.write_text(CHILD.format(path=path, ours=ours))
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "toys", raising=False)
        import toys

        suites = {"conv": toys.suite(toys.Ours)}
        monkeypatch.setattr(worker, "CPU_SUITES", suites)
        for module in (processes, against):
            monkeypatch.setattr(module, "WORKER", str(child))

    return use


def test_failures_cost_their_unit_and_no_more(tmp_path, use_toys, capsys):
    use_toys("toys.Ours")
    out = tmp_path / "out"
    status = run.main(["--threads", "1", "--timeout", "6", "--out", str(out)])
    assert status == 1
    report = json.loads((out / "results.json").read_text())
    assert report["complete"]
    rows = {(row["shape"], row["contender"]): row for row in report["rows"]}
    shapes = [shape for shape, _ in rows]
    assert shapes == [shape for shape in GOOD_TOYS for _ in range(2)]
    # A result that is wrong gets no time, the right ones beside it do.
    assert rows["wrong", "peer"]["errors"] == {
        "forward": "differs from the baseline: output by 0.00099"
    }
    assert "forward" not in rows["wrong", "peer"]
    assert "both" in rows["wrong", "peer"]
    assert "RuntimeError: no such operator" in str(rows["raise", "peer"])
    assert rows["lacks", "peer"]["unsupported"] == "toys"
    for shape in GOOD_TOYS:
        assert len(rows[shape, "tf_deform"]["forward"]["samples_ms"]) == 3
    assert rows["right", "peer"]["forward"]["ratio"] > 0
    # A crash and a hang cost one unit each.
    crash, hang = report["errors"]
    assert crash == (
        "crash, threads 1, float32: the process ended with exit status 7: "
        "illegal memory access"
    )
    assert hang == "hang, threads 1, float32: not finished after 6 s"
    table = (out / "table.md").read_text()
    assert table == capsys.readouterr().out
    assert "| wrong | 1 | peer | error |" in table
    assert "- Not supported by peer: toys." in table
    assert "- ERROR crash, threads 1" in table


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["conv"],
            ["right", "wrong", "raise", "lacks", "crash", "hang", "last"],
        ),
        (["ri", "la"], ["right", "lacks", "last"]),
    ],
)
def test_only_takes_operators_and_parts_of_shapes(use_toys, words, expected):
    use_toys("toys.Ours")
    options = run.parse_arguments(["--threads", "1", "--only", *words])
    assert [unit.shape for unit in options.units] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "right", "nothing"],
            "a part of a shape. Received: nothing",
        ),
        (["--shapes", "1x2"], "Expected a toy. Received: 1x2"),
        (["--threads", "9999"], "--threads 9999: this process may use"),
        (["--contenders", "peer", "who"], "who: not one of tf_deform, peer"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--emulate"], "go with --device cuda"),
        (["--against", "/nowhere"], "without tf_deform/_ops.so"),
    ],
)
def test_bad_arguments(use_toys, capsys, arguments, message):
    use_toys("toys.Ours")
    with pytest.raises(SystemExit) as error:
        run.parse_arguments(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_the_environment_names_no_folder_of_results(
    tmp_path, monkeypatch, use_toys
):
    use_toys("toys.Ours")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert run.main(["--threads", "1", "--only", "right"]) == 0
    assert not (tmp_path / "out").exists()


# Two builds side by side.


def make_tree(folder: pathlib.Path, double: str) -> pathlib.Path:
    """A tree with a package whose function is written in `double`."""
    package = folder / "tf_deform"
    package.mkdir(parents=True)
    (package / "_ops.so").touch()
    (package / "__init__.py").write_text(
        f"import os, time\ndef double(inputs):\n    {double}\n"
    )
    return folder


@pytest.fixture
def compare_builds(tmp_path, use_toys, monkeypatch):
    """Returns a function that compares two packages: status and report."""

    def compare(
        this: str, other: str, timeout: int = 60
    ) -> tuple[int, dict, str]:
        use_toys("toys.Built")
        this_tree = make_tree(tmp_path / "this", this)
        monkeypatch.setattr(against, "ROOT", str(this_tree))
        other_tree = make_tree(tmp_path / "other", other)
        out = tmp_path / "out"
        status = run.main(
            ["--threads", "1", "--only", "right", "--against", str(other_tree)]
            + ["--out", str(out), "--timeout", str(timeout)]
        )
        report = json.loads((out / "results.json").read_text())
        return status, report, (out / "table.md").read_text()

    return compare


RIGHT = "return 2 * inputs"
SLOW = "time.sleep(0.01); return 2 * inputs"


def test_a_slower_build_is_found(compare_builds):
    status, report, text = compare_builds(SLOW.replace("0.01", "0.02"), SLOW)
    assert status == 0  # times are no failure
    assert [row["kind"] for row in report["rows"]] == ["forward", "both"]
    for row in report["rows"]:
        low, high = row["interval"]
        assert 1.5 < low <= row["this"]["ratio_by_round"]["median"] <= high
        assert len(row["this"]["samples_ms"]) == run.AGAINST_REPEATS
    bits, mean, slower = text.splitlines()[-3:]
    assert bits == "- Results are equal to the bit in all 2 rows."
    assert "MISSED" in mean
    assert "above 1.02: right, threads 1, forward (" in slower


def test_a_build_is_not_slower_than_a_slower_one(compare_builds):
    _, _, text = compare_builds(SLOW, SLOW.replace("0.01", "0.02"))
    assert "(goal: at most 1.01, met)" in text
    assert text.endswith("lies wholly above 1.02: none.\n")


def test_other_bits_are_named_and_other_results_refused(compare_builds):
    other = "return 2 * inputs * type(inputs[0])(1 + 1e-6)"
    status, report, text = compare_builds(RIGHT, other)
    assert status == 0
    # The gradients of the toys come from elsewhere.
    assert [row["equal_bits"] for row in report["rows"]] == [False, True]
    assert "DIFFER in 1 of 2 rows" in text


def test_a_build_whose_results_are_wrong_is_not_timed(compare_builds):
    status, report, text = compare_builds(RIGHT, "return 2.01 * inputs")
    assert status == 1
    assert (
        "ERROR right, threads 1, tf_deform, forward: differs from the "
        "baseline: forward output by 0.0"
    ) in text
    timed = {row["kind"]: "interval" in row for row in report["rows"]}
    assert timed == {"forward": False, "both": True}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("os._exit(3)", "the process ended: "),
        ("raise OSError('no such file')", "the process ended: OSError: no"),
        ("time.sleep(600)", "not finished after 6 s"),
    ],
)
def test_a_build_that_fails_costs_its_unit(compare_builds, other, message):
    status, report, text = compare_builds(RIGHT, other, timeout=6)
    assert status == 1 and report["rows"] == []
    assert f"- ERROR right, threads 1: {message}" in text


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
        (["psroi", "profile"], ["profile"], ["psroi"], []),
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


def test_shapes_for_a_gpu():
    for suite in contenders_torch.SUITES.values():
        for shape in (*suite.shapes, *suite.quick_shapes):
            case = suite.case.parse(shape, "float32", True)
            assert str(case) == shape
            if suite.case is convolution.Case:
                # torchvision and cuDNN pad both sides alike.
                assert all(one == two for one, two in case.padding)


def test_every_precision_has_a_tolerance():
    assert tuple(contenders_torch.PRECISIONS) == run.PRECISIONS
    assert set(run.PRECISIONS) <= set(timing.TOLERANCES)


CRASHES_IN_TF32 = """
import json, os, sys
job = json.loads(sys.argv[1])
if job["mode"] == "describe":
    machine = {"gpu": "toy", "capability": "9.0"}
    print(json.dumps({"machine": machine, "versions": {"torch": "0"}}))
    print(json.dumps({"peaks": {"float32": 50.0}}), flush=True)
    os._exit(0)
for precision in job["precisions"]:
    if precision == "tf32":
        print("CUDA error: an illegal memory access", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    rows = [row | {"precision": precision} for row in ROWS]
    print(json.dumps({"precision": precision, "rows": rows}), flush=True)
"""


def test_a_kernel_that_crashes_costs_its_own_rows(tmp_path, monkeypatch):
    rows = [make_row("tf_deform", 1.0), make_row("torchvision", 3.0)]
    for row in rows:
        del row["op"], row["shape"], row["extra_mib"]
    child = tmp_path / "child.py"
    child.write_text(CRASHES_IN_TF32.replace("ROWS", repr(rows)))
    monkeypatch.setattr(processes, "WORKER", str(child))
    arguments = ["--device", "cuda", "--only", "28x28", "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    report = json.loads((tmp_path / "results.json").read_text())
    assert len(report["rows"]) == 2 * 3
    (error,) = report["errors"]
    assert "8x28x28x512->512, tf32: " in error
    assert "illegal memory access" in error
    assert report["peaks"] == {"float32": 50.0}
    table = (tmp_path / "table.md").read_text()
    assert "3.00 to 3.00 times as fast as torchvision" in table
    assert "EMULATED" not in table


@pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch not installed"
)
def test_the_whole_table_emulated(tmp_path):
    arguments = ["--emulate", "--only", "table", "--repeats", "5"]
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


# The other benchmarks.


def test_only_the_harness_holds_a_stopwatch():
    files = (ROOT / "benchmarks").glob("*.py")
    found = {f.name for f in files if "perf_counter" in f.read_text()}
    assert found == {"timing.py"}
