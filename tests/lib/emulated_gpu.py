# SPDX-License-Identifier: Apache-2.0
"""Runs TensorFlow with a GPU that is the processor, where there is no GPU.

The device is a plugin (emulated_gpu.cc). A tf_deform that was built with
emulated CUDA kernels (emulated_nvcc.py) runs its GPU kernels on it as
TensorFlow runs kernels on a GPU: registration, placement, memory, streams.
TensorFlow's own kernels fail there, because they ask for CUDA.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

import gpu
import pytest
import tensorflow as tf

import tf_deform

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 600  # seconds, at most, for a build or a script
PLUGIN = "tests/lib/emulated_gpu.cc"
# Files that the package is made of.
PACKAGE = ["*.py", "cc/*.py", "cc/**/*.cc", "cc/**/*.cu", "cc/**/*.h"]
PACKAGE += ["tf_deform/**/*.py", "tests/lib/emulated_[cn]*", "tests/lib/gpu.py"]

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None, reason="needs a C++ compiler"
)


@dataclasses.dataclass(frozen=True)
class EmulatedGpu:
    """Holds the plugin's path, and the package with emulated kernels."""

    plugin: pathlib.Path
    packages: pathlib.Path

    def run(
        self,
        script: str,
        *arguments: object,
        emulated: bool = True,
        device: bool = True,
    ) -> str:
        """Runs a script in a process of its own; returns its output.

        The script imports the package with emulated kernels, or else the
        package under test, and sees the GPU unless `device` is False.
        """
        folder = self.packages
        if not emulated:
            folder = pathlib.Path(tf_deform.__file__).parent.parent
        result = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=folder,  # comes first where packages are looked for
            env={
                **os.environ,
                "PYTHONPATH": str(folder),
                "CUDA_VISIBLE_DEVICES": "-1",
                "TF_PLUGGABLE_DEVICE_LIBRARY_PATH": (
                    str(self.plugin) if device else ""
                ),
            },
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout


def _run(command: list[object], environment: dict[str, str]) -> None:
    result = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def _kept(
    folder: pathlib.Path, name: str, sources: list[str], make: Callable
) -> pathlib.Path:
    """Returns what `make` made of these sources, now or in an earlier run."""
    key = hashlib.sha256(tf.__version__.encode())
    for pattern in sources:
        for path in sorted(ROOT.glob(pattern)):
            key.update(str(path).encode() + path.read_bytes())
    made = folder / f"{name}-{key.hexdigest()[:16]}"
    if not made.exists():
        for old in folder.glob(f"{name}-*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        make(made.with_suffix(".new"))
        made.with_suffix(".new").rename(made)
    return made


@functools.cache
def build() -> EmulatedGpu:
    """Builds the plugin and the package, and keeps them for the next time."""
    with gpu.emulated_build() as (folder, environment):

        def build_plugin(path: pathlib.Path) -> None:
            compiler = os.environ.get("CXX") or "c++"
            command = [compiler, "-O1", "-fPIC", "-shared"]
            command += ["-fvisibility=hidden", PLUGIN]
            command += tf.sysconfig.get_compile_flags()
            command += [*tf.sysconfig.get_link_flags(), "-o", path]
            _run(command, environment)

        def build_package(path: pathlib.Path) -> None:
            command = [sys.executable, "setup.py", "--quiet", "build"]
            command += ["--build-temp", folder / "temp", "--build-lib", path]
            _run(command, environment)

        return EmulatedGpu(
            _kept(folder, "plugin", [PLUGIN], build_plugin),
            _kept(folder, "packages", PACKAGE, build_package),
        )
