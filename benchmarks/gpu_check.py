# SPDX-License-Identifier: Apache-2.0
"""Builds, times and tests the CUDA kernels on a machine without TensorFlow.

    python3 benchmarks/gpu_check.py --out FOLDER

It needs a GPU, nvcc and PyTorch. See "On a GPU" in README.md in this folder.
"""

import argparse
import ctypes
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import machine
from processes import run_program

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from cc import build  # noqa: E402

# The sections run in this order.
SECTIONS = ("table", "tests", "memcheck", "racecheck")
# Seconds after which a unit is ended. A unit of most sections is a test file; a
# unit of the table is a shape, whose limit is run.py's.
TIMEOUTS = {
    "build": 300,
    "tests": 120,
    "memcheck": 45,
    "racecheck": 30,
}
EMULATION = 20  # times slower than a GPU, about
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# The tools slow every kernel down by a factor of ten and more, so they run only
# the first few of a test's parametrised cases.
CHECK_CASES = {"memcheck": 2, "racecheck": 1}
CHECK_FAILED = 86  # compute-sanitizer's exit status if it finds an error
_FOUND = re.compile(r"=+ (Invalid|Error|Race|.*hazard)", re.MULTILINE)


# The functions below are about the machine.


def count_gpus() -> int:
    """Returns the number of GPUs the driver offers; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def find_missing(options: argparse.Namespace) -> list[str]:
    """Returns a list of missing requirements of this machine."""
    needed = {
        "a GPU with its driver": options.emulate or count_gpus(),
        "nvcc": options.emulate or options.core or build.find_nvcc(),
    }
    packages = {"torch": "PyTorch", "numpy": "NumPy", "pytest": "pytest"}
    for package, title in packages.items():
        needed[title] = importlib.util.find_spec(package)
    return [title for title, found in needed.items() if not found]


# The functions below choose and run sections and units.


def choose_cases(lines: list[str], each: int) -> list[str]:
    """Returns the first cases of every test that pytest has listed."""
    chosen: dict[str, list[str]] = {}
    for line in lines:
        name, _, _ = line.partition("[")
        if "::" in name and " " not in name:
            cases = chosen.setdefault(name, [])
            if len(cases) < each:
                cases.append(line.strip())
    return [line for cases in chosen.values() for line in cases]


def judge_check(
    status: int | None, printed: str, tests: int
) -> tuple[str, bool]:
    """Returns compute-sanitizer's findings, and whether they are a failure."""
    if "Device not supported" in printed:
        return "not run: the tool does not support this device", False
    if status is None:
        # The tool prints each finding at once.
        found = bool(_FOUND.search(printed))
        text = "errors until then" if found else "nothing found until then"
        return f"not finished in time; {text} ({tests} tests)", found
    summaries = re.findall(r"=+ (.*SUMMARY.*)", printed)
    text = summaries[-1] if summaries else f"exit status {status}"
    return f"{text} ({tests} tests)", status != 0


