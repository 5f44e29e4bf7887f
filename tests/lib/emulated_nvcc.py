# SPDX-License-Identifier: Apache-2.0
"""Replaces nvcc: compiles the CUDA sources for the host.

A build with TF_DEFORM_NVCC set to the result of `install` has GPU kernels that
run thread by thread on emulated blocks (emulated_cuda.h).
"""

import argparse
import os
import pathlib
import shlex
import stat
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-I."]
FLAGS += ["-Wno-attributes", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += ["-include", "tests/lib/emulated_cuda.h", "-x", "c++"]


def install(folder: pathlib.Path) -> str:
    """Writes a program `nvcc`, and an empty CUDA runtime beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "libcudart_static.a").write_bytes(b"!<arch>\n")
    nvcc = folder / "nvcc"
    command = shlex.join([sys.executable, __file__, "--folder", str(folder)])
    nvcc.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return str(nvcc)


def main() -> int:
    # The options of nvcc that cc/build.py uses.
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--folder")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--dryrun", action="store_true")
    parser.add_argument("-c", dest="source")
    parser.add_argument("-o", dest="output")
    parser.add_argument("-MF", dest="dependencies")
    options, _ = parser.parse_known_args()
    if options.version:
        # Objects are compiled anew if this text changes.
        print(f"Emulated compilation tools, release 13.0, flags {FLAGS}")
        return 0
    if options.dryrun:
        print(f"#$ LIBRARIES={shlex.quote('-L' + options.folder)}")
        return 0
    source = options.source
    if os.path.basename(source) == "device.cu":  # asks the driver
        source = "tests/lib/emulated_cuda.cc"
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS]
    command += ["-MMD", "-MF", options.dependencies]
    command += ["-c", source, "-o", options.output]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
