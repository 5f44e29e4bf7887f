# SPDX-License-Identifier: Apache-2.0
"""Tests and times the CUDA kernels on a machine without TensorFlow.

    python3 benchmarks/gpu_check.py

needs a GPU, nvcc and PyTorch, and ends within ten minutes. See "On a GPU" in
README.md in this folder.
"""

import argparse
import collections
import contextlib
import ctypes
import datetime
import glob
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HERE = os.path.join(ROOT, "benchmarks")
SECTIONS = ("tests", "memcheck", "table", "racecheck")
RESULT = "result: "  # what gpu_worker.py's results begin with
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
# ROI pooling has no matrix product that tf32 could round.
SHAPES = {
    "conv": (
        "64x14x14x512->512",
        "8x28x28x512->512",
        "8x56x56x256->256",
        "2x100x168x256->256",
    ),
    "roi": (
        "psroi:2x38x63x1029->300x7x7x21",
        "psroi:2x38x63x1029->300x7x7x21,c1",
        "psroi:2x38x63x1029->300x7x7x21,c21",
        "psroi:2x38x63x1029->2000x7x7x21",
        "psroi:2x38x63x1029->2000x7x7x21,c1",
        "psroi:2x38x63x1029->2000x7x7x21,c21",
        "align:2x50x64x256->512x7x7x256",
        "align:2x50x64x256->512x7x7x256,c1",
    ),
}
# In no time on a CPU: for `--emulate`.
EMULATED_SHAPES = {
    "conv": ("2x5x7x8->12,s2,og2",),
    "roi": ("psroi:2x11x13x54->9x3x3x6,c2,s2", "align:2x11x13x6->9x3x3x6"),
}
PASSES = {"forward": "forward", "both": "forward + backward"}

# What has to be left, in seconds, for what comes after a section.
TABLE_S = 150
LAST_S = 10
# No comparison takes so long: the GPU hangs.
SILENCE_S = 120
# The tools slow every kernel down by a factor of ten and more.
CHECK_S = {"memcheck": 100, "racecheck": 60}
# Of the parametrised cases of a test, the first so many.
CHECK_CASES = {"memcheck": 2, "racecheck": 1}
CHECK_FAILED = 86  # compute-sanitizer's exit status for what it finds
SIZE_LIMIT_MIB = 64  # of the tree that travels to a machine with a GPU
NOISE = 0.15


# Goals.


class Goal:
    """A bound on the time of a peer next to ours.

    A gain is the peer's time divided by ours, at least the bound; a cost is
    ours divided by the peer's, at most the bound.
    """

    def __init__(
        self, title: str, prefix: str, precision: str, peer: str, bound: float
    ):
        self.title = title
        self.prefix = prefix  # of shapes
        self.precision = precision
        self.peer = peer
        self.bound = bound

    @property
    def is_cost(self) -> bool:
        return self.peer != "torchvision"

    def covers(self, row: Mapping[str, Any]) -> bool:
        """Whether it is about the row of that peer."""
        has_prefix = row["shape"].startswith(self.prefix or tuple("0123456789"))
        return (
            has_prefix
            and row["precision"] == self.precision
            and row["contender"] == self.peer
        )

    def is_met(self, ratio: float) -> bool:
        return ratio <= self.bound if self.is_cost else ratio >= self.bound


_CONVOLUTION = "deformable convolution"
_CUDNN = "cudnn, plain"
GOALS = (
    Goal(_CONVOLUTION, "", "float32", "torchvision", 2),
    Goal(_CONVOLUTION, "", "tf32", "torchvision", 2),
    Goal(_CONVOLUTION, "", "float16", "torchvision", 4),
    Goal(_CONVOLUTION, "", "bfloat16", _CUDNN, 1.6),
    Goal("PS-ROI pooling", "psroi:", "float32", "torchvision", 5),
    Goal("PS-ROI pooling", "psroi:", "float16", "torchvision", 5),
)


