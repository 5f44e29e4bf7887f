# SPDX-License-Identifier: Apache-2.0
"""Compiles the C++ and CUDA sources: for setup.py, or the core alone.

The package has one core and, for each minor version of TensorFlow, a thin
library of ops that is linked to the core. The core needs neither TensorFlow nor
setuptools:

    python cc/build.py --output build/core.so

The core has kernels for the GPU if nvcc is found (see `find_nvcc`). An object
is compiled anew only if its command, its compiler or the contents of a file
that it was made from changed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import glob
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# These are the same globs as in BUILD: a new op edits no build file.
CORE_SOURCES = "cc/core/**/*.cc"
CUDA_SOURCES = "cc/core/cuda/*.cu"  # BUILD has none of CUDA
GLUE_SOURCES = "cc/*.cc"
FLAGS = ["-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-ffp-contract=fast", "-g0", "-Wall", "-Wno-psabi", "-I."]
FLAGS += ["-fwrapv"]  # Python's own flag for extensions: it changes the code
CUDA_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-I.", "-Xptxas", "-v"]
CUDA_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wno-psabi"]
# TensorFlow's wheels are compiled with the same flags (tf.sysconfig).
GLUE_FLAGS = ["-std=c++17", "-D_GLIBCXX_USE_CXX11_ABI=1"]
GLUE_FLAGS += ["-DEIGEN_MAX_ALIGN_BYTES=64"]
# TensorFlow's headers deprecate names that their own macros use.
GLUE_FLAGS += ["-Wno-deprecated-declarations"]
# nvcc makes machine code for these GPUs; PTX of the last one serves newer GPUs.
ARCHITECTURES = "80;89;90"


class Cuda(NamedTuple):
    """Describes a CUDA compiler and the GPUs to compile for."""

    nvcc: str
    version: str  # as in "13.0"
    runtime: str  # path of the static library
    architectures: tuple[str, ...]  # as in ("80", "90")


class Step(NamedTuple):
    """Describes one source, and the command that compiles it, without `-o`."""

    source: str
    object: str
    command: list[str]


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the path of nvcc, or None: build for the CPU only.

    The environment variable TF_DEFORM_NVCC names nvcc, or turns it off if it is
    empty or "0". Without the variable, nvcc is searched for in CUDA_HOME, PATH
    and /usr/local/cuda.
    """
    named = environ.get("TF_DEFORM_NVCC")
    if named in ("", "0"):
        return None
    if named is not None:
        found = shutil.which(named, path=environ.get("PATH"))
        if found is None:
            sys.exit(
                "Expected TF_DEFORM_NVCC to name nvcc, or 0 to build for the "
                f"CPU only. Received: {named!r}, which is no program."
            )
        return found
    for folder in (
        os.path.join(environ.get("CUDA_HOME") or "/nonexistent", "bin"),
        environ.get("PATH", os.defpath),
        "/usr/local/cuda/bin",
    ):
        if found := shutil.which("nvcc", path=folder):
            return found
    return None


def _output(command: list[str]) -> str:
    """Returns the text that a compiler prints about itself."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode != 0:
        sys.exit(
            f"Expected `{shlex.join(command)}` to run. Received:\n"
            f"{result.stdout}"
        )
    return result.stdout


def find_cuda(
    architectures: str | None = None, environ: Mapping[str, str] = os.environ
) -> Cuda | None:
    """Returns the CUDA compiler, or None: build for the CPU only.

    `architectures` is a list like "80;90". Its default is the environment
    variable TF_DEFORM_CUDA_ARCHITECTURES, or else ARCHITECTURES.
    """
    nvcc = find_nvcc(environ)
    if nvcc is None:
        return None
    if architectures is None:
        architectures = environ.get("TF_DEFORM_CUDA_ARCHITECTURES")
    names = tuple((architectures or ARCHITECTURES).replace(";", " ").split())
    version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    # `nvcc` may be a script or a link, so its own output says where CUDA lies.
    plan = _output([nvcc, "--dryrun", "-shared", "x.o", "-o", "x.so"])
    top = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    folders = [
        argument.removeprefix("-L")
        for line in re.findall(r"^#\$ LIBRARIES=(.*)$", plan, re.MULTILINE)
        for argument in shlex.split(line)
    ]
    if top:
        folders += [os.path.join(top[1], name) for name in ("lib64", "lib")]
    for folder in folders:
        path = os.path.join(folder, "libcudart_static.a")
        if version and os.path.exists(path):
            return Cuda(nvcc, version[1], os.path.realpath(path), names)
    sys.exit(
        f"Expected {nvcc} to tell its release and to have libcudart_static.a "
        f"in one of {folders}. Received: neither or one of both. Set "
        "TF_DEFORM_NVCC to another nvcc, or to 0 to build for the CPU only."
    )


def describe(cuda: Cuda | None) -> str:
    """Returns one line for the person who builds."""
    if cuda is None:
        return (
            "tf_deform: building for the CPU only, without GPU kernels: no "
            "nvcc (see TF_DEFORM_NVCC in CONTRIBUTING.md)"
        )
    return (
        f"tf_deform: building for the CPU and, with CUDA {cuda.version} "
        f"({cuda.nvcc}), for GPUs of architecture "
        f"{', '.join(cuda.architectures)} and newer"
    )


def _steps(pattern: str, folder: str, command: list[str]) -> list[Step]:
    pattern = os.path.join(glob.escape(ROOT), pattern)
    sources = [
        os.path.relpath(path, ROOT)
        for path in sorted(glob.glob(pattern, recursive=True))
    ]
    return [
        Step(source, f"{os.path.join(folder, source)}.o", command)
        for source in sources
    ]


def cxx() -> list[str]:
    """Returns the C++ compiler's command."""
    return shlex.split(os.environ.get("CXX", "c++"))


