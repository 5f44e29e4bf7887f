# SPDX-License-Identifier: Apache-2.0
"""Compares two builds of this package side by side: `run.py --against FOLDER`.

A build is that of another tree, or the one that another Python imports, with
its own TensorFlow: `run.py --against ENVIRONMENT/bin/python`. Each build runs
in a process of its own, and both run the benchmark of this tree. They take
turns, call by call in random order; one process waits while the other one runs.
"""

import contextlib
import functools
import glob
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from typing import Any, NamedTuple

import numpy as np
from processes import WORKER, kill, last_lines, start, worker_environment
from report import TITLES, describe, interval, markdown, remarks, summary
from timing import TOLERANCES, agree, take_turns

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUILDS = ("this", "other")
# Memory and processors favour a process by chance for all its life. So each
# shape is timed in this number of pairs of processes, a part of the rounds in
# each.
PAIRS = 3
# Bounds on the ratios of this tree's times to the other's: on the geometric
# mean over all rows, and on the lower end of a row's interval.
MEAN_GOAL = 1.01
ROW_GOAL = 1.02


class Tree(NamedTuple):
    """Holds the folder of a package, and the Python that runs it."""

    folder: str
    python: str


def find_trees(other: str) -> dict[str, Tree]:
    """Returns both trees by name.

    Args:
        other: The other tree's folder, or a Python with the package.

    Raises:
        ValueError: if one of the trees has no build.
    """
    other = os.path.abspath(other)
    python = sys.executable
    if os.path.isfile(other):
        python, other = other, _installed(other)
    trees = dict(zip(BUILDS, (Tree(ROOT, sys.executable), Tree(other, python))))
    for tree in trees.values():
        # The package had one _ops.so, and has one for each TensorFlow.
        if not glob.glob(os.path.join(tree.folder, "tf_deform", "_ops*.so")):
            raise ValueError(
                "Expected a tree with a build in place, as `make install` "
                "makes it, or a Python with the package. Received: "
                f"{tree.folder}, without tf_deform/_ops*.so"
            )
    return trees


def _installed(python: str) -> str:
    """Returns the folder from which a Python imports the package."""
    code = "import importlib.util as u; print(u.find_spec('tf_deform').origin)"
    result = subprocess.run(
        [python, "-c", code],
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise ValueError(
            f"Expected {python} to find tf_deform. Received: "
            f"{result.stderr.strip().splitlines()[-1:]}"
        )
    return os.path.dirname(os.path.dirname(result.stdout.strip()))


class Build:
    """Holds a process in which one tree's build computes one shape."""

    def __init__(self, job: dict[str, Any], stack: contextlib.ExitStack):
        self._job = job
        log = tempfile.TemporaryFile("w+", errors="replace")
        self._log = stack.enter_context(log)
        process = start(
            [job["python"], WORKER, json.dumps(job)],
            stdin=subprocess.PIPE,
            stderr=self._log,
            env=worker_environment(job),
        )
        self.process = stack.enter_context(process)
        self.kinds: list[str] = []

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)  # it may still be printing the reason
            raise RuntimeError(
                f"the process ended: {last_lines(self._log)[-1]}"
            )
        return json.loads(line)

    def results(self) -> dict[str, np.ndarray]:
        """Waits for the results: by kind of call and operand."""
        ready = self._read()
        expected = os.path.realpath(self._job["tree"])
        received = os.path.realpath(os.path.dirname(ready["package"]))
        if received != expected:
            raise RuntimeError(
                f"Expected tf_deform to be imported from {expected}. "
                f"Received: {received}"
            )
        self.kinds = ready["kinds"]
        with np.load(self._job["results"]) as file:
            return dict(file)

    def sample(self, kind: str) -> float:
        """Has the process make a call; returns the call's milliseconds."""
        self.process.stdin.write(f"{kind}\n")
        self.process.stdin.flush()
        return self._read()["ms"]


def time_unit(
    job: dict[str, Any], trees: dict[str, Tree], timeout: float
) -> list[dict[str, Any]]:
    """Compares two builds, then times them; a row for each kind of call.

    Raises:
        RuntimeError: if a process ends, or a pair takes too long.
    """
    job = job | {"repeats": math.ceil(job["repeats"] / PAIRS)}
    pairs = [_time_pair(job, trees, timeout, seed) for seed in range(PAIRS)]
    rows = []
    for kind, row in pairs[0][0].items():
        of_kind = [found[kind] for found, _ in pairs]
        for other in of_kind:
            row["equal_bits"] &= other["equal_bits"]
            row["disagreement"] = max(
                row["disagreement"], other["disagreement"]
            )
            row["errors"] |= other["errors"]
        if not row["errors"]:
            times = {
                name: [ms for _, samples in pairs for ms in samples[name, kind]]
                for name in BUILDS
            }
            row["this"] = summary(times["this"], times["other"])
            row["other"] = summary(times["other"], None)
            ratios = np.divide(times["this"], times["other"])
            row["interval"] = interval(ratios.tolist())
            by_pair = np.median(ratios.reshape(PAIRS, -1), axis=1)
            row["ratio_by_pair"] = by_pair.tolist()
        rows.append(row)
    return rows


