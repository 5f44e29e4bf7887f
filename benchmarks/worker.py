# SPDX-License-Identifier: Apache-2.0
"""Checks, times and measures memory in a child process of the benchmark.

`run.py` starts it with a JSON job as its only argument. Every result is a line
of JSON on the standard output, printed as soon as it is known; output of
libraries goes to the standard error.
"""

import ctypes
import gc
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any

import convolution
import numpy as np
import roi_pooling
from contenders import (
    Contender,
    Setting,
    Suite,
    Unsupported,
    configure_tensorflow,
)
from report import KINDS, TIMED_KINDS, summary
from timing import (
    TOLERANCES,
    CudaClock,
    HostClock,
    agree,
    first_line,
    take_turns,
)

CPU_SUITES = {
    "conv": convolution.SUITE,
    "conv_kinds": convolution.KINDS_SUITE,
    "roi": roi_pooling.SUITE,
}
Results = dict[str, np.ndarray]
Calls = dict[tuple[str, str], Callable[[], Any]]  # by contender and kind


def suites(device: str) -> dict[str, Suite]:
    """Returns the suites for a CPU or for CUDA."""
    if device == "cpu":
        return CPU_SUITES
    import contenders_torch

    return contenders_torch.SUITES


def pin(threads: int) -> None:
    """Keeps this process on `threads` processors, from different cores first.

    Pools differ in whether the caller counts as a worker, so the same setting
    can mean one thread more in one framework than in another; a number of
    processors means the same to all frameworks. The function must be called
    before any framework starts its threads.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    taken: dict[str, int] = {}
    ranked = []
    for cpu in sorted(os.sched_getaffinity(0)):
        path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings"
        try:
            with open(path, encoding="ascii") as file:
                core = file.read()
        except OSError:
            core = str(cpu)
        taken[core] = taken.get(core, 0) + 1
        ranked.append((taken[core], cpu))
    os.sched_setaffinity(0, [cpu for _, cpu in sorted(ranked)[:threads]])


def start_frameworks(
    suite: Suite, names: list[str], threads: int
) -> dict[str, str]:
    """Imports the contenders' packages; returns reasons why some cannot run."""
    missing = {}
    for name in names:
        for package in suite.contenders[name][1]:
            try:
                importlib.import_module(package)
            # A package may raise any error on import: for example, it may
            # refuse to load next to the wrong TensorFlow. All other contenders
            # can still be compared.
            except Exception as error:
                missing[name] = f"cannot be imported: {first_line(error)}"
                if getattr(error, "name", None) == package:
                    missing[name] = (
                        "not installed: pip install 'tf-deform[benchmark]'"
                    )
                break
            if package == "tensorflow":
                # Both pools have the size of TensorFlow's own default.
                configure_tensorflow(threads, threads)
    return missing


def results_of(contender: Contender, kind: str) -> Results:
    """Returns the output, or the gradients by operand."""
    if kind == "forward":
        return {"output": contender.outputs()}
    return contender.gradients(kind)