class Check:
    """Runs sections, unit by unit, and notes the outcome of each unit."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.out = pathlib.Path(options.out)
        self.lines: list[str] = []
        self.failed = False
        self.started = time.monotonic()
        self.folder = ROOT / "build" / "gpu_check"
        self.core = os.path.abspath(options.core or self.folder / "core.so")
        os.environ["TF_DEFORM_CORE"] = self.core
        os.environ["TF_DEFORM_TEST_GPU"] = "0" if options.emulate else "1"

    def close(self, unit: str, text: str, failed: bool = False) -> None:
        """Notes the outcome of a unit, so that a run that is ended keeps it."""
        self.failed |= failed
        line = f"{'FAILED ' if failed else ''}{unit}: {text}"
        self.lines.append(f"- {line}\n")
        (self.out / "summary.md").write_text("".join(self.lines))
        spent = time.monotonic() - self.started
        print(f"gpu-check, {spent:.0f} s: {line}", flush=True)

    def timeout(self, section: str) -> float:
        return TIMEOUTS[section] * (EMULATION if self.options.emulate else 1)

    def run(
        self, section: str, command: list[str], **environment: str
    ) -> tuple[int | None, str]:
        """Runs a program for a section's unit, and keeps its log."""
        status, output = run_program(
            command,
            self.timeout(section),
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | environment,
        )
        with open(self.out / f"{section}.log", "a") as log:
            log.write(output)
        return status, output

    def make(self) -> bool:
        """Builds the core and emulated kernels, unless they are given."""
        commands = []
        if not self.options.core:
            command = [sys.executable, "cc/build.py", "--output", self.core]
            command += ["--objects", str(self.folder / "objects")]
            if not self.options.emulate:
                command += find_architecture()
            commands.append(command)
        name = "TF_DEFORM_EMULATED_CORE"
        if self.options.emulate and name not in os.environ:
            path = os.environ[name] = str(self.folder / "emulated.so")
            script = f"import gpu; gpu.build_emulated({path!r})"
            commands.append([sys.executable, "-c", script])
        options = {"PYTHONPATH": str(ROOT / "tests" / "lib")}
        if self.options.emulate:
            options["TF_DEFORM_NVCC"] = "0"
        for command in commands:
            status, output = self.run("build", command, **options)
            if status != 0:
                print(output)
                how = "not finished" if status is None else "see build.log"
                self.close("build", how, failed=True)
                return False
        return True

    def table(self, arguments: list[str]) -> None:
        """Compares and times, each shape in a process of its own."""
        import run

        status = run.main([*arguments, "--out", str(self.out)])
        text = "see table.md" if status == 0 else "see ERROR in table.md"
        self.close("table", text, failed=status != 0)

    def tests(self, files: list[str]) -> None:
        """Runs the device tests."""
        command = [*PYTEST, "--maxfail=20"]
        # Uses several processes, as most of the time goes into expected results
        # in NumPy.
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        for file in files:
            status, output = self.run("tests", [*command, file])
            last = output.strip().splitlines() or ["no output"]
            text = last[-1].strip("= ")
            if status is None:
                text = f"not finished after {self.timeout('tests')} s"
            self.close(f"tests, {file}", text, failed=status != 0)

    def sanitize(self, tool: str, files: list[str]) -> None:
        """Runs a few of the tests under compute-sanitizer."""
        program = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path="/usr/local/cuda/bin"
        )
        if program is None:
            self.close(tool, "not run: no compute-sanitizer on this machine")
            return
        # Turns PyTorch's cache off, so that every tensor gets an allocation of
        # its own, whose bounds are known. PyTorch itself asks the driver for
        # features that may not exist, so errors of the driver's interface are
        # not reported.
        command = [program, "--tool", tool, "--report-api-errors", "no"]
        command += ["--error-exitcode", str(CHECK_FAILED), "--print-limit", "9"]
        # Leaves out tests with tensors of gigabytes, which would take all the
        # time.
        collect = [*PYTEST, "--collect-only", "-k", "not 32_bits"]
        for file in files:
            unit = f"{tool}, {file}"
            status, listed = self.run(tool, [*collect, file])
            chosen = choose_cases(listed.splitlines(), CHECK_CASES[tool])
            if status != 0 or not chosen:
                self.close(unit, "no tests could be collected", failed=True)
                continue
            status, printed = self.run(
                tool,
                [*command, *PYTEST, *chosen],
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
            self.close(unit, *judge_check(status, printed, len(chosen)))


def find_architecture() -> list[str]:
    """Returns the option for cc/build.py to build for this GPU only."""
    found = machine.ask_driver("compute_cap")
    if found == "unknown":
        return []
    return ["--architectures", found.replace(".", "")]


def choose_units(
    words: list[str], files: list[str], shapes: dict[str, Any]
) -> tuple[list[str], list[str], list[str]]:
    """Returns sections, words about the table, and test files.

    A word is a section, an operator, or a part of the name of a shape or of a
    test file. Without a section among the words, all sections that have a unit
    of these words are run.

    Raises:
        ValueError: if a word is of none of these kinds.
    """
    sections = [name for name in SECTIONS if name in words]
    words = [word for word in words if word not in SECTIONS]
    names = [shape for of_op in shapes.values() for shape in of_op]
    of_table = [
        word
        for word in words
        if word in shapes or any(word in name for name in names)
    ]
    for word in words:
        if word not in of_table and not any(word in file for file in files):
            raise ValueError(
                f"Expected a section ({', '.join(SECTIONS)}), or a part of a "
                f"shape or of the name of a test. Received: {word}"
            )
    if words:
        files = [file for file in files if any(w in file for w in words)]
    if not sections:
        sections = [
            name
            for name in SECTIONS
            if not words or (of_table if name == "table" else files)
        ]
    return sections, of_table, files


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Builds, times and tests the CUDA kernels on a machine "
        "with a GPU, nvcc and PyTorch, and no TensorFlow. Options of run.py "
        "such as --precisions and --repeats are for the table."
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help=f"sections ({', '.join(SECTIONS)}) and units: parts of shapes or "
        "of the names of tests, such as psroi or 56x56 (default: all)",
    )
    parser.add_argument(
        "--out",
        default=ROOT / "build" / "gpu_check",
        help="folder of the results (default: build/gpu_check)",
    )
    parser.add_argument(
        "--core", help="a core that is built already, by cc/build.py"
    )
    parser.add_argument(
        "--emulate",
        action="store_true",
        help="try this script on the CPU, with emulated kernels; its times "
        "mean nothing",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options, of_table = parser.parse_known_args(arguments)
    if found := find_missing(options):
        print(
            "gpu-check: expected a machine with a GPU, nvcc and PyTorch. "
            f"Missing: {', '.join(found)}.",
            file=sys.stderr,
        )
        return 1
    import run
    import worker

    files = sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests" / "core").glob("*_cuda_test.py")
    )
    shapes = {
        op: suite.quick_shapes if options.emulate else suite.shapes
        for op, suite in worker.suites("cuda").items()
    }
    try:
        sections, words, files = choose_units(options.only, files, shapes)
    except ValueError as error:
        parser.error(str(error))
    of_table += ["--device", "cuda", "--only", *(words or [""])]
    of_table += ["--emulate"] if options.emulate else []
    run.parse_arguments(of_table)  # errors come before anything is built
    check = Check(options)
    check.out.mkdir(parents=True, exist_ok=True)
    for log in check.out.glob("*.log"):
        log.unlink()  # it is the last run's: logs are appended to
    if check.make():
        for section in sections:
            if section == "table":
                check.table([*of_table, "--core", check.core])
            elif section == "tests":
                check.tests(files)
            else:
                check.sanitize(section, files)
    print("".join(["\n", *check.lines]), end="", flush=True)
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