def ratios(
    rows: list[dict[str, Any]], goal: Goal, pass_: str
) -> dict[str, float]:
    """By shape: gain or cost of ours next to the goal's peer."""
    ours = {
        (row["shape"], row["precision"]): row[pass_]["median_ms"]
        for row in rows
        if row["contender"] == "tf_deform" and pass_ in row
    }
    found = {}
    for row in rows:
        key = row["shape"], row["precision"]
        if pass_ in row and key in ours and goal.covers(row):
            ratio = ours[key] / row[pass_]["median_ms"]
            found[row["shape"]] = ratio if goal.is_cost else 1 / ratio
    return found


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """A line for every goal and pass: met, missed, or not measured."""
    lines = []
    for goal in GOALS:
        for pass_, title in PASSES.items():
            what = f"{goal.title}, {goal.precision}, {title}"
            found = ratios(rows, goal, pass_)
            if goal.is_cost:
                text, worst = f"times the time of {goal.peer}", max
                aim = f"at most {goal.bound:g}"
            else:
                text, worst = f"times as fast as {goal.peer}", min
                aim = f"at least {goal.bound:g}"
            if not found:
                lines.append(f"not measured: {what} (goal: {aim} {text})")
                continue
            missed = [
                f"{shape} ({ratio:.2f})"
                for shape, ratio in found.items()
                if not goal.is_met(ratio)
            ]
            verdict = f"MISSED at {', '.join(missed)}" if missed else "met"
            lines.append(
                f"{'missed' if missed else 'met'}: {what}: "
                f"{min(found.values()):.2f} to {max(found.values()):.2f} "
                f"{text}; worst at {worst(found, key=found.get)}; goal: {aim}, "
                f"{verdict}"
            )
    return lines


# The table.

HEADER = ("shape", "precision", "contender")
HEADER += ("forward ms (25-75 %)", "TFLOP/s (of peak)", "tf_deform is")
HEADER += ("fwd+bwd ms (25-75 %)", "TFLOP/s (of peak)", "tf_deform is")
HEADER += ("largest difference",)


def _comparison(row: dict[str, Any], pass_: str, ours: float | None) -> str:
    if row["contender"] == "tf_deform" or not ours:
        return ""
    ratio = ours / row[pass_]["median_ms"]
    text = f"{ratio:.2f} x the time"
    if row["contender"] == "torchvision":
        ratio = 1 / ratio
        text = f"{ratio:.2f} x as fast"
    for goal in GOALS:
        if goal.covers(row):
            text += ", met" if goal.is_met(ratio) else ", MISSED"
    return text


def _times(
    row: dict[str, Any], pass_: str, ours: float | None, peak: float | None
) -> list[str]:
    if pass_ not in row:
        return ["no time", "", ""]
    spent = row[pass_]
    middle = spent["median_ms"]
    rate = ""
    if row["flop"][pass_]:
        reached = row["flop"][pass_] / middle / 1e9
        rate = f"{reached:.3g}" + (f" ({reached / peak:.0%})" if peak else "")
    return [
        f"{middle:.3f} ({spent['q25_ms']:.3f}-{spent['q75_ms']:.3f})",
        rate,
        _comparison(row, pass_, ours),
    ]


