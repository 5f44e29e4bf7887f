# SPDX-License-Identifier: Apache-2.0
"""Describes the machine and the installed packages, for readers of results."""

import contextlib
import ctypes
import glob
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from typing import Any

from processes import run_program

INSTRUCTION_SETS = re.compile(
    r"sse4_2|avx.*|fma|f16c|amx.*|asimd.*|sve.*|bf16|i8mm"
)


def count_processors() -> int:
    """Returns the number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def instruction_set() -> str | None:
    """Returns the instruction set of `tf_deform` in this environment."""
    spec = importlib.util.find_spec("tf_deform")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for path in glob.glob(os.path.join(folder, "libtf_deform_core-*.so")):
            name = ctypes.CDLL(path).TfDeformInstructionSet
            name.restype = ctypes.c_char_p
            return name().decode()
    return None


def describe() -> dict[str, Any]:
    """Returns facts that explain the numbers; none names the host."""
    fields, memory = {}, None
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        text = file.read()
        fields = dict(re.findall(r"^(.*?)\s*:[ \t]*(.*)$", text, re.M))
    with contextlib.suppress(AttributeError, ValueError, OSError):
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = round(pages / 2**30, 1)
    model = platform.processor() or platform.machine()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": fields.get("model name", model),
        "architecture": platform.machine(),
        "processors": count_processors(),
        "instruction_sets": [f for f in flags if INSTRUCTION_SETS.fullmatch(f)],
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.release()}",
    }


def ask_driver(field: str) -> str:
    """Returns a field that nvidia-smi prints about the first GPU."""
    query = [f"--query-gpu={field}", "--format=csv"]
    return _first_match(["nvidia-smi", *query], r"\n(.*)")


def describe_cuda() -> dict[str, str]:
    """Returns the versions of the driver and of nvcc."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return {
        "driver": ask_driver("driver_version"),
        "nvcc": _first_match([nvcc, "--version"], r"release ([\d.]+)"),
    }


def _first_match(command: list[str], pattern: str) -> str:
    """Returns the text that the pattern's group matches in an output."""
    try:
        _, output = run_program(command, 60, stderr=subprocess.DEVNULL)
    except OSError:
        return "unknown"
    match = re.search(pattern, output)
    return match[1].strip() if match else "unknown"


def load() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
