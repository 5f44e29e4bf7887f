# SPDX-License-Identifier: Apache-2.0
"""The operators next to their peers: tables, one JSON file.

    python benchmarks/run.py --json results.json

See README.md in this folder for what is compared and how to read it.
"""

import argparse
import collections
import ctypes
import dataclasses
import datetime
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from worker import KINDS, PROGRESS, SUITES, TIMED_KINDS, TOLERANCES

PACKAGES = (
    "tf-deform",
    "tensorflow",
    "onnxruntime",
    "onnx",
    "openvino",
    "numpy",
)
INSTRUCTION_SETS = re.compile(
    r"sse4_2|avx.*|fma|f16c|amx.*|asimd.*|sve.*|bf16|i8mm"
)
CONTENDERS = list(
    dict.fromkeys(
        name for suite in SUITES.values() for name in suite.contenders
    )
)
# Who could be what all others must reproduce: takes part everywhere, trains.
BASELINES = [
    name
    for name in CONTENDERS
    if all(
        name in suite.contenders
        and suite.contenders[name][0].deformable
        and suite.contenders[name][0].trains()
        for suite in SUITES.values()
    )
]
# Variables that limit the instruction set of tf_deform and of oneDNN: part of
# the command, if they are set.
ENVIRONMENT = ("TF_DEFORM_MAX_ISA", "ONEDNN_MAX_CPU_ISA")


@dataclasses.dataclass(frozen=True)
class Goal:
    """A bound on a ratio, the same for every shape or not."""

    text: str
    of: Callable[[Any], float]  # given the case

    @classmethod
    def at(cls, bound: float) -> "Goal":
        return cls(f"{bound:g}", lambda case: bound)


