# SPDX-License-Identifier: Apache-2.0
"""Tests messages about the GPU's driver.

Work on the CPU must not load the driver.
"""

import ctypes
import shutil
import subprocess
import sys

import core
import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(core.library(), "TfDeformCudaCheckDriver"),
    reason="the core was built without nvcc",
)

INTERNAL = 3
OPS = ("DeformableConv2D", "DeformablePSROIPool", "DeformableROIAlign")


class CudaStream(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("allow_tf32", ctypes.c_bool),
        ("deterministic", ctypes.c_bool),
    ]


def call(name: str, *arguments) -> tuple[int, str]:
    """Returns the code and the text that an entry point returned."""
    message = ctypes.create_string_buffer(512)
    function = getattr(core.library(), name)
    code = function(*arguments, message, core.INT64(len(message)))
    return code, message.value.decode()


@pytest.mark.parametrize(
    "driver, runtime",
    [(13000, 13000), (13020, 13000), (14000, 13000), (12020, 12080)],
)
def test_drivers_of_the_same_major_version_or_newer_will_do(driver, runtime):
    assert call("TfDeformCudaJudgeDriver", driver, runtime) == (0, "")


def test_an_old_driver_is_an_error_that_names_both_versions():
    code, text = call("TfDeformCudaJudgeDriver", 12040, 13000)
    assert code == INTERNAL
    assert "CUDA 13.0" in text and "a driver for CUDA 12.4" in text
    assert "Update" in text and "CPU" in text


def test_no_driver_is_an_error():
    code, text = call("TfDeformCudaJudgeDriver", 0, 12080)
    assert code == INTERNAL
    assert "CUDA 12.8" in text and "no driver" in text
    assert "Install" in text and "CPU" in text


def test_an_old_gpu_is_an_error_that_names_both():
    for version in ((8, 0), (8, 9), (9, 0), (12, 1)):
        assert call("TfDeformCudaJudgeGpu", *version) == (0, "")
    code, text = call("TfDeformCudaJudgeGpu", 7, 5)
    assert code == INTERNAL
    assert "8.0" in text and "7.5" in text and "CPU" in text


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_call_without_a_driver_returns_the_verdict(op):
    expected = call("TfDeformCudaCheckDriver")
    if expected[0] == 0:
        pytest.skip("there is a driver")
    if op == "DeformableConv2D":
        params = core.validate((1, 5, 6, 4), (3, 3, 4, 2), (1, 3, 4, 18))
        operands, gradients = core.Pointers(), core.Pointers()
    else:
        own = dict(output_dim=4, group_size=1) if "PSROI" in op else {}
        params = core.validate_roi(
            op, (1, 5, 6, 4), (3, 5), spatial_scale=1.0, pooled_size=2, **own
        )
        operands, gradients = core.ROIOperands(), core.ROIGradients()
    # Memory that a kernel could use if it ran.
    memory = ctypes.create_string_buffer(1 << 12)
    address = ctypes.addressof(memory)
    for struct in (operands, gradients):
        for name, _ in struct._fields_:
            setattr(struct, name, address)
    shared = [ctypes.byref(params), core.DTYPES["float32"]]
    shared.append(ctypes.byref(operands))
    pointer, stream = ctypes.c_void_p(address), ctypes.byref(CudaStream())
    outputs = [pointer] * (2 if "PSROI" in op else 1)
    assert expected == call(
        f"TfDeform{op}CudaForward", *shared, pointer, *outputs, stream
    )
    assert expected == call(
        f"TfDeform{op}CudaBackward",
        *(*shared, pointer, pointer, ctypes.byref(gradients), stream),
    )


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
