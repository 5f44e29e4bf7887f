# SPDX-License-Identifier: Apache-2.0
"""How near `tf_deform`'s convolution comes to what the machine can do.

    python benchmarks/run.py --ops conv --json results.json
    python benchmarks/roofline.py results.json

It measures the machine's peaks (`peaks.cc`, compiled on the fly), reads times
from results of `run.py`, which must come from the same machine, and prints
Markdown. See README.md in this folder.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from typing import Any

import machine
from convolution import Case
from report import KINDS, TITLES, markdown
from worker import pin

# Other guests of the machine can slow it down for seconds; the best round
# counts.
ROUNDS = 3
# Maps an instruction set of `tf_deform` to the bits of its vectors.
BITS = {
    "amx": 512,
    "avx512_bf16": 512,
    "avx512": 512,
    "avx2": 256,
    "baseline": 128,
}


def flop(case: Case, kind: str) -> int:
    """Returns the floating-point operations of a call; a multiply-add is two.

    It counts the matrix products and the work for every channel of every
    sample. Forward reads four neighbours and applies the mask: four
    multiply-adds and one multiplication. Backward has two more products, adds
    to the gradient of four neighbours, and multiplies the same four neighbours
    with the sample's gradient for the gradients of offset and mask: eight
    multiply-adds. It does not count a second sampling for the kernel's
    gradient, nor coordinates and weights, which all channels share.
    """
    pixels = math.prod(case.output_shape[:3])
    product = case.product_flop
    samples = pixels * case.taps * case.channels
    if kind == "forward":
        return product + 9 * samples
    return 3 * product + (9 + 16) * samples


def split_work(case: Case, kind: str) -> tuple[int, int, int]:
    """Returns floating-point operations of products and of sampling, and bytes.

    The bytes are those that sampling reads from, and writes to, caches: for
    every channel of a sample forward reads four neighbours and writes a column;
    backward reads a column's gradient and the four neighbours again, and reads
    and writes the gradient of the four neighbours.
    """
    product = case.product_flop * (1 if kind == "forward" else 3)
    samples = math.prod(case.output_shape[:3]) * case.taps * case.channels
    numbers = 5 if kind == "forward" else 5 + 13
    return product, flop(case, kind) - product, 4 * numbers * samples


def compulsory_bytes(case: Case, kind: str) -> int:
    """Returns bytes of operands and results, each read or written once.

    The operands of forward + backward are the gradient that arrives at the
    output and the operands of forward; the results are the output and all
    gradients.
    """
    pixels = math.prod(case.output_shape[:3])
    inputs = case.batch * case.height * case.width * case.channels
    kernel = case.taps * case.channels // case.groups * case.filters
    offset_and_mask = pixels * case.offset_taps * (2 + case.with_mask)
    operands, output = inputs + kernel + offset_and_mask, pixels * case.filters
    if kind == "forward":
        return 4 * (operands + output)
    return 4 * (2 * operands + 2 * output)


def measure_peaks(counts: list[int]) -> dict[int, dict[str, float]]:
    """Measures GFLOP/s and GB/s by threads, named as in `peaks.cc`."""
    source = os.path.join(os.path.dirname(__file__), "peaks.cc")
    flags = ["-O3", "-march=native", "-std=c++17", "-pthread"]
    peaks: dict[int, dict[str, float]] = {count: {} for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "peaks")
        compiler = os.environ.get("CXX", "c++")
        subprocess.run([compiler, *flags, source, "-o", program], check=True)
        for threads in ROUNDS * counts:
            output = subprocess.run(
                [program, str(threads)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                # Uses the same processors as the benchmark.
                preexec_fn=lambda threads=threads: pin(threads),
            ).stdout
            for name, value in map(str.split, output.splitlines()):
                best = max(float(value), peaks[threads].get(name, 0.0))
                peaks[threads][name] = best
    return peaks


# Prints GFLOP/s of TensorFlow's product of two matrices of 2048 x 2048.
SGEMM = """
import sys
import tensorflow as tf
import timing
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
a = tf.random.normal((2048, 2048))
ms = timing.medians({"": lambda: tf.matmul(a, a).numpy()}, 15, untimed=2)
print(2 * 2048**3 / ms[""] / 1e6)
"""


def measure_sgemm(threads: int, bits: int | None) -> float:
    """Measures the matrix product of the library that convolves plainly.

    NumPy's is no measure: its OpenBLAS leaves half of the vectors of some
    processors unused.
    """
    environment = dict(os.environ)
    if bits == 256:
        environment["ONEDNN_MAX_CPU_ISA"] = "AVX2"
    result = subprocess.run(
        [sys.executable, "-c", SGEMM, str(threads)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=os.path.dirname(os.path.abspath(__file__)),
        preexec_fn=lambda: pin(threads),
    )
    return float(result.stdout)


def last_level_bytes() -> int:
    """Returns the size of the largest cache; 0 if that is not known."""
    folder = "/sys/devices/system/cpu/cpu0/cache"
    sizes = [0]
    for index in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, index, "size")
        if os.path.exists(path):
            with open(path, encoding="ascii") as file:
                sizes.append(1024 * int(file.read().strip().removesuffix("K")))
    return max(sizes)


def reachable(peaks: dict[str, float], instruction_set: str | None) -> str:
    """Names the peak of a matrix microkernel with the code's vectors."""
    name = f"kernel.{BITS.get(instruction_set)}"
    # Otherwise takes the widest vectors, which come first.
    return name if name in peaks else next(n for n in peaks if "kernel" in n)