def _time_pair(
    job: dict[str, Any], trees: dict[str, Tree], timeout: float, seed: int
) -> tuple[dict[str, dict[str, Any]], dict[Any, list[float]]]:
    """Starts both builds; returns rows by kind of call, and milliseconds."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        builds = {}
        for name, tree in trees.items():
            results = os.path.join(folder, f"{name}.npz")
            of_build = {"mode": "serve", "results": results}
            of_build |= {"tree": tree.folder, "python": tree.python}
            builds[name] = Build(job | of_build, stack)
        is_over = threading.Event()

        def end() -> None:
            is_over.set()
            for build in builds.values():
                kill(build.process)

        timer = threading.Timer(timeout, end)
        timer.start()
        stack.callback(timer.cancel)
        try:
            rows = _compare(job, builds)
            samplers = {
                (name, kind): functools.partial(build.sample, kind)
                for kind, row in rows.items()
                for name, build in builds.items()
                if not row["errors"]
            }
            return rows, take_turns(samplers, job["repeats"], seed)
        except (OSError, RuntimeError):
            if is_over.is_set():
                raise RuntimeError(
                    f"not finished after {timeout:g} s"
                ) from None
            raise


def _compare(
    job: dict[str, Any], builds: dict[str, Build]
) -> dict[str, dict[str, Any]]:
    results = {name: build.results() for name, build in builds.items()}
    if results["this"].keys() != results["other"].keys():
        raise RuntimeError("the builds do not have the same results")
    rows = {}
    for kind in builds["this"].kinds:
        this, other = (
            {k: v for k, v in results[name].items() if k.split()[0] == kind}
            for name in BUILDS
        )
        differences, error = agree(this, other, TOLERANCES[job["dtype"]])
        rows[kind] = {
            "contender": "tf_deform",
            "kind": kind,
            "equal_bits": all(
                value.tobytes() == other[key].tobytes()
                for key, value in this.items()
            ),
            "disagreement": max(differences.values()),
            "errors": {kind: error} if error else {},
        }
    return rows


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """Returns lines about bits, the mean ratio, and rows that are slower."""
    rows = [row for row in rows if "interval" in row]
    if not rows:
        return []
    different = [row for row in rows if not row["equal_bits"]]
    bits = f"are equal to the bit in all {len(rows)} rows"
    if different:
        most = max(row["disagreement"] for row in different)
        bits = (
            f"DIFFER in {len(different)} of {len(rows)} rows, by up to "
            f"{most:.1e} of the root mean square"
        )
    ratios = [row["this"]["ratio_by_round"]["median"] for row in rows]
    mean = statistics.geometric_mean(ratios)
    slower = [
        f"{name_of(row)} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})"
        for row in rows
        if row["interval"][0] > ROW_GOAL
    ]
    return [
        f"Results {bits}.",
        f"Geometric mean of {len(rows)} ratios, this tree to the other: "
        f"{mean:.4f} (goal: at most {MEAN_GOAL:g}, "
        f"{'met' if mean <= MEAN_GOAL else 'MISSED'}); "
        f"{min(ratios):.3f} to {max(ratios):.3f}.",
        f"Rows whose 95 % interval lies wholly above {ROW_GOAL:g}: "
        f"{', '.join(slower) or 'none'}.",
    ]


def name_of(row: dict[str, Any]) -> str:
    return f"{row['shape']}, threads {row['threads']}, {TITLES[row['kind']]}"


def document(report: dict[str, Any]) -> str:
    """Returns the table and the lines about it as Markdown."""
    header = "shape, threads, kind, this ms, other ms, ratio, 95 % interval"
    header += ", ratio by pair of processes"
    cells = [
        [
            row["shape"],
            str(row["threads"]),
            TITLES[row["kind"]],
            *(f"{row[name]['median_ms']:.2f}" for name in BUILDS),
            f"{row['this']['ratio_by_round']['median']:.3f}",
            "{:.3f} to {:.3f}".format(*row["interval"]),
            " ".join(f"{ratio:.3f}" for ratio in row["ratio_by_pair"]),
        ]
        for row in report["rows"]
        if "interval" in row
    ]
    lines = [*describe(report), "", markdown(header.split(", "), cells), ""]
    lines += remarks(report)
    lines += [f"- {line}" for line in judge(report["rows"])]
    return "\n".join(lines) + "\n"