def cxx_steps(
    pattern: str, folder: str, cuda: Cuda | None, flags: list[str]
) -> list[Step]:
    """Returns the steps that compile C++ sources to objects in `folder`."""
    command = [*cxx(), *FLAGS, *flags]
    if cuda:
        command.append("-DTF_DEFORM_CUDA")
    command += shlex.split(os.environ.get("CXXFLAGS", ""))
    return _steps(pattern, folder, command)


def core_steps(folder: str, cuda: Cuda | None) -> list[Step]:
    """Returns the steps that compile the core to objects in `folder`."""
    steps = cxx_steps(CORE_SOURCES, folder, cuda, ["-std=c++17"])
    if cuda is None:
        return steps
    command = [cuda.nvcc, *CUDA_FLAGS]
    if "CXX" in os.environ:
        command += ["-ccbin", os.environ["CXX"]]
    for name in cuda.architectures:
        # The sources ask for a GPU's generation only, such as 8 of "80" and
        # "89", so nvcc reads them once for its oldest GPU: the machine code is
        # the same.
        oldest = min(a for a in cuda.architectures if a[:-1] == name[:-1])
        command.append(f"-gencode=arch=compute_{oldest},code=sm_{name}")
    # An architecture with a letter, like 90a, fits one GPU only and has no PTX.
    newest = re.sub(r"\D", "", cuda.architectures[-1])
    command.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    device_steps = _steps(CUDA_SOURCES, folder, command)
    # Shares processors that have no source of their own among the GPU sources:
    # nvcc uses them to compile for several GPUs at once.
    threads = (os.cpu_count() or 1) // max(1, len(device_steps))
    if threads > 1:
        command.append(f"--threads={threads}")
    # The slowest steps come first, as all other steps wait for them.
    return device_steps + steps


def has_xla(include: str) -> bool:
    """Tells whether TensorFlow's headers have XLA's C interface."""
    return os.path.exists(os.path.join(include, "xla/ffi/api/c_api.h"))


def glue_steps(
    include: str, version: str, folder: str, cuda: Cuda | None
) -> list[Step]:
    """Returns the steps that compile the glue for a TensorFlow.

    Args:
        include: The folder of TensorFlow's headers.
        version: TensorFlow's version: objects lie in a folder of this name, as
            the paths of the headers do not always tell it.
        folder: Where the objects are kept.
        cuda: The compiler of the core's GPU kernels, if it has any.
    """
    # -isystem suppresses warnings about the headers.
    flags = [*GLUE_FLAGS, f'-DTF_DEFORM_TENSORFLOW="{version}"']
    flags.append(f"-isystem{include}")
    if has_xla(include):
        flags += [
            f"-isystem{os.path.join(include, 'external', name)}"
            for name in ("highwayhash", "farmhash_archive/src")
        ]
    folder = os.path.join(folder, f"tensorflow-{version}")
    return cxx_steps(GLUE_SOURCES, folder, cuda, flags)


@functools.cache
def _version(compiler: str) -> str:
    return _output([compiler, "--version"])


def _fingerprint(step: Step) -> str | None:
    """Hashes all files that made the object; None if they are not known."""
    try:
        with open(f"{step.object}.d") as file:
            rule = file.read().replace("\\\n", " ")
        found = hashlib.sha256(repr(step.command).encode())
        found.update(_version(step.command[0]).encode())
        for name in shlex.split(rule.partition(": ")[2]):
            with open(os.path.join(ROOT, name), "rb") as file:
                content = file.read()
            found.update(f"{name} {len(content)} ".encode() + content)
        return found.hexdigest()
    except OSError:
        return None


def _read(path: str) -> str | None:
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return file.read()


# Matches the lines of ptxas about kernels, which go to the file beside the
# object.
_PTXAS = re.compile(r"ptxas info|\s*\d+ bytes stack frame")