def describe(
    row: dict[str, Any], kind: str, peaks: dict[str, float], sgemm: float
) -> list[str]:
    """Returns the cells of a line of the table."""
    kernel = reachable(peaks, row["instruction_set"])
    case = Case.parse(row["shape"], "float32", row["mask"])
    work, size = flop(case, kind), compulsory_bytes(case, kind)
    level = "last_level" if size <= last_level_bytes() else "memory"
    limits = {
        name: amount / peaks[name] / 1e6
        for name, amount in ((kernel, work), (f"read.{level}", size))
    }
    limit = max(limits, key=limits.get)
    time = row[kind]["median_ms"]
    product, sampling, moved = split_work(case, kind)
    product_ms = product / peaks[kernel] / 1e6
    sampling_ms = max(
        sampling / peaks[kernel], moved / peaks["read.second_level"]
    )
    sampling_ms /= 1e6
    return [
        row["shape"],
        str(row["threads"]),
        TITLES[kind],
        f"{work / 1e9:.2f}",
        f"{size / 1e6:.1f}",
        f"{time:.2f}",
        f"{work / time / 1e6:.0f}",
        f"{work / time / 1e6 / sgemm:.0%}",
        f"{product_ms:.2f}",
        f"{sampling_ms:.2f}",
        f"{time - product_ms - sampling_ms:.2f}",
        f"{limits[limit]:.2f}",
        limit,
        f"{limits[limit] / time:.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", help="written by run.py --json")
    parser.add_argument(
        "--threads", nargs="+", type=int, help="of which rows (default: all)"
    )
    options = parser.parse_args()
    rows = []
    for path in options.results:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        settings = report["settings"]
        if settings["dtype"] != "float32":
            parser.error(f"{path}: expected float32, not {settings['dtype']}")
        shared = {
            "mask": settings["mask"],
            "instruction_set": report.get("instruction_set"),
        }
        rows += [
            row | shared
            for row in report["rows"]
            if row["contender"] == "tf_deform"
            and row["op"].startswith("conv")
            and row["threads"] in (options.threads or [row["threads"]])
        ]
    if not rows:
        parser.error("expected rows of tf_deform's convolution; there are none")
    counts = sorted({row["threads"] for row in rows})
    peaks = measure_peaks(counts)
    bits = {row["instruction_set"]: None for row in rows}
    sgemm = {
        (threads, isa): measure_sgemm(threads, BITS.get(isa))
        for threads in counts
        for isa in bits
    }

    about = machine.describe()
    command = shlex.join(["python", "benchmarks/roofline.py", *sys.argv[1:]])
    print(f"`{command}`: {about['cpu']}, {about['processors']} processors\n")
    names = list(
        dict.fromkeys(name for peak in peaks.values() for name in peak)
    )
    table = [
        [str(threads), *(f"{peak[name]:.0f}" for name in names)]
        for threads, peak in peaks.items()
    ]
    print(markdown(["threads", *names], table) + "\n")
    for (threads, isa), rate in sgemm.items():
        print(f"sgemm, {threads} threads, {isa}: {rate:.0f} GFLOP/s\n")
    header = (
        "shape, threads, kind, GFLOP, MB, ms, GFLOP/s, of sgemm, products ms, "
        "sampling ms, rest ms, limit ms, limit set by, share of limit"
    )
    table = [
        describe(
            row,
            kind,
            peaks[row["threads"]],
            sgemm[row["threads"], row["instruction_set"]],
        )
        for row in rows
        for kind in KINDS
        if kind in row
    ]
    print(markdown(header.split(", "), table))


if __name__ == "__main__":
    main()
