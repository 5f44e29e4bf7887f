# SPDX-License-Identifier: Apache-2.0
"""The child process of the benchmark: checks, times, measures memory.

`run.py` starts it with a JSON job as its only argument; every result is one
line of JSON, appended to the job's file as soon as it is known.
"""

import ctypes
import gc
import importlib
import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import convolution
import numpy as np
import roi_pooling
from contenders import Contender, Suite, Unsupported

SUITES = {
    "conv": convolution.SUITE,
    "conv_kinds": convolution.KINDS_SUITE,
    "roi": roi_pooling.SUITE,
}
KINDS = ("forward", "both")
TIMED_KINDS = (*KINDS, "backward")  # the last alone, of whoever can
PROGRESS = "progress: "  # tells our lines from those that libraries print

# A call that takes longer than this needs no untimed one before it.
LONG_CALL_S = 0.5

# Largest difference allowed anywhere, in units of the baseline's root mean
# square. One sample read from a wrong pixel is worth about 0.002 or more in
# the shapes here, so float32's bound finds that with room on both sides.
TOLERANCES = {
    "float64": 1e-9,
    "float32": 1e-4,
    "float16": 3e-2,
    "bfloat16": 2e-1,
}


def pin(threads: int) -> None:
    """Keeps this process on `threads` processors, from different cores first.

    Pools differ in whether the caller counts as a worker, so the same setting
    can mean one thread more in one framework than in another; processors mean
    the same to all. Must come before any framework starts its threads.
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
    """Imports what the contenders need; returns why some cannot run."""
    missing = {}
    for name in names:
        for package in suite.contenders[name][1]:
            try:
                module = importlib.import_module(package)
            except ModuleNotFoundError as error:
                if error.name != package:
                    missing[name] = f"cannot be imported: {error}"
                else:
                    missing[name] = (
                        "not installed: pip install 'tf-deform[benchmark]'"
                    )
            # Whatever a package does on import, such as refusing to load
            # next to the wrong TensorFlow, the others can still be compared.
            except Exception as error:
                missing[name] = f"cannot be imported: {_first_line(error)}"
            else:
                if package == "tensorflow":
                    _configure_tensorflow(module, threads)
                continue
            break
    return missing


def _configure_tensorflow(tf: Any, threads: int) -> None:
    # Both pools as large as the processor count: TensorFlow's own default.
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def disagreement(result: np.ndarray, baseline: np.ndarray) -> float:
    """Largest difference, in units of the baseline's root mean square."""
    if result.shape != baseline.shape:
        raise ValueError(
            f"Expected a result of shape {baseline.shape}. "
            f"Received: {result.shape}"
        )
    if not baseline.size:
        return 0.0
    result = result.astype(np.float64)
    baseline = baseline.astype(np.float64)
    if not (np.isfinite(result).all() and np.isfinite(baseline).all()):
        raise ValueError("Expected finite results. Received: NaN or infinity")
    scale = np.sqrt(np.mean(baseline**2))
    # A result that should be zero throughout has no scale of its own.
    return float(np.max(np.abs(result - baseline)) / (scale or 1.0))


class Oracle:
    """The baseline's results: what every other contender must reproduce."""

    def __init__(self, build: Callable[[Any], Contender], operands: Any):
        self._build = build
        self._operands = operands
        self._results: dict[tuple[bool, str], dict[str, np.ndarray]] = {}

    def results(self, deformable: bool, kind: str) -> dict[str, np.ndarray]:
        """Output or gradients; with zero offsets if not `deformable`."""
        if (deformable, kind) not in self._results:
            operands = self._operands
            contender = self._build(
                operands if deformable else operands.undeformed()
            )
            self._results[deformable, kind] = results_of(contender, kind)
        return self._results[deformable, kind]


def results_of(contender: Contender, kind: str) -> dict[str, np.ndarray]:
    """The output, or the gradients by operand."""
    if kind == "forward":
        return {"output": contender.outputs()}
    return contender.gradients(kind)


