# SPDX-License-Identifier: Apache-2.0
"""Tests messages about the GPU's driver.

Work on the CPU must not load the driver.
"""

import shutil
import subprocess
import sys

import core
import gpu
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(core.library(), "TfDeformCudaCheckDriver"),
    reason="the core was built without nvcc",
)

INTERNAL = 3


def verdict(name: str, *arguments) -> str:
    """Returns the text of an entry point's error; empty if it found none."""
    try:
        core.Cpu().call(name, *arguments)
    except core.CoreError as error:
        assert error.code == INTERNAL
        return str(error)
    return ""


@pytest.mark.parametrize(
    "driver, runtime",
    [(13000, 13000), (13020, 13000), (14000, 13000), (12020, 12080)],
)
def test_drivers_of_the_same_major_version_or_newer_will_do(driver, runtime):
    assert verdict("TfDeformCudaJudgeDriver", driver, runtime) == ""


@pytest.mark.parametrize("version", [(8, 0), (8, 9), (9, 0), (12, 1)])
def test_gpus_since_8_0_will_do(version):
    assert verdict("TfDeformCudaJudgeGpu", *version) == ""


@pytest.mark.parametrize(
    "name, versions, words",
    [
        (
            "Driver",
            (12040, 13000),
            ["CUDA 13.0", "a driver for CUDA 12.4", "Update", "CPU"],
        ),
        ("Driver", (0, 12080), ["CUDA 12.8", "no driver", "Install", "CPU"]),
        ("Gpu", (7, 5), ["8.0", "7.5", "CPU"]),
    ],
)
def test_an_error_names_both_versions(name, versions, words):
    text = verdict(f"TfDeformCudaJudge{name}", *versions)
    assert [word for word in words if word in text] == words


POOLING = dict(spatial_scale=1.0, pooled_size=2)
CALLS = {  # shapes of the operands and of the output's gradient, and attributes
    core.CONV2D: (
        [(1, 5, 6, 4), (3, 3, 4, 2), (1, 3, 4, 18), (1, 3, 4, 9), (1, 3, 4, 2)],
        {},
    ),
    core.PSROI_POOL: (
        [(1, 5, 6, 4), (3, 5), (3, 2, 2, 2), (3, 2, 2, 4)],
        dict(output_dim=4, group_size=1, **POOLING),
    ),
    core.ROI_ALIGN: (
        [(1, 5, 6, 4), (3, 5), (3, 2, 2, 2), (3, 2, 2, 4)],
        POOLING,
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_gpu_call_without_a_driver_returns_the_verdict(op):
    expected = verdict("TfDeformCudaCheckDriver")
    if not expected:
        pytest.skip("there is a driver")
    shapes, attributes = CALLS[op]
    operands = [np.ones(shape) for shape in shapes]
    for run, given in (
        (core.run_forward, operands[:-1]),
        (core.run_backward, operands),
    ):
        with pytest.raises(core.CoreError) as error:
            run(op, *given, on=gpu.Gpu(core.library), **attributes)
        assert (error.value.code, str(error.value)) == (INTERNAL, expected)


# Prints "touched" when it is loaded, and is no driver.
DRIVER = """
#include <unistd.h>
__attribute__((constructor)) static void Loaded(void) {
  if (write(1, "touched ", 8) < 0) _exit(1);
}
"""
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
import core, numpy
library = core.library()
print("loaded ", end="", flush=True)
ones = numpy.ones
core.forward(ones((1, 3, 3, 2)), ones((3, 3, 2, 1)), ones((1, 1, 1, 18)))
print("worked ", end="", flush=True)
library.TfDeformCudaCheckDriver(None, core.INT64(0))
print("asked ", end="", flush=True)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_work_on_the_cpu_does_not_touch_the_driver(tmp_path, monkeypatch):
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    subprocess.run(
        ["cc", "-shared", "-fPIC", source, "-o", tmp_path / "libcuda.so.1"],
        check=True,
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("TF_DEFORM_CORE", core.library()._name)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *sys.path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["loaded", "worked", "touched", "asked"]