class Unit:
    """Holds a shape: its operands, contenders and expected results."""

    def __init__(self, job: dict[str, Any], names: list[str]):
        self._job, self._names = job, names
        self.suite = suites(job["device"])[job["op"]]
        self.case = self.suite.case.parse(
            job["shape"], job["dtype"], job["mask"]
        )
        self.operands = self.suite.operands.random(self.case)
        self.clock = HostClock()
        if job["torch_device"] == "cuda":
            self.clock = CudaClock()
        self._expected: dict[tuple[bool, str], Results] = {}

    def build(
        self, make: type[Contender], precision: str, operands: Any
    ) -> Contender:
        threads, device = self._job["threads"], self._job["torch_device"]
        arrays = make.prepare(self.case, operands)
        return make(self.case, arrays, Setting(threads, precision, device))

    def expected(self, deformable: bool, kind: str) -> Results:
        """Returns the oracle's results; with zero offsets if not deformable."""
        # Not every oracle has a backward pass alone; the gradients are the
        # same.
        key = deformable, "both" if kind == "backward" else kind
        if key not in self._expected:
            make = self.suite.oracle
            if make is None:
                make = self.suite.contenders[self._job["baseline"]][0]
            operands = self.operands
            if not deformable:
                operands = operands.undeformed()
            oracle = self.build(make, self.case.dtype, operands)
            self._expected[key] = results_of(oracle, key[1])
        return self._expected[key]

    def check(
        self, contender: Contender, kind: str, precision: str
    ) -> tuple[dict[str, float], str | None]:
        """Compares a contender; returns (disagreements, error or None)."""
        if contender.agreement == "none":
            return {}, None
        results = results_of(contender, kind)
        expected = self.expected(contender.deformable, kind)
        found, error = agree(results, expected, TOLERANCES[precision])
        return found, error if contender.agreement == "required" else None

    def compare(
        self, name: str, precision: str
    ) -> tuple[dict[str, Any], Calls]:
        """Returns a contender's row, and the calls that may be timed."""
        row: dict[str, Any] = {"contender": name, "precision": precision}
        differences = row["disagreement"] = {}
        errors = row["errors"] = {}
        if hasattr(self.case, "product_flop"):
            work = self.case.product_flop
            row["flop"] = {"forward": work, "both": 3 * work}
        calls: Calls = {}
        try:
            make = self.suite.contenders[name][0]
            contender = self.build(make, precision, self.operands)
        except Unsupported as reason:
            return row | {"unsupported": str(reason)}, calls
        # A contender's failure ends its row, not the run.
        except Exception as error:
            errors["forward"] = first_line(error)
            self.clock.synchronize()  # a failed device ends the process here
            return row, calls
        if hasattr(contender, "workspace_mib"):
            row["workspace_mib"] = contender.workspace_mib
        for kind in TIMED_KINDS:
            call = getattr(contender, kind)
            if call is None:
                continue
            try:
                found, error = self.check(contender, kind, precision)
            except Exception as failure:
                found, error = {}, first_line(failure)
                self.clock.synchronize()
            for result, value in found.items():
                differences[result] = max(value, differences.get(result, 0.0))
            if error:
                errors[kind] = error
            else:
                calls[name, kind] = call
        return row, calls

    def time(self, precision: str) -> list[dict[str, Any]]:
        """Checks all contenders, then times them in turns; a row for each."""
        rows, calls, of_row = {}, {}, {}
        for name in self._names:
            rows[name], of_row = self.compare(name, precision)
            calls |= of_row
        samples = take_turns(self.clock.samplers(calls), self._job["repeats"])
        for (name, kind), times in samples.items():
            # Divides the time of backward alone by the same contender's
            # forward.
            alone = kind == "backward"
            reference = (
                (name, "forward") if alone else (self.suite.ratio_to, kind)
            )
            rows[name][kind] = summary(
                times, samples.get(reference)
            ) | self.clock.describe((name, kind))
        for row in rows.values():
            row["disagreement"] = {  # JSON has no infinity
                result: value if math.isfinite(value) else None
                for result, value in row["disagreement"].items()
            }
        del calls, of_row
        self.clock.free()
        return list(rows.values())


# Measures the peak extra memory of a contender, in a process of its own.
#
# The peak is the highest resident size of the process during the calls (VmHWM,
# whose counter is reset just before) minus the resident size with the operands
# in memory and nothing built (VmRSS). So it contains
# - the results: the output, and for forward + backward all gradients too;
# - everything that the calls hold at the same time: scratch of the kernels,
#   intermediate tensors, data that autodiff keeps from forward for backward;
# - data that setting up leaves: the traced graph, the session and its buffers;
# - memory that allocators and frameworks keep or waste, if it is touched;
# and it does not contain
# - the operands, in the contender's own layout, the kernel only once;
# - code, thread stacks and pools, which a call on a tiny map loads first;
# - memory that setting up needs for a moment only.
# Both counters count touched pages only, in the kernel's own rough steps, and a
# framework's housekeeping varies: one or two MiB mean nothing.
def peak_extra_memory(job: dict[str, Any], name: str) -> dict[str, float]:
    """Returns MiB by kind, if the system tells them and nothing fails."""
    suite = suites(job["device"])[job["op"]]
    case = suite.case.parse(job["shape"], job["dtype"], job["mask"])
    setting = Setting(job["threads"], job["dtype"])
    make = suite.contenders[name][0]
    result: dict[str, float] = {}
    try:
        tiny = case.tiny()
        operands = suite.operands.random(tiny)
        warm_up = make(tiny, make.prepare(tiny, operands), setting)
        kinds = [kind for kind in KINDS if getattr(warm_up, kind)]
        for kind in kinds:
            getattr(warm_up, kind)()
        del warm_up, operands
        arrays = make.prepare(case, suite.operands.random(case))
        _return_free_memory()
        before = _status("VmRSS")
        contender = make(case, arrays, setting)
        del arrays  # an engine with its own copy of the kernel needs no other
        _return_free_memory()
        # Both kinds start alike: forward + backward reuses memory that forward
        # leaves in an allocator, and this memory must count there again.
        for kind in kinds:
            call = getattr(contender, kind)
            _reset_peak()
            for _ in range(3):
                call()
            result[kind] = (_status("VmHWM") - before) / 1024
    except Unsupported:
        pass
    # Errors are reported where results are compared; memory is then n/a.
    except Exception as error:
        print(f"failed: {first_line(error)}", file=sys.stderr, flush=True)
    return result