def check(
    contender: Contender, oracle: Oracle, kind: str, tolerance: float
) -> tuple[dict[str, float], str | None]:
    """Compares with the oracle: (disagreements by result, error or None)."""
    # Not everybody has a backward pass alone; the gradients are the same.
    expected = oracle.results(
        contender.deformable, "both" if kind == "backward" else kind
    )
    differences = {
        name: disagreement(result, expected[name])
        for name, result in results_of(contender, kind).items()
    }
    wrong = {
        name: difference
        for name, difference in differences.items()
        if difference > tolerance
    }
    if not wrong:
        return differences, None
    listed = ", ".join(f"{name} by {d:.2g}" for name, d in wrong.items())
    return differences, f"differs from the baseline: {listed}"


def time_case(
    job: dict[str, Any], case: Any, names: list[str]
) -> list[dict[str, Any]]:
    """Checks all contenders, then times them in turn; one row for each."""
    suite = SUITES[job["op"]]
    tolerance = TOLERANCES[case.dtype]
    threads = job["threads"]
    operands = suite.operands.random(case)
    baseline = job["baseline"]

    def build(name: str, operands: Any) -> Contender:
        make = suite.contenders[name][0]
        return make(case, make.prepare(case, operands), threads)

    oracle = Oracle(lambda operands: build(baseline, operands), operands)
    rows: dict[str, dict[str, Any]] = {}
    entrants: dict[tuple[str, str], Callable[[], None]] = {}
    for name in names:
        row = {"contender": name, "disagreement": {}, "errors": {}}
        rows[name] = row
        try:
            contender = build(name, operands)
        except Unsupported as reason:
            row["unsupported"] = str(reason)
            continue
        # One contender's failure is its row's, not the run's.
        except Exception as error:
            row["errors"]["forward"] = _first_line(error)
            continue
        for kind in TIMED_KINDS:
            call = getattr(contender, kind)
            if call is None:
                continue
            try:
                differences, error = check(contender, oracle, kind, tolerance)
            except Exception as failure:
                differences, error = {}, _first_line(failure)
            for result, difference in differences.items():
                row["disagreement"][result] = max(
                    difference, row["disagreement"].get(result, 0.0)
                )
            if error:
                row["errors"][kind] = error
            else:
                entrants[name, kind] = call
    del oracle

    samples = take_turns(entrants, job["repeats"])
    for (name, kind), times in samples.items():
        # Backward alone is compared with the same contender's forward.
        alone = kind == "backward"
        reference = (name, "forward") if alone else (suite.ratio_to, kind)
        rows[name][kind] = summary(times, samples.get(reference))
    return list(rows.values())


def take_turns(
    entrants: dict[Any, Callable[[], None]], repeats: int
) -> dict[Any, list[float]]:
    """Seconds of every call: each entrant once a round, in random order.

    A disturbance of the machine then falls on neighbours alike, and nobody
    always runs in the wake of the same other (what it left in the caches, its
    threads that still look for work). The untimed call before each
    timed one brings an entrant's own threads and data back; a call known to
    be long does so by itself.
    """
    samples: dict[Any, list[float]] = {key: [] for key in entrants}
    order = list(entrants)
    orders = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            orders.shuffle(order)
            for key in order:
                call = entrants[key]
                if not samples[key] or samples[key][-1] < LONG_CALL_S:
                    call()
                start = time.perf_counter()
                call()
                samples[key].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return samples


def summary(
    times: list[float], reference: list[float] | None
) -> dict[str, Any]:
    """Milliseconds and, if the reference ran, ratios to it."""
    milliseconds = 1e3 * np.asarray(times)
    result = _quartiles(milliseconds, "_ms") | {
        "min_ms": float(milliseconds.min()),
        "max_ms": float(milliseconds.max()),
        "samples_ms": [round(float(ms), 4) for ms in milliseconds],
    }
    if reference:
        result["ratio"] = float(np.median(times) / np.median(reference))
        # Round by round: what noise slower than a round leaves untouched.
        rounds = np.asarray(times) / np.asarray(reference)
        result["ratio_by_round"] = _quartiles(rounds, "")
    return result


