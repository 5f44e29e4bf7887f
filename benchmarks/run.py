# SPDX-License-Identifier: Apache-2.0
"""Compares the operators with their peers on the CPU or a GPU: tables, JSON.

    python benchmarks/run.py --json results.json
    python benchmarks/run.py --device cuda --core build/core.so

See README.md in this folder for the comparisons and how to read them.
"""

import argparse
import datetime
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import against
import machine
import report as reports
from contenders import Suite
from processes import progress, run_worker
from timing import TOLERANCES
from worker import CPU_SUITES, suites

PACKAGES = (
    "tf-deform",
    "tensorflow",
    "onnxruntime",
    "onnx",
    "openvino",
    "numpy",
)
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")  # on a GPU
# Seconds after which a shape counts as hanging and is ended.
TIMEOUTS = {"cpu": 900, "cuda": 60}
EMULATION = 20  # times slower than a GPU, or more: it also compiles
AGAINST_REPEATS = 21
# The baseline is one of these contenders: they take part everywhere, and train.
BASELINES = [
    name
    for name in CPU_SUITES["conv"].contenders
    if all(
        name in suite.contenders
        and suite.contenders[name][0].deformable
        and suite.contenders[name][0].trains()
        for suite in CPU_SUITES.values()
    )
]
# These variables limit the instruction set of tf_deform and of oneDNN. If they
# are set, they are part of the command in the report.
ENVIRONMENT = ("TF_DEFORM_MAX_ISA", "ONEDNN_MAX_CPU_ISA")


