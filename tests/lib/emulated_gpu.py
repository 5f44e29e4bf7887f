# SPDX-License-Identifier: Apache-2.0
"""Runs TensorFlow with a GPU that is the processor, where there is no GPU.

The device is a plugin (emulated_gpu.cc). A tf_deform that was built with
emulated CUDA kernels (emulated_nvcc.py) runs its GPU kernels on it as
TensorFlow runs kernels on a GPU: registration, placement, memory, streams.
TensorFlow's own kernels fail there, because they ask for CUDA.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import gpu
import pytest
import tensorflow as tf

import tf_deform

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 600  # seconds, at most, for a build or a script

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


@functools.cache
def build() -> EmulatedGpu:
    """Builds the plugin and the package; keeps objects for the next time."""
    # The folder is this process' own: others may build at the same time.
    build.folder = tempfile.TemporaryDirectory()  # removed when it ends
    plugin = pathlib.Path(build.folder.name, "plugin.so")
    packages = pathlib.Path(build.folder.name, "packages")
    with gpu.emulated_build() as (folder, environment):
        compiler = os.environ.get("CXX") or "c++"
        command = [compiler, "-O1", "-fPIC", "-shared", "-fvisibility=hidden"]
        command += tf.sysconfig.get_compile_flags()
        command += ["tests/lib/emulated_gpu.cc"]
        command += [*tf.sysconfig.get_link_flags(), "-o", plugin]
        _run(command, environment)
        command = [sys.executable, "setup.py", "--quiet", "build"]
        command += ["--build-temp", folder / "temp", "--build-lib", packages]
        _run(command, environment)
    return EmulatedGpu(plugin, packages)