# What the project aims at with two threads, by operator, kind and what is
# bounded: in every row the "ratio" to what the table's ratios are to, at most
# so much; the gain over peers and of two "threads" over one, at least so much;
# and the geometric mean of the ratios. Reported, and never a reason to fail: a
# time is no test.
GOAL_THREADS = 2
SAMPLING = Goal(
    "1.1 * (1 + 4 * groups / filters)",
    lambda case: 1.1 * (1 + 4 * case.groups / case.filters),
)
MEAN_GOALS = {("conv", "forward"): 1.1}
GOALS = {
    ("conv", "forward", "ratio"): Goal.at(1.3),
    ("conv", "forward", "onnxruntime or openvino"): Goal.at(1.25),
    ("conv", "forward", "threads"): Goal.at(1.8),
    ("conv", "both", "ratio"): Goal.at(1.35),
    ("conv", "both", "gather"): Goal.at(2.5),
    ("conv", "both", "threads"): Goal.at(1.8),
    ("conv_kinds", "forward", "ratio"): SAMPLING,
    ("conv_kinds", "both", "ratio"): SAMPLING,
    ("roi", "forward", "openvino, psroi"): Goal.at(10),
    ("roi", "backward", "ratio"): Goal.at(3),
}
NOISE = 0.15  # quartiles this far apart, as a part of the median, are reported
TITLES = {
    "forward": "forward",
    "both": "forward + backward",
    "backward": "backward alone",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks what can be checked before a run."""
    parser = argparse.ArgumentParser(
        description="Times deformable operators next to their peers."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--ops",
        nargs="+",
        choices=SUITES,
        default=list(SUITES),
        metavar="OP",
        help="whose shapes to run: conv (deformable convolution), conv_kinds "
        "(the same with groups, other kernels, strides ...), roi (deformable "
        "ROI pooling and ROIAlign) (default: all)",
    )
    which.add_argument(
        "--shapes",
        nargs="+",
        metavar="SHAPE",
        help="shapes of a convolution such as '1x56x56x256->256' (batch, "
        "height, width, channels, filters), with suffixes for another kernel "
        "size, strides, dilation, groups, offset groups: "
        "'1x56x56x64->64,k5,s2,d2,g4,og4'; of ROI pooling such as "
        "'psroi:1x38x63x1029->300x7x7x21,c1' or "
        "'align:1x50x64x256->512x7x7x256' (map, ROIs, bins, channels), with "
        "suffixes for displacement classes and samples: ',c21,s4'",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=CONTENDERS,
        metavar="NAME",
        help=f"which to compare, of {', '.join(CONTENDERS)} (default: all)",
    )
    parser.add_argument(
        "--baseline",
        choices=BASELINES,
        default="tf_deform",
        help="whose results all others must reproduce (default: %(default)s)",
    )
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--repeats",
        type=int,
        help="timed calls of each contender (default: "
        f"{_defaults('repeats')}; with --quick 3)",
    )
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument(
        "--no-mask", action="store_true", help="leave out the modulation"
    )
    parser.add_argument(
        "--memory-repeats",
        type=int,
        help="processes that measure each contender's peak memory; 0 leaves "
        f"it out (default: {_defaults('memory_repeats')}; with --quick 1)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes and few repeats: tries the harness, and says "
        "nothing about speed",
    )
    parser.add_argument("--json", metavar="PATH", help="write all results here")
    options = parser.parse_args(arguments)

    options.contenders = [
        name for name in CONTENDERS if name in options.contenders
    ]
    if options.quick and options.repeats is None:
        options.repeats = 3
    if options.quick and options.memory_repeats is None:
        options.memory_repeats = 1
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    if options.memory_repeats is not None and options.memory_repeats < 0:
        parser.error("--memory-repeats must be at least 0")
    available = len(_processors())
    for threads in options.threads:
        if not 1 <= threads <= available:
            parser.error(
                f"--threads {threads}: this process may use {available} "
                "processors"
            )
    if options.shapes:
        # ROI pooling is of several kinds; a shape begins with their name.
        chosen = [
            ("roi" if shape.strip()[:1].isalpha() else "conv", shape)
            for shape in options.shapes
        ]
    else:
        chosen = [
            (op, shape)
            for op in options.ops
            for shape in (
                SUITES[op].quick_shapes if options.quick else SUITES[op].shapes
            )
        ]
    # By suite; one spelling for each shape, and an error before any runs.
    options.shapes = {op: [] for op in SUITES}
    for op, shape in chosen:
        try:
            shape = str(SUITES[op].case.parse(shape, options.dtype, True))
        except ValueError as error:
            parser.error(str(error))
        if shape not in options.shapes[op]:
            options.shapes[op].append(shape)
    return options


def _defaults(setting: str) -> str:
    return ", ".join(
        f"{op} {getattr(suite, setting)}" for op, suite in SUITES.items()
    )


def _processors() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def run_worker(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Runs one child process; yields its results, then an `exit` line."""
    threads = str(job["threads"])
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "-1",
        "OMP_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_ENABLE_ONEDNN_OPTS": "1",
    }
    if job["mode"] == "memory":
        # Large blocks go back to the system when they are freed, rather
        # than into a pool whose size depends on what ran before.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "results.jsonl")
        script = os.path.join(os.path.dirname(__file__), "worker.py")
        # Libraries log to both streams; only progress is of interest, and
        # the last lines if the process dies.
        last = collections.deque(maxlen=20)
        with subprocess.Popen(
            [sys.executable, script, json.dumps(job | {"results": path})],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            for line in process.stdout:
                if line.startswith(PROGRESS):
                    _progress("  " + line.removeprefix(PROGRESS).rstrip())
                last.append(line)
        if process.returncode:
            sys.stderr.writelines(last)
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                yield from map(json.loads, file)
        yield {"exit": process.returncode}


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run_all(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Fills `report`, saving it after every stage."""
    jobs = {
        op: {
            "op": op,
            "contenders": [
                name
                for name in options.contenders
                if name in SUITES[op].contenders
            ],
            "baseline": options.baseline,
            "shapes": shapes,
            "repeats": report["settings"]["repeats"][op],
            "dtype": options.dtype,
            "mask": not options.no_mask,
        }
        for op, shapes in options.shapes.items()
        if shapes
    }
    for op, job in jobs.items():
        for threads in options.threads:
            _progress(f"{op}, threads {threads}: comparing and timing")
            _time(job | {"mode": "time", "threads": threads}, report)
            save(report, options.json)
    for row in report["rows"]:
        op, name = row["op"], row["contender"]
        memory_repeats = report["settings"]["memory_repeats"][op]
        if row["errors"] or "unsupported" in row or not memory_repeats:
            continue
        everywhere = SUITES[op].memory_at_all_threads
        if not everywhere and row["threads"] < max(options.threads):
            row["extra_mib"] = None
            continue
        _progress(f"threads {row['threads']}: memory of {name}, {row['shape']}")
        memory_job = jobs[op] | {
            "mode": "memory",
            "threads": row["threads"],
            "contenders": [name],
            "shapes": [row["shape"]],
        }
        # One process is not enough: what a pooling allocator wastes depends
        # on the order in which threads happen to come by.
        for _ in range(memory_repeats):
            for line in run_worker(memory_job):
                for kind, mib in line.get("memory", {}).items():
                    row["extra_mib"].setdefault(kind, []).append(mib)
        save(report, options.json)


def _time(job: dict[str, Any], report: dict[str, Any]) -> None:
    """Appends rows; a shape that ends the process costs only its own."""
    waiting = list(job["shapes"])
    for line in run_worker(job):
        if "missing" in line:
            report["missing"] |= line["missing"]
        elif "rows" in line:
            waiting.remove(line["shape"])
            for row in line["rows"]:
                report["rows"].append(
                    {
                        "op": job["op"],
                        "shape": line["shape"],
                        "threads": job["threads"],
                    }
                    | row
                    | {"extra_mib": {}}
                )
        elif line["exit"]:
            if not waiting:
                return
            crashed, *rest = waiting
            report["errors"].append(
                f"{crashed}, threads {job['threads']}: the process ended with "
                f"exit status {line['exit']}"
            )
            if rest:
                _time(job | {"shapes": rest}, report)


def instruction_set() -> str | None:
    """What `tf_deform` uses on this processor, in this environment."""
    spec = importlib.util.find_spec("tf_deform")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for path in glob.glob(os.path.join(folder, "_core*.so")):
            name = ctypes.CDLL(path).TfDeformInstructionSet
            name.restype = ctypes.c_char_p
            return name().decode()
    return None


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge the numbers; nothing that names a host."""
    model, flags = platform.processor() or platform.machine(), []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            fields = dict(
                re.findall(r"^(.*?)\s*:[ \t]*(.*)$", file.read(), re.M)
            )
    except OSError:
        fields = {}
    model = fields.get("model name", model)
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "processors": len(_processors()),
        "instruction_sets": [f for f in flags if INSTRUCTION_SETS.fullmatch(f)],
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
    }


def _memory_gib() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(pages / 2**30, 1)


def _load() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def save(report: dict[str, Any], path: str | None) -> None:
    """Writes the report as JSON: the whole new file or none of it."""
    if not path:
        return
    folder = os.path.dirname(os.path.abspath(path))
    with tempfile.NamedTemporaryFile(
        "w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8"
    ) as file:
        try:
            json.dump(report, file, indent=1)
            file.write("\n")
            file.flush()
            # Temporary files are private; a report is as public as any file.
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(file.name, 0o666 & ~mask)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def table(report: dict[str, Any], op: str) -> str:
    """The rows of an operator as Markdown, without what is not supported."""
    header = [
        "shape",
        "threads",
        "contender",
        "forward ms (25-75 %)",
        "ratio",
        "fwd+bwd ms (25-75 %)",
        "ratio",
        "extra MiB forward",
        "extra MiB fwd+bwd",
    ]
    rows = _rows(report, op)
    kinds = KINDS
    if any("backward" in row for row in rows):
        kinds = TIMED_KINDS
        header[-2:-2] = ["backward ms (25-75 %)", "to forward"]
    lines = [
        f"| {' | '.join(header)} |",
        "|" + "---|" * len(header),
    ]
    for row in rows:
        if "unsupported" in row:
            continue
        cells = [row["shape"], str(row["threads"]), row["contender"]]
        for kind in kinds:
            cells += _time_cells(row, kind)
        cells += [_memory_cell(row, kind) for kind in KINDS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rows(report: dict[str, Any], op: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row["op"] == op]


def _time_cells(row: dict[str, Any], kind: str) -> list[str]:
    if kind in row["errors"]:
        return ["error", ""]
    if kind not in row:
        return ["", ""]
    time = row[kind]
    return [
        f"{time['median_ms']:.1f} ({time['q25_ms']:.1f}-{time['q75_ms']:.1f})",
        f"{time['ratio']:.2f}" if "ratio" in time else "n/a",
    ]


def _memory_cell(row: dict[str, Any], kind: str) -> str:
    # Nothing that was compared and timed, or measured elsewhere.
    if kind not in row or row["extra_mib"] is None:
        return ""
    # A reading below zero is noise about nothing.
    readings = [round(max(m, 0)) for m in row["extra_mib"].get(kind, [])]
    if not readings:
        return "n/a"
    if max(readings) - min(readings) > 2:
        return f"{min(readings)}-{max(readings)}"
    return str(round(statistics.median(readings)))


def errors(report: dict[str, Any]) -> list[str]:
    """Everything that makes the run a failure."""
    baseline = report["settings"]["baseline"]
    found = list(report["errors"])
    if baseline in report["missing"]:
        found.append(f"nothing to compare with, {baseline} is missing")
    for row in report["rows"]:
        found += [
            f"{row['shape']}, threads {row['threads']}, {row['contender']}, "
            f"{TITLES[kind]}: {text}"
            for kind, text in row["errors"].items()
        ]
    return found


def notes(report: dict[str, Any], op: str) -> list[str]:
    """What to know besides the table: agreement, goals, noise."""
    settings = report["settings"]
    rows = _rows(report, op)
    lines = sorted(
        {
            f"Not supported by {row['contender']}: {row['unsupported']}."
            for row in rows
            if "unsupported" in row
        }
    )
    differences = [
        value
        for row in rows
        if row["contender"] != settings["baseline"]
        for value in row["disagreement"].values()
    ]
    if differences:
        lines.append(
            f"Largest difference from {settings['baseline']}: "
            f"{max(differences):.1e} of the root mean square (allowed: "
            f"{settings['tolerance']:.0e})."
        )
    for kind in TIMED_KINDS:
        lines += _verdict(rows, op, kind)
    noisy = [
        f"{row['shape']} at threads {row['threads']}"
        for row in rows
        for kind in TIMED_KINDS
        if kind in row and _is_noisy(row[kind])
    ]
    if noisy:
        lines.append(
            f"NOISE: quartiles more than {NOISE:.0%} of the median apart in "
            f"{len(noisy)} timings; do not trust the ratios of "
            f"{', '.join(dict.fromkeys(noisy))}."
        )
    return lines


def _is_noisy(time: dict[str, Any]) -> bool:
    return time["q75_ms"] - time["q25_ms"] > NOISE * time["median_ms"]


def _verdict(rows: list[dict[str, Any]], op: str, kind: str) -> list[str]:
    """How `tf_deform` compares, with the number of threads that goals are for.

    Ratios that are a cost come first, then what is gained over peers and by a
    second thread.
    """
    times: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if kind in row:
            key = row["contender"], row["threads"]
            times.setdefault(key, {})[row["shape"]] = row[kind]
    counts = [count for name, count in times if name == "tf_deform"]
    if not counts:
        return []
    threads = GOAL_THREADS if GOAL_THREADS in counts else max(counts)
    ours = times["tf_deform", threads]

    def gains(others: dict[str, list[float]]) -> dict[str, float]:
        return {
            shape: min(others[shape]) / time["median_ms"]
            for shape, time in ours.items()
            if others.get(shape)
        }

    def line(what: str, text: str, ratios: dict[str, float]) -> list[str]:
        title = f"tf_deform, {TITLES[kind]}, threads {threads}"
        key = (op, kind, what) if threads == GOAL_THREADS else None
        if not ratios:
            return []
        # The ratios of the table are costs, the others gains.
        compared = _compared(ratios, text, what == "ratio", key)
        return [f"{title}: {compared}."]

    lines = []
    reference = "its forward" if kind == "backward" else SUITES[op].ratio_to
    if reference != "tf_deform":
        ratios = {
            shape: time["ratio"]
            for shape, time in ours.items()
            if "ratio" in time
        }
        lines += line("ratio", f"times {reference}", ratios)
    # Where shapes begin with an operator's name, by operator.
    for operator in dict.fromkeys(shape.rpartition(":")[0] for shape in ours):
        for names in SUITES[op].peers:
            others = {
                shape: [
                    times[name, threads][shape]["median_ms"]
                    for name in names
                    if shape in times.get((name, threads), {})
                ]
                for shape in ours
                if shape.rpartition(":")[0] == operator
            }
            what = " or ".join(names) + (f", {operator}" if operator else "")
            lines += line(what, f"times as fast as {what}", gains(others))
    if threads > 1:
        alone = times.get(("tf_deform", 1), {})
        others = {shape: [time["median_ms"]] for shape, time in alone.items()}
        text = "times as fast as with one thread"
        lines += line("threads", text, gains(others))
    return lines


def _compared(
    ratios: dict[str, float],
    text: str,
    is_cost: bool,
    key: tuple[str, str, str] | None,
) -> str:
    """Says how large the ratios are, by shape, and if they meet the goal."""
    superlative = "most" if is_cost else "least"
    worst = (max if is_cost else min)(ratios, key=ratios.get)
    result = (
        f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} {text}; "
        f"{superlative} at {worst}"
    )
    if is_cost:
        mean = statistics.geometric_mean(ratios.values())
        result += f"; geometric mean {mean:.2f}"
        if key and (bound := MEAN_GOALS.get(key[:2])):
            verdict = "met" if mean <= bound else "MISSED"
            result += f" (goal: at most {bound:g}, {verdict})"
    if key and (goal := GOALS.get(key)):
        missed = []
        for shape, ratio in ratios.items():
            case = SUITES[key[0]].case.parse(shape, "float32", True)
            bound = goal.of(case)
            if (ratio > bound) if is_cost else (ratio < bound):
                missed.append(f"{shape} ({ratio:.2f}, not {bound:.2f})")
        verdict = f"MISSED at {', '.join(missed)}" if missed else "met"
        result += f"; goal: at {superlative} {goal.text}, {verdict}"
    return result


def main() -> int:
    options = parse_arguments()
    now = datetime.datetime.now(datetime.timezone.utc)
    report: dict[str, Any] = {
        "complete": False,
        "date": now.isoformat("T", "seconds"),
        "command": _command(),
        "machine": describe_machine(),
        "instruction_set": instruction_set(),
        "versions": _versions(),
        "settings": {
            "dtype": options.dtype,
            "mask": not options.no_mask,
            "repeats": _settings(options.repeats, "repeats"),
            "memory_repeats": _settings(
                options.memory_repeats, "memory_repeats"
            ),
            "baseline": options.baseline,
            "ratio_to": _settings(None, "ratio_to"),
            "tolerance": TOLERANCES[options.dtype],
        },
        "load_average": {"before": _load()},
        "missing": {},
        "errors": [],
        "rows": [],
    }
    run_all(options, report)
    report["load_average"]["after"] = _load()
    report["complete"] = True
    save(report, options.json)

    machine = report["machine"]
    print(f"`{report['command']}`, {report['date'][:10]}:")
    print(f"{machine['cpu']}, {machine['processors']} processors;", end=" ")
    print(
        ", ".join(
            f"{name} {version}"
            for name, version in report["versions"].items()
            if version
        )
    )
    if report["instruction_set"]:
        print(f"tf_deform used {report['instruction_set']}.")
    for op, suite in SUITES.items():
        if _rows(report, op):
            print(f"\n### {suite.title}\n\n{table(report, op)}\n")
            for line in notes(report, op):
                print(f"- {line}")
    failures = errors(report)
    remarks = [f"{name}: {text}" for name, text in report["missing"].items()]
    remarks += [f"ERROR {line}" for line in failures]
    if remarks:
        print()
    for line in remarks:
        print(f"- {line}")
    return 1 if failures else 0


def _command() -> str:
    limits = [
        f"{name}={shlex.quote(os.environ[name])}"
        for name in ENVIRONMENT
        if name in os.environ
    ]
    script = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
    return " ".join([*limits, script])


def _settings(chosen: int | None, name: str) -> dict[str, Any]:
    """By operator: what the user chose, or else the suite's own."""
    return {
        op: getattr(suite, name) if chosen is None else chosen
        for op, suite in SUITES.items()
    }


if __name__ == "__main__":
    sys.exit(main())