def _quartiles(values: np.ndarray, unit: str) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {
        f"median{unit}": float(middle),
        f"q25{unit}": float(low),
        f"q75{unit}": float(high),
    }


# Peak extra memory of a contender, in a process of its own.
#
# It is the highest resident size of the process during the calls (VmHWM, its
# counter set back just before) less the resident size with the operands in
# place and nothing built (VmRSS). So it contains
# - the results: the output, and for forward + backward all gradients too;
# - everything the calls hold at the same time: scratch of the kernels,
#   intermediate tensors, what autodiff keeps from forward for backward;
# - what stays of setting up: the traced graph, the session and its buffers;
# - what allocators and frameworks keep or waste, as far as it is touched;
# and it does not contain
# - the operands, in the contender's own layout, the kernel only once;
# - code, thread stacks and pools, which a call on a tiny map brings in first;
# - what setting up needs for a moment only.
# Both counters count touched pages only, in the kernel's own rough steps, and
# a framework's housekeeping comes and goes: one or two MiB mean nothing.
def peak_extra_memory(
    job: dict[str, Any], case: Any, name: str
) -> dict[str, float]:
    """MiB by kind; without what the system does not tell, or what fails."""
    suite = SUITES[job["op"]]
    threads = job["threads"]
    make = suite.contenders[name][0]
    result: dict[str, float] = {}
    try:
        tiny = case.tiny()
        operands = suite.operands.random(tiny)
        warm_up = make(tiny, make.prepare(tiny, operands), threads)
        kinds = [kind for kind in KINDS if getattr(warm_up, kind)]
        for kind in kinds:
            getattr(warm_up, kind)()
        del warm_up, operands
        arrays = make.prepare(case, suite.operands.random(case))
        _return_free_memory()
        before = _status("VmRSS")
        contender = make(case, arrays, threads)
        del arrays  # an engine with a kernel of its own needs no other
        _return_free_memory()
        # The same start for both: what forward leaves in an allocator's
        # hands is reused by forward + backward, and must count there again.
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
        print(f"{PROGRESS}failed: {_first_line(error)}", flush=True)
    return result


def _status(field: str) -> int:
    """A field of this process's status, in KiB."""
    with open("/proc/self/status", encoding="ascii") as file:
        return int(re.search(rf"^{field}:\s+(\d+)", file.read(), re.M)[1])


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _return_free_memory() -> None:
    """Lets go of freed heap, which calls could else reuse uncounted."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def main() -> None:
    """Does the job that `run.py` describes in the first argument."""
    job = json.loads(sys.argv[1])
    suite = SUITES[job["op"]]
    pin(job["threads"])
    with open(job["results"], "a", encoding="utf-8") as file:

        def report(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        names = job["contenders"]
        if job["mode"] == "memory":
            (name,) = names
            if not start_frameworks(suite, names, job["threads"]):
                case = suite.case.parse(
                    job["shapes"][0], job["dtype"], job["mask"]
                )
                report(memory=peak_extra_memory(job, case, name))
            return
        needed = list(dict.fromkeys([*names, job["baseline"]]))
        missing = start_frameworks(suite, needed, job["threads"])
        report(missing=missing)
        if job["baseline"] in missing:
            return
        for shape in job["shapes"]:
            print(f"{PROGRESS}{shape}", flush=True)
            case = suite.case.parse(shape, job["dtype"], job["mask"])
            present = [name for name in names if name not in missing]
            report(shape=shape, rows=time_case(job, case, present))


if __name__ == "__main__":
    main()