def _compile(step: Step) -> str:
    mark = f"{step.object}.fingerprint"
    recorded = _read(mark)
    if recorded and os.path.exists(step.object):
        if recorded == _fingerprint(step):
            return step.object
    os.makedirs(os.path.dirname(step.object), exist_ok=True)
    if recorded:
        os.remove(mark)
    command = [*step.command, "-MMD", "-MF", f"{step.object}.d"]
    command += ["-c", step.source, "-o", step.object]
    result = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with open(f"{step.object}.txt", "w") as file:
        file.write(result.stdout)
    for line in result.stdout.splitlines():
        if not _PTXAS.match(line):
            print(line, flush=True)
    if result.returncode != 0:
        sys.exit(
            f"Expected {step.source} to compile. Received the errors above "
            f"from: {shlex.join(command)}"
        )
    with open(mark, "w") as file:
        file.write(_fingerprint(step) or "")
    return step.object


def compile_all(steps: Iterable[Step]) -> list[str]:
    """Runs the steps, as many at once as there are processors.

    Returns the paths of the objects. The output of the compilers is kept beside
    each object, in `.txt`.
    """
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [pool.submit(_compile, step) for step in steps]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def core_name(version: str) -> str:
    """Returns the file name of the core.

    It has the version, as a process takes libraries of one name for the same,
    and may load two versions of the package.
    """
    return f"libtf_deform_core-{version}.so"


def ops_name(tensorflow: str) -> str:
    """Returns the file name of the op library for a TensorFlow version."""
    return f"_ops_{minor(tensorflow)}.so"


def minor(version: str) -> str:
    """Returns "2.21" of "2.21.0"."""
    return ".".join(version.split(".")[:2])


def link(
    output: str,
    objects: list[str],
    flags: list[str],
    linker: list[str] | None = None,
) -> None:
    """Makes a shared object, whose name for linkers is its file name."""
    command = [*(linker or cxx()), "-shared", *objects, *flags]
    command.append(f"-Wl,-soname,{os.path.basename(output)}")
    command += shlex.split(os.environ.get("LDFLAGS", ""))
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    # The library replaces the old file by a rename, so that a process that has
    # the old file open keeps it whole.
    subprocess.run([*command, "-o", f"{output}.new"], check=True)
    os.replace(f"{output}.new", output)


def link_core(
    output: str,
    objects: list[str],
    cuda: Cuda | None,
    flags: Sequence[str] = (),
    linker: list[str] | None = None,
) -> None:
    """Makes the library of the core."""
    script = os.path.join(ROOT, "cc", "core.map")
    own = [f"-Wl,--version-script={script}", "-lpthread"]
    if cuda:
        # TensorFlow brings a CUDA runtime of another version, with the same
        # symbols. The static runtime is linked into the library, so that it is
        # found before TensorFlow's libraries.
        own += [cuda.runtime, "-ldl", "-lrt"]
    link(output, objects, [*own, *flags], linker)


def link_ops(
    output: str,
    objects: list[str],
    core: str,
    flags: Sequence[str],
    linker: list[str] | None = None,
) -> None:
    """Makes a library of ops, which finds the core in its own folder."""
    link(output, objects, [core, "-Wl,-rpath,$ORIGIN", *flags], linker)


def build_info(
    version: str, cuda: Cuda | None, libraries: Mapping[str, bool]
) -> str:
    """Returns the module that tells the package what was built.

    Args:
        version: The package's version.
        cuda: The compiler of the GPU kernels, if there are any.
        libraries: The full versions of TensorFlow that there is a library for,
            and whether it connects the ops with XLA.
    """
    built = "".join(
        f'    "{minor(full)}": ("{full}", {xla}),\n'
        for full, xla in libraries.items()
    )
    return (
        '"""Tells what was built."""\n\n'
        f'VERSION = "{version}"\n'
        f'CORE = "{core_name(version)}"\n'
        f"CUDA_VERSION = {cuda and cuda.version!r}\n"
        f"CUDA_ARCHITECTURES = {cuda and ';'.join(cuda.architectures)!r}\n"
        "# By TensorFlow's minor version: the version whose headers the op\n"
        "# library was compiled with, and whether it has ops for XLA.\n"
        f"LIBRARIES = {{\n{built}}}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Builds the core alone.")
    parser.add_argument(
        "--output", required=True, help="path of the shared object"
    )
    parser.add_argument(
        "--objects",
        default=os.path.join(ROOT, "build", "core"),
        help="folder of what is kept for the next build (%(default)s)",
    )
    parser.add_argument(
        "--architectures",
        help=f'the GPUs, as in "80;90" (default: "{ARCHITECTURES}")',
    )
    arguments = parser.parse_args()
    cuda = find_cuda(arguments.architectures)
    print(describe(cuda), flush=True)
    objects = compile_all(core_steps(os.path.abspath(arguments.objects), cuda))
    link_core(arguments.output, objects, cuda)


if __name__ == "__main__":
    main()