def _status(field: str) -> int:
    """Reads a field of this process's status, in KiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(rf"^{field}:\s+(\d+)", file.read(), re.M)[1])


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _return_free_memory() -> None:
    """Returns freed heap to the system: calls could reuse it uncounted."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


# The functions below are the jobs, by the job's mode. `emit` prints a result.


def describe_gpu(job: dict[str, Any], emit: Callable[..., None]) -> None:
    import contenders_torch

    device = job["torch_device"]
    emit(**contenders_torch.describe(device))
    clock = CudaClock() if device == "cuda" else HostClock()
    emit(peaks=contenders_torch.peaks(device, clock))


def time_unit(job: dict[str, Any], emit: Callable[..., None]) -> None:
    names = job["contenders"]
    suite = suites(job["device"])[job["op"]]
    needed = list(names)
    if suite.oracle is None:
        needed = list(dict.fromkeys([*names, job["baseline"]]))
    missing = start_frameworks(suite, needed, job["threads"])
    emit(missing=missing)
    if job["baseline"] in missing:
        return
    unit = Unit(job, [name for name in names if name not in missing])
    for precision in job["precisions"]:
        emit(precision=precision, rows=unit.time(precision))


def measure_memory(job: dict[str, Any], emit: Callable[..., None]) -> None:
    (name,) = job["contenders"]
    suite = suites(job["device"])[job["op"]]
    if not start_frameworks(suite, [name], job["threads"]):
        emit(memory=peak_extra_memory(job, name))


def serve(job: dict[str, Any], emit: Callable[..., None]) -> None:
    """Computes results, then a sample for each kind on a line of input."""
    names = ["tf_deform"]
    suite = suites(job["device"])[job["op"]]
    if missing := start_frameworks(suite, names, job["threads"]):
        raise RuntimeError(missing[names[0]])
    import tf_deform

    unit = Unit(job, names)
    make = suite.contenders[names[0]][0]
    ours = unit.build(make, job["dtype"], unit.operands)
    calls = {kind: getattr(ours, kind) for kind in TIMED_KINDS}
    calls = {kind: call for kind, call in calls.items() if call}
    results = {
        f"{kind} {name}": value.astype(np.promote_types(value.dtype, "f4"))
        for kind in calls
        for name, value in results_of(ours, kind).items()
    }
    np.savez(job["results"], **results)
    samplers = unit.clock.samplers(calls)
    emit(package=os.path.dirname(tf_deform.__file__), kinds=list(calls))
    for line in sys.stdin:
        emit(ms=samplers[line.strip()]())


MODES = {
    "describe": describe_gpu,
    "time": time_unit,
    "memory": measure_memory,
    "serve": serve,
}


def main() -> None:
    """Does the job that `run.py` describes in the first argument."""
    job = json.loads(sys.argv[1])
    # Keeps the standard output for lines of JSON: libraries print, too.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)

        def emit(**result: Any) -> None:
            channel.write(json.dumps(result) + "\n")
            channel.flush()

        if job["device"] == "cpu":
            pin(job["threads"])
        MODES[job["mode"]](job, emit)


if __name__ == "__main__":
    main()
