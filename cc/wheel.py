# SPDX-License-Identifier: Apache-2.0
"""Builds the wheels of a release: `make wheel`.

    python cc/wheel.py --out dist
    python cc/wheel.py --tensorflow 2.15.1 2.21.0

One wheel holds the core and an op library for each version of TensorFlow; a
second one, `py3-none-any`, holds no library and runs the portable ops. The
headers of each TensorFlow come from its wheel on the package index, and are
kept in a cache; no header is part of a wheel. The same sources give the same
bytes.

The objects are compiled as always, and linked by zig against the symbols of an
old glibc, so that the wheel installs wherever TensorFlow does. A wheel without
GPU kernels, because there is no nvcc, has a version that ends with "+cpu".
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

import build

with open(os.path.join(build.ROOT, "setup.py")) as setup:
    VERSION = re.search(r'^VERSION = "(.+)"$', setup.read(), re.MULTILINE)[1]
# The last patch version of each minor version: patch versions are
# interchangeable.
TENSORFLOW = ("2.15.1", "2.16.2", "2.17.1", "2.18.1", "2.19.1", "2.20.0")
TENSORFLOW += ("2.21.0",)
# Any of TensorFlow's wheels has the headers.
_WHEEL = ["--python-version=3.11", "--implementation=cp", "--abi=cp311"]
_WHEEL += ["--platform=manylinux_2_17_x86_64", "--only-binary=:all:"]
_WHEEL += ["--platform=manylinux_2_27_x86_64", "--no-deps"]
GLIBC = (2, 17)  # the symbols that the libraries may need
TAG = "manylinux_2_28_x86_64"
_CACHE = os.path.join(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),
    "tf_deform",
)
# The op libraries name TensorFlow's own libraries, which `import tensorflow`
# has loaded; empty ones of these names stand for them when they are linked.
_TENSORFLOW_LIBRARIES = (
    "libtensorflow_framework.so.2",
    "libtensorflow_cc.so.2",
)


def fetch_headers(version: str, cache: str) -> str:
    """Returns the folder of a TensorFlow's headers; fetches its wheel once."""
    include = os.path.join(cache, f"tensorflow-{version}", "include")
    if os.path.isdir(include):
        return include
    print(
        f"tf_deform: fetching the headers of TensorFlow {version}", flush=True
    )
    os.makedirs(cache, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _run(
            [sys.executable, "-m", "pip", "download", "--quiet", *_WHEEL]
            + [f"--dest={folder}", f"tensorflow-cpu=={version}"]
        )
        (name,) = os.listdir(folder)
        with zipfile.ZipFile(os.path.join(folder, name)) as wheel:
            members = [
                member
                for member in wheel.namelist()
                if member.startswith("tensorflow/include/")
            ]
            wheel.extractall(folder, members)
        # A rename at the end leaves no half of the headers.
        os.makedirs(os.path.dirname(include), exist_ok=True)
        os.rename(os.path.join(folder, "tensorflow", "include"), include)
    return include


def linker() -> list[str]:
    """Returns the command that links for an old glibc.

    It is zig as a linker of C, with the compiler's own libraries for C++: zig's
    C++ library is not the one that TensorFlow uses.
    """
    target = f"x86_64-linux-gnu.{'.'.join(map(str, GLIBC))}"
    return [sys.executable, "-m", "ziglang", "cc", "-target", target, "-s"]


def _compilers_library(name: str) -> str:
    return _run([*build.cxx(), f"-print-file-name={name}"]).strip()


def _run(command: Sequence[str], **options) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    if result.returncode != 0:
        sys.exit(
            f"Expected `{shlex.join(command)}` to run. Received:\n"
            f"{result.stdout}{result.stderr}"
        )
    return result.stdout


def build_libraries(
    out: str, versions: Sequence[str], cache: str, objects: str
) -> build.Cuda | None:
    """Compiles and links all libraries of a wheel to the folder `out`.

    Returns:
        The compiler of the GPU kernels, if there are any.
    """
    cuda = build.find_cuda()
    print(build.describe(cuda), flush=True)
    includes = {version: fetch_headers(version, cache) for version in versions}
    # Messages of failed checks name files: the flag takes the folder out.
    os.environ["CXXFLAGS"] = shlex.join(
        ["-include", "cc/manylinux/old_libstdcxx.h"]
        + [f"-ffile-prefix-map={cache}/="]
    )
    # Otherwise nvcc makes up names.
    os.environ["NVCC_APPEND_FLAGS"] = "-frandom-seed=tf_deform"
    steps = {
        version: build.glue_steps(include, version, objects, cuda)
        for version, include in includes.items()
    }
    steps["core"] = build.core_steps(objects, cuda)
    steps["shim"] = build.cxx_steps(
        "cc/manylinux/*.cc", objects, None, ["-std=c++17"]
    )
    made = iter(build.compile_all(itertools.chain(*steps.values())))
    made = {
        name: list(itertools.islice(made, len(steps[name]))) for name in steps
    }

    link = linker()
    cxx = [_compilers_library(n) for n in ("libstdc++.so.6", "libgcc_s.so.1")]
    core = os.path.join(out, build.core_name(VERSION))
    build.link_core(core, made["core"] + made["shim"], cuda, cxx, link)
    with tempfile.TemporaryDirectory() as folder:
        empty = [os.path.join(folder, name) for name in _TENSORFLOW_LIBRARIES]
        for path in empty:
            build.link(path, made["shim"], cxx, link)
        for version in versions:
            build.link_ops(
                os.path.join(out, build.ops_name(version)),
                made[version] + made["shim"],
                core,
                ["-Wl,--no-as-needed", *empty, *cxx],
                link,
            )
    libraries = {v: build.has_xla(include) for v, include in includes.items()}
    with open(os.path.join(out, "_build_info.py"), "w") as file:
        file.write(build.build_info(VERSION, cuda, libraries))
    return cuda


def pack(libraries: str, out: str, tag: str, local: str) -> str:
    """Makes a wheel of a folder of libraries; returns its path."""
    with tempfile.TemporaryDirectory() as folder:
        _run(
            [sys.executable, "setup.py", "--quiet"]
            + ["egg_info", f"--egg-base={folder}"]
            + ["build", f"--build-base={folder}"]
            + ["bdist_wheel", f"--dist-dir={folder}", f"--plat-name={tag}"]
            + [f"--bdist-dir={folder}/bdist"],
            cwd=build.ROOT,
            env={
                **os.environ,
                "TF_DEFORM_LIBRARIES": os.path.abspath(libraries),
                "TF_DEFORM_LOCAL_VERSION": local,
            },
        )
        (name,) = (n for n in os.listdir(folder) if n.endswith(".whl"))
        path = os.path.join(out, name)
        os.makedirs(out, exist_ok=True)
        _normalize(os.path.join(folder, name), f"{path}.new")
    os.replace(f"{path}.new", path)
    return path


def _normalize(source: str, target: str) -> None:
    """Writes a wheel whose bytes depend on the contents of its files alone."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            entry = zipfile.ZipInfo(info.filename, (1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o100644 << 16
            new.writestr(entry, old.read(info), zipfile.ZIP_DEFLATED, 9)


def audit(wheel: str) -> None:
    """Checks that a wheel fits the platform of its name.

    Raises:
        SystemExit: It needs a newer one, or libraries that no system has.
    """
    said = _run([sys.executable, "-m", "auditwheel", "show", "--json", wheel])
    found = json.loads(said)
    oldest, promised = (
        [int(number) for number in re.findall(r"_(\d+)", tag)[:2]]
        for tag in (found["sym_tag"], TAG)
    )
    others = found["external_libs"].keys() - {*_TENSORFLOW_LIBRARIES}
    if oldest > promised or others:
        sys.exit(
            f"Expected {wheel} to need nothing newer than {TAG}, and no "
            f"library besides TensorFlow's. Received: {found['sym_tag']}, "
            f"{sorted(others)}"
        )
    print(f"tf_deform: {os.path.basename(wheel)} fits {found['sym_tag']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Builds the wheels of a release."
    )
    parser.add_argument("--out", default=os.path.join(build.ROOT, "dist"))
    parser.add_argument(
        "--tensorflow",
        nargs="+",
        default=TENSORFLOW,
        metavar="VERSION",
        help=f"the versions to build for (default: {' '.join(TENSORFLOW)})",
    )
    parser.add_argument(
        "--cache", default=_CACHE, help="folder of headers (%(default)s)"
    )
    parser.add_argument(
        "--objects",
        default=os.path.join(build.ROOT, "build", "wheel"),
        help="folder of what is kept for the next build (%(default)s)",
    )
    arguments = parser.parse_args()
    versions = sorted(arguments.tensorflow, key=lambda v: int(v.split(".")[1]))
    with tempfile.TemporaryDirectory() as folder:
        cuda = build_libraries(
            folder,
            versions,
            os.path.abspath(arguments.cache),
            os.path.abspath(arguments.objects),
        )
        local = "" if cuda else "+cpu"
        wheels = [pack(folder, arguments.out, TAG, local)]
        audit(wheels[0])
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "_build_info.py"), "w") as file:
            file.write(build.build_info(VERSION, None, {}))
        wheels.append(pack(folder, arguments.out, "any", ""))
    for wheel in wheels:
        print(f"{os.path.getsize(wheel) / 1e6:.2f} MB  {wheel}")


if __name__ == "__main__":
    main()