class Unit(NamedTuple):
    """Describes a shape that one process compares and times.

    A crash or a hang of the process costs no more than this unit.
    """

    op: str
    shape: str
    threads: int | None  # on the CPU

    def __str__(self) -> str:
        place = f", threads {self.threads}" if self.threads else ""
        return f"{self.shape}{place}"

    def is_chosen(self, words: list[str]) -> bool:
        """Tells whether a word names its operator or is part of its shape."""
        return any(word == self.op or word in self.shape for word in words)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Times deformable operators next to their peers."
    )
    parser.add_argument(
        "--device",
        choices=TIMEOUTS,
        default="cpu",
        help="cuda needs PyTorch and no TensorFlow (default: %(default)s)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only",
        "--ops",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="operators, or parts of shapes such as 56x56: conv (deformable "
        "convolution), conv_kinds (the same with groups, other kernels, "
        "strides ...), roi (deformable ROI pooling and ROIAlign)",
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
    add = parser.add_argument
    add("--contenders", nargs="+", metavar="NAME", help="(default: all)")
    add("--repeats", type=int, help="timed calls (default: the operator's own)")
    add("--no-mask", action="store_true", help="leave out the modulation")
    add(
        "--quick",
        action="store_true",
        help="small shapes and few repeats: tries the harness, and says "
        "nothing about speed",
    )
    add(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help=f"give up a shape after so long (default: {TIMEOUTS['cpu']}, with "
        f"--device cuda {TIMEOUTS['cuda']})",
    )
    add("--json", metavar="PATH", help="write all results here")
    add(
        "--out",
        metavar="FOLDER",
        help="write results.json and table.md there, as results come",
    )

    add = parser.add_argument_group("on the CPU").add_argument
    add(
        "--baseline",
        choices=BASELINES,
        default="tf_deform",
        help="whose results all others must reproduce (default: %(default)s)",
    )
    add(
        "--threads",
        nargs="+",
        type=int,
        help="(default: 1 and, if there is a second processor, 2)",
    )
    types = [name for name in TOLERANCES if name != "tf32"]
    add("--dtype", choices=types, default="float32")
    add(
        "--memory-repeats",
        type=int,
        help="processes that measure each contender's peak memory; 0 leaves "
        "it out (default: the operator's own)",
    )
    add(
        "--against",
        metavar="FOLDER",
        help="compare this tree's build of tf_deform with that of another "
        "tree, or of another Python, side by side, and with nothing else",
    )

    add = parser.add_argument_group("with --device cuda").add_argument
    add("--core", help="made by cc/build.py (default: the package's)")
    add("--precisions", nargs="+", choices=PRECISIONS, help="(default: all)")
    add(
        "--emulate",
        action="store_true",
        help="small shapes and emulated kernels on the CPU: tries the harness "
        "without a GPU",
    )
    return parser


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, and finds mistakes before a run."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    on_cpu = options.device == "cpu"
    of_cpu = options.threads or options.memory_repeats or options.against
    of_cuda = options.core or options.precisions or options.emulate
    available = machine.count_processors()
    options.threads = options.threads or [1, 2][:available]
    options.precisions = options.precisions or PRECISIONS
    options.quick |= options.emulate
    if options.repeats is None and (options.against or options.quick):
        # A confidence interval needs this number of calls to say much.
        options.repeats = AGAINST_REPEATS if options.against else 3
    if options.memory_repeats is None and options.quick:
        options.memory_repeats = 1
    if options.timeout is None:
        options.timeout = TIMEOUTS[options.device]
        options.timeout *= EMULATION if options.emulate else 1
    if on_cpu and of_cuda:
        parser.error("--core, --precisions and --emulate go with --device cuda")
    if not on_cpu and of_cpu:
        parser.error(
            "--threads, --memory-repeats and --against are for the CPU only"
        )
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    if options.against and options.repeats < 6:
        parser.error("--against needs 6 --repeats or more for an interval")
    if options.memory_repeats is not None and options.memory_repeats < 0:
        parser.error("--memory-repeats must be at least 0")
    for threads in options.threads:
        if on_cpu and not 1 <= threads <= available:
            parser.error(
                f"--threads {threads}: this process may use {available} "
                "processors"
            )
    chosen = suites(options.device)
    known = dict.fromkeys(n for s in chosen.values() for n in s.contenders)
    for name in options.contenders or ():
        if name not in known:
            parser.error(f"--contenders {name}: not one of {', '.join(known)}")
    options.contenders = [
        name for name in known if name in (options.contenders or known)
    ]
    try:
        options.units = find_units(options, chosen)
        if options.against:
            options.trees = against.find_trees(options.against)
    except ValueError as error:
        parser.error(str(error))
    return options


def find_units(
    options: argparse.Namespace, chosen: Mapping[str, Suite]
) -> list[Unit]:
    """Returns the units to run, each shape in its normal spelling.

    Raises:
        ValueError: if a shape is not valid, or a word chooses no unit.
    """
    if options.shapes:
        # There are several kinds of ROI pooling; a shape begins with the kind's
        # name.
        shapes = [
            ("roi" if shape.strip()[:1].isalpha() else "conv", shape)
            for shape in options.shapes
        ]
    else:
        shapes = [
            (op, shape)
            for op, suite in chosen.items()
            for shape in (suite.quick_shapes if options.quick else suite.shapes)
        ]
    counts = options.threads if options.device == "cpu" else [None]
    found = [
        Unit(op, str(chosen[op].case.parse(shape, options.dtype, True)), count)
        for op in chosen
        for count in counts
        for of, shape in shapes
        if of == op
    ]
    for word in options.only:
        if not any(unit.is_chosen([word]) for unit in found):
            raise ValueError(
                f"Expected an operator ({', '.join(chosen)}) or a part of a "
                f"shape. Received: {word}"
            )
    return [u for u in dict.fromkeys(found) if u.is_chosen(options.only)]


# The functions below run the units.


def make_job(
    options: argparse.Namespace, report: dict[str, Any], unit: Unit
) -> dict[str, Any]:
    suite = suites(options.device)[unit.op]
    on_gpu = options.device == "cuda"
    precisions = options.precisions if on_gpu else [options.dtype]
    if unit.op == "roi":
        precisions = [name for name in precisions if name != "tf32"]
    return {
        "mode": "time",
        "device": options.device,
        "torch_device": "cuda" if on_gpu and not options.emulate else "cpu",
        "core": options.core and os.path.abspath(options.core),
        "op": unit.op,
        "shape": unit.shape,
        "threads": unit.threads or 1,
        "contenders": [n for n in options.contenders if n in suite.contenders],
        "baseline": options.baseline,
        "repeats": report["settings"]["repeats"][unit.op],
        "dtype": report["settings"]["dtype"],
        "precisions": precisions,
        "mask": not options.no_mask,
    }


def run_all(options: argparse.Namespace, report: dict[str, Any]) -> bool:
    """Fills `report`, saving it after every unit; returns whether all ran."""
    jobs = {unit: make_job(options, report, unit) for unit in options.units}
    if options.device == "cuda":
        job = jobs[options.units[0]] | {"mode": "describe"}
        results, failure = run_worker(job, options.timeout)
        for result in results:
            for name, value in result.items():
                report[name] |= value
        if failure:
            report["errors"].append(f"the GPU: {failure}")
            return False
    for unit, job in jobs.items():
        progress(f"{unit}: comparing and timing")
        if not options.against:
            time_unit(unit, job, options.timeout, report)
        else:
            try:
                rows = against.time_unit(job, options.trees, options.timeout)
                report["rows"] += [unit._asdict() | row for row in rows]
            except (OSError, RuntimeError) as error:
                report["errors"].append(f"{unit}: {error}")
        save(options, report)
    if not options.against:
        for row in report["rows"]:
            measure_memory(row, jobs, options, report)
    return True


def time_unit(
    unit: Unit, job: dict[str, Any], timeout: float, report: dict[str, Any]
) -> None:
    """Appends rows; a precision that ends the process costs only its own."""
    waiting = list(job["precisions"])
    while waiting:
        results, failure = run_worker(job | {"precisions": waiting}, timeout)
        for result in results:
            report["missing"] |= result.get("missing", {})
            if "rows" not in result:
                continue
            waiting.remove(result["precision"])
            place = {"op": unit.op, "shape": unit.shape}
            if unit.threads:
                place |= {"threads": unit.threads}
            report["rows"] += [
                place | row | {"extra_mib": {}} for row in result["rows"]
            ]
        if not failure:
            return
        lost = waiting.pop(0) if waiting else "after the last result"
        report["errors"].append(f"{unit}, {lost}: {failure}")


def measure_memory(
    row: dict[str, Any],
    jobs: dict[Unit, dict[str, Any]],
    options: argparse.Namespace,
    report: dict[str, Any],
) -> None:
    """Fills in a contender's peak memory, measured in processes of its own."""
    op = row["op"]
    repeats = report["settings"]["memory_repeats"][op]
    if row["errors"] or "unsupported" in row or not repeats:
        return
    everywhere = suites(options.device)[op].memory_at_all_threads
    if not everywhere and row["threads"] < max(options.threads):
        row["extra_mib"] = None
        return
    unit = Unit(op, row["shape"], row["threads"])
    progress(f"{unit}: memory of {row['contender']}")
    job = jobs[unit] | {"mode": "memory", "contenders": [row["contender"]]}
    # Runs several processes: the memory that a pooling allocator wastes depends
    # on the order in which threads happen to allocate.
    for _ in range(repeats):
        results, _ = run_worker(job, options.timeout)
        for result in results:
            for kind, mib in result["memory"].items():
                row["extra_mib"].setdefault(kind, []).append(mib)
    save(options, report)


def save(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Writes the report so far, so that a run that is ended keeps it."""
    if options.json:
        reports.save(options.json, report)
    if options.out:
        os.makedirs(options.out, exist_ok=True)
        reports.save(os.path.join(options.out, "results.json"), report)
        text = document(options, report)
        reports.save(os.path.join(options.out, "table.md"), text)


def document(options: argparse.Namespace, report: dict[str, Any]) -> str:
    if options.against:
        return against.document(report)
    return reports.document(report, suites(options.device))


# The functions below write the report.


def new_report(
    options: argparse.Namespace, arguments: list[str]
) -> dict[str, Any]:
    on_cpu = options.device == "cpu"
    now = datetime.datetime.now(datetime.timezone.utc)
    limits = [
        f"{name}={shlex.quote(os.environ[name])}"
        for name in ENVIRONMENT
        if name in os.environ
    ]
    script = shlex.join(["python", "benchmarks/run.py", *arguments])

    def of_suites(choice: int | None, name: str) -> dict[str, Any]:
        """Returns, by operator, the user's choice or the suite's default."""
        return {
            op: getattr(suite, name) if choice is None else choice
            for op, suite in suites(options.device).items()
        }

    report = {
        "complete": False,
        "date": now.isoformat("T", "seconds"),
        "command": " ".join([*limits, script]),
        "device": options.device,
        "emulated": options.emulate,
        "machine": machine.describe()
        | ({} if on_cpu else machine.describe_cuda()),
        "instruction_set": None,
        "versions": {},
        "settings": {
            "dtype": "float32",
            "mask": not options.no_mask,
            "repeats": of_suites(options.repeats, "repeats"),
            "memory_repeats": of_suites(
                options.memory_repeats if on_cpu else 0, "memory_repeats"
            ),
            "baseline": "tf_deform on the CPU in float64",
            "ratio_to": of_suites(None, "ratio_to"),
            "tolerance": {
                name: TOLERANCES[name] for name in options.precisions
            },
        },
        "load_average": {"before": machine.load()},
        "peaks": {},
        "missing": {},
        "errors": [],
        "rows": [],
    }
    if on_cpu:
        report["instruction_set"] = machine.instruction_set()
        report["versions"] = machine.versions(PACKAGES)
        report["settings"] |= {
            "dtype": options.dtype,
            "baseline": options.baseline,
            "tolerance": TOLERANCES[options.dtype],
        }
    return report


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    report = new_report(options, arguments)
    report["complete"] = run_all(options, report)
    report["load_average"]["after"] = machine.load()
    save(options, report)
    print(document(options, report), end="")
    return 1 if reports.errors(report) else 0


if __name__ == "__main__":
    sys.exit(main())