def table(rows: list[dict[str, Any]], peaks: Mapping[str, float]) -> str:
    """All rows as Markdown."""
    ours = {
        (row["shape"], row["precision"], pass_): row[pass_]["median_ms"]
        for row in rows
        for pass_ in PASSES
        if row["contender"] == "tf_deform" and pass_ in row
    }
    lines = [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    for row in rows:
        shape, precision = row["shape"], row["precision"]
        cells = [shape, precision, row["contender"]]
        for pass_ in PASSES:
            if row["error"]:
                is_wrong = row["error"].startswith("wrong:")
                cells += ["WRONG" if is_wrong else "ERROR", "", ""]
            else:
                cells += _times(
                    row,
                    pass_,
                    ours.get((shape, precision, pass_)),
                    peaks.get(precision),
                )
        values = row["difference"].values()
        if None in values:  # JSON has no number for it
            cells.append("not finite")
        else:
            cells.append(f"{max(values):.1e}" if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def noisy(rows: list[dict[str, Any]]) -> list[str]:
    """Timings whose quartiles are far apart."""
    return [
        f"{row['shape']}, {row['precision']}, {title}, {row['contender']}"
        for row in rows
        for pass_, title in PASSES.items()
        if pass_ in row
        and row[pass_]["q75_ms"] - row[pass_]["q25_ms"]
        > NOISE * row[pass_]["median_ms"]
    ]


def document(report: dict[str, Any]) -> str:
    """The whole result as Markdown."""
    machine, versions = report["machine"], report["versions"]
    lines = [f"`{report['command']}`, {report['date'][:10]}:"]
    if report["emulated"]:
        lines.append("EMULATED on the CPU: times and goals mean nothing.")
    lines.append(
        f"{machine.get('gpu')} (compute capability "
        f"{machine.get('capability')}, driver {machine.get('driver')}); nvcc "
        f"{machine.get('nvcc')}, "
        + ", ".join(f"{name} {value}" for name, value in versions.items())
    )
    if report["peaks"]:
        rates = ", ".join(f"{k} {v:.3g}" for k, v in report["peaks"].items())
        lines.append(f"Peak (a large matrix product, TFLOP/s): {rates}.")
    lines.append("")
    if report["rows"]:
        lines += [table(report["rows"], report["peaks"]), ""]
        lines += [f"- {line}" for line in judge(report["rows"])]
    if found := noisy(report["rows"]):
        shown = "; ".join(found[:4]) + ("; ..." if found[4:] else "")
        lines.append(
            f"- NOISE: quartiles more than {NOISE:.0%} of the median apart in "
            f"{len(found)} timings: {shown}"
        )
    if eager := [r for r in report["rows"] if r.get("mode") == "launches"]:
        lines.append(
            f"- {len(eager)} rows are times of launches, not of CUDA graphs: "
            "they contain what the host needs if that is longer"
        )
    lines += [
        f"- {section}: {text}" for section, text in report["sections"].items()
    ]
    lines += [f"- dropped: {text}" for text in report["dropped"]]
    lines += [f"- ERROR {text}" for text in failures(report)]
    return "\n".join(lines) + "\n"


def failures(report: dict[str, Any]) -> list[str]:
    """Everything that makes the run a failure."""
    return report["errors"] + [
        f"{row['shape']}, {row['precision']}, {row['contender']}: "
        f"{row['error']}"
        for row in report["rows"]
        if row["error"]
    ]


# Time.


class Budget:
    """How long the run may still take."""

    def __init__(
        self, seconds: float, clock: Callable[[], float] = time.monotonic
    ):
        self._clock = clock
        self._end = clock() + seconds

    def left(self, reserve: float = 0) -> float:
        """Seconds, less what later sections need; at least 0."""
        return max(0.0, self._end - self._clock() - reserve)


def run(
    command: list[str],
    seconds: float,
    log: str | None = None,
    on_line: Callable[[str], None] | None = None,
    silence: float = math.inf,
    **environment: str,
) -> tuple[int | None, str]:
    """Runs a program and shows what it prints, as it comes.

    Returns its exit status, or None if it was ended for want of time, and the
    last lines. It is also ended, with all its children, if it says nothing
    for as many seconds as `silence`: a kernel that hangs does not come back.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    started = heard = time.monotonic()
    is_late = False
    done = threading.Event()

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def watch() -> None:
        nonlocal is_late
        while not done.wait(0.2):
            now = time.monotonic()
            is_late = now - started > seconds
            if is_late or now - heard > silence:
                end()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    last: collections.deque[str] = collections.deque(maxlen=40)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(log, "a")) if log else None
            for line in process.stdout:
                heard = time.monotonic()
                if on_line and line.startswith(RESULT):
                    # Libraries may have written into the middle of it.
                    with contextlib.suppress(json.JSONDecodeError):
                        on_line(line.removeprefix(RESULT))
                        continue
                last.append(line)
                print(f"  {line.rstrip()}", flush=True)
                if file:
                    file.write(line)
                    file.flush()
        status = process.wait()
    finally:
        done.set()
        watcher.join()
        if process.poll() is None:  # an interrupt: leave nothing behind
            end()
            process.wait()
    return None if is_late else status, "".join(last)


# The machine.


def gpus() -> int:
    """How many GPUs the driver offers; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def missing(options: argparse.Namespace) -> list[str]:
    """What is not on this machine, and has to be."""
    found = []
    if not options.emulate:
        if not gpus():
            found.append("a GPU with its driver")
        if not options.core and not builder().find_nvcc():
            found.append("nvcc")
    for package, title in (
        ("torch", "PyTorch"),
        ("numpy", "NumPy"),
        ("pytest", "pytest"),
    ):
        if importlib.util.find_spec(package) is None:
            found.append(title)
    return found


def builder() -> Any:
    """The module cc/build.py."""
    path = os.path.join(ROOT, "cc", "build.py")
    spec = importlib.util.spec_from_file_location("build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_match(command: list[str], pattern: str) -> str:
    """What the pattern's group matches in a program's output."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    match = re.search(pattern, result.stdout)
    return match[1].strip() if match else "unknown"


def tree_mib() -> float | None:
    """MiB of all tracked files; None outside a Git checkout."""
    try:
        names = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout.split(b"\0")
    except (OSError, subprocess.CalledProcessError):
        return None
    paths = [os.path.join(os.fsencode(ROOT), name) for name in names if name]
    sizes = [os.path.getsize(path) for path in paths if os.path.exists(path)]
    return sum(sizes) / 2**20


# Sections.


class Run:
    """What all sections share: options, time, and the report on disk."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.budget = Budget(60 * options.minutes)
        self.core = options.core and os.path.abspath(options.core)
        self.emulated = os.environ.get("TF_DEFORM_EMULATED_CORE")
        self.report: dict[str, Any] = {
            "complete": False,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(
                "T", "seconds"
            ),
            "command": shlex.join(
                ["python3", "benchmarks/gpu_check.py", *sys.argv[1:]]
            ),
            "emulated": options.emulate,
            "machine": {},
            "versions": {},
            "peaks": {},
            "sections": {},
            "rows": [],
            "dropped": [],
            "errors": [],
        }

    def path(self, name: str) -> str:
        return os.path.join(self.options.out, name)

    def save(self) -> None:
        """What there is so far: a run that is killed leaves it."""
        for name, text in (
            ("results.json", json.dumps(self.report, indent=1) + "\n"),
            ("table.md", document(self.report)),
        ):
            with open(self.path(f"{name}.new"), "w") as file:
                file.write(text)
            os.replace(self.path(f"{name}.new"), self.path(name))

    def say(self, text: str) -> None:
        left = self.budget.left()
        print(f"gpu-check, {left:.0f} s left: {text}", flush=True)

    def close(self, section: str, text: str, failed: bool = False) -> None:
        """Notes how a section went."""
        self.report["sections"][section] = text
        if failed:
            self.report["errors"].append(f"{section}: {text}")
        self.say(f"{section}: {text}")
        self.save()

    def environment(self) -> dict[str, str]:
        """For the tests and the worker: where kernels run, and which."""
        result = {"TF_DEFORM_TEST_GPU": "0" if self.options.emulate else "1"}
        if self.core:
            result["TF_DEFORM_CORE"] = self.core
        if self.emulated:
            result["TF_DEFORM_EMULATED_CORE"] = self.emulated
        return result

    def worker(
        self,
        seconds: float,
        on_result: Callable[[dict], None],
        silence: float = math.inf,
        **job: Any,
    ) -> tuple[int | None, str]:
        """Runs gpu_worker.py."""
        job |= {
            "device": "cpu" if self.options.emulate else "cuda",
            "eager": self.options.eager,
            "repeats": self.options.repeats,
            # Less than its limit: it ends by itself.
            "seconds": max(seconds - 5, 0.5),
        }
        return run(
            [
                sys.executable,
                os.path.join(HERE, "gpu_worker.py"),
                json.dumps(job),
            ],
            seconds,
            on_line=lambda line: on_result(json.loads(line)),
            silence=silence,
            **self.environment(),
        )

    def describe(self) -> bool:
        """Fills in the machine; False if PyTorch cannot use the GPU."""

        def on_result(result: dict[str, Any]) -> None:
            self.report["machine"] |= result["machine"]
            self.report["versions"] |= result["versions"]
            if reason := result["no_torchvision"]:
                self.report["dropped"].append(
                    f"torchvision's operators ({reason})"
                )

        machine = self.report["machine"]
        machine["driver"] = first_match(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv"],
            r"\n(.*)",
        )
        nvcc = builder().find_nvcc()
        machine["nvcc"] = (
            first_match([nvcc, "--version"], r"release ([\d.]+)")
            if nvcc
            else "none"
        )
        status, last = self.worker(
            self.budget.left(LAST_S), on_result, mode="describe"
        )
        if status != 0 or "error" in machine:
            text = machine.get("error") or f"exit status {status}: {last}"
            self.close("machine", text, failed=True)
            return False
        self.say(
            f"{machine['gpu']}, compute capability {machine['capability']}, "
            f"driver {machine['driver']}, nvcc {machine['nvcc']}, "
            + ", ".join(f"{k} {v}" for k, v in self.report["versions"].items())
        )
        return True

    def build(self) -> bool:
        """Makes the core, unless there is one."""
        folder = os.path.join(ROOT, "build", "gpu_check")
        os.makedirs(folder, exist_ok=True)
        core = os.path.join(folder, "_core.so")
        commands = []
        environment = {}
        if not self.core:
            command = [sys.executable, os.path.join(ROOT, "cc", "build.py")]
            command += ["--output", core]
            command += ["--objects", os.path.join(folder, "objects")]
            if self.options.emulate:
                environment["TF_DEFORM_NVCC"] = "0"
            elif not self.options.all_architectures:
                capability = self.report["machine"]["capability"]
                command += ["--architectures", capability.replace(".", "")]
            commands.append(command)
        if self.options.emulate and not self.emulated:
            self.emulated = os.path.join(folder, "emulated.so")
            script = f"import gpu; gpu.build_emulated({self.emulated!r})"
            commands.append([sys.executable, "-c", script])
            environment["PYTHONPATH"] = os.path.join(ROOT, "tests", "lib")
        if not commands:
            return True
        started = time.monotonic()
        status: int | None = 0
        for command in commands:
            if status == 0:
                status, _ = run(
                    command,
                    self.budget.left(LAST_S),
                    self.path("build.log"),
                    **environment,
                )
        spent = f"{time.monotonic() - started:.0f} s"
        if status == 0:
            self.core = self.core or core
            self.close("build", spent)
        else:
            how = "not finished" if status is None else "failed, see build.log"
            self.close("build", f"{how} ({spent})", failed=True)
        return status == 0

    def tests(self, files: list[str]) -> None:
        """Runs the device tests."""
        command = [*PYTEST, "--maxfail=20"]
        # Most of the time goes into what is expected, in NumPy.
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        reserve = TABLE_S + LAST_S if "table" in self.options.only else LAST_S
        status, last = run(
            [*command, *files],
            self.budget.left(reserve),
            self.path("tests.log"),
            **self.environment(),
        )
        summary = (last.strip().splitlines() or ["no output"])[-1].strip("= ")
        if status is None:
            self.close("tests", "not finished in time", failed=True)
        else:
            self.close("tests", summary, failed=status != 0)

    def check(self, tool: str, files: list[str]) -> None:
        """Runs a few of the tests under compute-sanitizer."""
        program = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if program is None:
            self.close(tool, "not run: no compute-sanitizer on this machine")
            return
        is_before_table = tool == "memcheck" and "table" in self.options.only
        reserve = TABLE_S + LAST_S if is_before_table else LAST_S
        seconds = min(CHECK_S[tool], self.budget.left(reserve))
        if seconds < 20:
            self.report["dropped"].append(f"{tool}: no time was left")
            self.close(tool, "not run: no time was left")
            return
        # Tests with tensors of gigabytes would take all the time.
        status, listed = run_quietly(
            [*PYTEST, "--collect-only", "-k", "not 32_bits", *files],
            60,
            **self.environment(),
        )
        chosen = few(listed.splitlines(), CHECK_CASES[tool])
        if status != 0 or not chosen:
            self.close(tool, "no tests could be collected", failed=True)
            return
        # Without its cache PyTorch gives every tensor an allocation of its
        # own, whose bounds are known. PyTorch itself asks the driver for what
        # may not be there: answers to that are no errors.
        command = [program, "--tool", tool, "--report-api-errors", "no"]
        command += ["--error-exitcode", str(CHECK_FAILED), "--print-limit", "9"]
        log = self.path(f"{tool}.log")
        status, _ = run(
            [*command, *PYTEST, *chosen],
            seconds,
            log,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            **self.environment(),
        )
        with open(log, errors="replace") as file:
            self.close(tool, *judge_check(status, file.read(), len(chosen)))

    def table(self, units: list[tuple[str, str, str]]) -> None:
        """Compares and times; a unit that ends the process costs its own."""
        waiting = list(units)

        def on_result(result: dict[str, Any]) -> None:
            if "peaks" in result:
                self.report["peaks"] = result["peaks"]
                return
            unit = tuple(result["unit"])
            waiting.remove(unit)
            rows = result["rows"]
            self.report["rows"] += rows
            lines = table(rows, self.report["peaks"]).splitlines()[2:]
            print("\n".join(lines), flush=True)
            if any(not row["error"] and "both" not in row for row in rows):
                self.report["dropped"].append(f"times of {', '.join(unit[1:])}")
            self.save()

        while waiting and self.budget.left(LAST_S) > 10:
            status, last = self.worker(
                self.budget.left(LAST_S),
                on_result,
                silence=SILENCE_S,
                mode="table",
                units=waiting,
                peaks=not self.report["peaks"],
            )
            if status == 0 or status is None:
                break
            # A kernel that fails takes the process down with it, and one that
            # hangs is ended: the next unit was the one.
            reason = (last.strip().splitlines() or ["no output"])[-1]
            what = ", ".join(waiting.pop(0)[1:]) if waiting else "the end"
            self.report["errors"].append(
                f"{what}: the process ended with exit status {status}: {reason}"
            )
            self.save()
        for unit in waiting:
            self.report["dropped"].append(f"{', '.join(unit[1:])}: no time")
        counted = len(units) - len(waiting)
        self.close("table", f"{counted} of {len(units)} comparisons")

    def profile(self, units: list[tuple[str, str, str]]) -> None:
        """One call of our kernels under Nsight Compute, if it is there."""
        program = shutil.which("ncu")
        if program is None:
            self.close("profile", "not run: no ncu on this machine")
            return
        job = {"mode": "once", "device": "cuda", "units": units[:1]}
        command = [program, "--clock-control", "none", "--kernel-name-base"]
        command += ["demangled", "--kernel-name", "regex:tf_deform"]
        for section in ("SpeedOfLight", "LaunchStats", "Occupancy"):
            command += ["--section", section]
        command += ["--section", "MemoryWorkloadAnalysis", sys.executable]
        command += [os.path.join(HERE, "gpu_worker.py"), json.dumps(job)]
        log = self.path("profile.log")
        status, _ = run(
            command, self.budget.left(LAST_S), log, **self.environment()
        )
        self.close("profile", f"exit status {status}; see profile.log")


PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


def run_quietly(
    command: list[str], seconds: float, **environment: str
) -> tuple[int, str]:
    """Like `run`, for output that is of no interest to the reader."""
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=max(seconds, 1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, ""
    return result.returncode, result.stdout


def few(lines: list[str], each: int) -> list[str]:
    """Node ids of the first cases of every test that pytest has listed."""
    chosen: dict[str, list[str]] = {}
    for line in lines:
        name, _, _ = line.partition("[")
        if "::" in name and " " not in name:
            cases = chosen.setdefault(name, [])
            if len(cases) < each:
                cases.append(line.strip())
    return [line for cases in chosen.values() for line in cases]


_FOUND = re.compile(r"=+ (Invalid|Error|Race|.*hazard)", re.MULTILINE)


def judge_check(
    status: int | None, printed: str, tests: int
) -> tuple[str, bool]:
    """What a run under compute-sanitizer says, and if that is a failure."""
    if "Device not supported" in printed:
        return "not run: the tool does not support this device", False
    summaries = re.findall(r"=+ (.*SUMMARY.*)", printed)
    if status is None:
        # The tool prints what it finds as it finds it.
        found = bool(_FOUND.search(printed))
        text = "errors until then" if found else "nothing found until then"
        return f"not finished in time; {text} ({tests} tests)", found
    text = summaries[-1] if summaries else f"exit status {status}"
    return f"{text} ({tests} tests)", status != 0


def unit_list(options: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(suite, shape, precision), in the order in which they are run."""
    shapes = EMULATED_SHAPES if options.emulate else SHAPES
    return [
        (suite, shape, precision)
        for suite in shapes
        for shape in shapes[suite]
        for precision in PRECISIONS
        if not (suite == "roi" and precision == "tf32")
        and any(text in shape for text in options.shapes)
        and precision in options.precisions
    ]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tests and times the CUDA kernels on a machine with a "
        "GPU, nvcc and PyTorch, and no TensorFlow."
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS)
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only shapes that contain one of these, such as psroi or 56x56",
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=9,
        help="the whole run's limit: repeats are dropped first, then what "
        "comes last (%(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--out",
        default=os.environ.get("OUT") or os.path.join(ROOT, "build/gpu_check"),
        help="folder of the results (default: $OUT or build/gpu_check)",
    )
    parser.add_argument(
        "--core", help="a core that is built already, by cc/build.py"
    )
    parser.add_argument(
        "--all-architectures",
        action="store_true",
        help="build for all GPUs that a release is for, not for this one only",
    )
    parser.add_argument(
        "--eager",
        action="store_true",
        help="time launches by the host, not CUDA graphs",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="the first of --shapes and --precisions under Nsight Compute, "
        "and nothing else",
    )
    parser.add_argument(
        "--emulate",
        action="store_true",
        help="try this script on the CPU, with emulated kernels; its times "
        "mean nothing",
    )
    return parser.parse_args(arguments)


def steps(
    check: Run, files: list[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Sections in their order; what comes last is dropped first."""
    units = unit_list(check.options)
    if check.options.profile:
        yield "profile", lambda: check.profile(units)
        return
    yield "tests", lambda: check.tests(files)
    yield "memcheck", lambda: check.check("memcheck", files)
    yield "table", lambda: check.table(units)
    yield "racecheck", lambda: check.check("racecheck", files)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if found := missing(options):
        print(
            "gpu-check: expected a machine with a GPU, nvcc and PyTorch. "
            f"Missing: {', '.join(found)}.",
            file=sys.stderr,
        )
        return 1
    os.makedirs(options.out, exist_ok=True)
    size = tree_mib()
    if size is not None and size > SIZE_LIMIT_MIB:
        print(
            f"gpu-check: the tree has {size:.0f} MiB, not 64", file=sys.stderr
        )
        return 1
    for log in glob.glob(os.path.join(options.out, "*.log")):
        os.remove(log)  # of the last run: logs are appended to
    check = Run(options)
    if check.describe() and check.build():
        files = sorted(
            os.path.relpath(path, ROOT)
            for path in glob.glob(f"{ROOT}/tests/core/*_cuda_test.py")
        )
        for section, step in steps(check, files):
            if section != "profile" and section not in options.only:
                continue
            if check.budget.left(LAST_S) < 10:
                check.report["dropped"].append(f"{section}: no time was left")
                continue
            check.say(f"{section} ...")
            step()
    check.report["complete"] = True
    check.save()
    print(f"\n{document(check.report)}", flush=True)
    return 1 if failures(check.report) else 0


if __name__ == "__main__":
    sys.exit(main())
