# SPDX-License-Identifier: Apache-2.0
"""Tests workspaces by number of workers.

A caller that does not know its number of threads yet allocates for the largest
number, and runs with fewer.
"""

import ctypes
import itertools

import core
import pytest

WORKERS = (1, 2, 3, 5, 8, 13, 31, 64, 129)


def gradients(structure):
    """Yields all choices of wanted gradients."""
    for wanted in itertools.product((None, 1), repeat=len(structure._fields_)):
        yield structure(*wanted)


def assert_never_less(function, *arguments):
    needed = [function(*arguments, workers) for workers in WORKERS]
    assert needed == sorted(needed)


@pytest.mark.parametrize("dtype", core.DTYPES)
@pytest.mark.parametrize(
    ("inputs", "kernel"),
    [
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((2, 7, 9, 6), (3, 3, 3, 10)),
        ((3, 56, 57, 256), (3, 3, 256, 128)),
        ((1, 14, 300, 64), (5, 5, 1, 64)),
        ((0, 7, 9, 6), (3, 3, 6, 10)),
    ],
)
def test_convolution(inputs, kernel, dtype):
    params = core.validate(inputs, kernel, None, padding="same")
    common = ctypes.byref(params), core.DTYPES[dtype]
    name = "TfDeformDeformableConv2DCpu"
    library = core.library()
    assert_never_less(getattr(library, f"{name}WorkspaceBytes"), *common)
    for wanted in gradients(core.Pointers):
        assert_never_less(
            getattr(library, f"{name}BackwardWorkspaceBytes"),
            *common,
            ctypes.byref(wanted),
        )


@pytest.mark.parametrize("dtype", core.DTYPES)
@pytest.mark.parametrize("rois", [0, 1, 300])
@pytest.mark.parametrize("size", [(0, 5, 6), (2, 1, 1), (16, 38, 63)])
@pytest.mark.parametrize("op", ["DeformablePSROIPool", "DeformableROIAlign"])
def test_roi_pooling(op, size, rois, dtype):
    attributes = dict(spatial_scale=0.1, pooled_size=(3, 7))
    if op == "DeformablePSROIPool":
        attributes["output_dim"] = 21
    params = core.validate_roi(op, (*size, 441), (rois, 5), **attributes)
    common = ctypes.byref(params), core.DTYPES[dtype]
    assert_never_less(core._roi_function(op, "CpuWorkspaceBytes"), *common)
    for wanted in gradients(core.ROIGradients):
        assert_never_less(
            core._roi_function(op, "CpuBackwardWorkspaceBytes"),
            *common,
            ctypes.byref(wanted),
        )


@pytest.mark.parametrize("dtype", core.DTYPES)
@pytest.mark.parametrize(("samples", "channels"), [(20000, 250000), (1, 1)])
def test_roi_align_keeps_to_4_mib_a_worker(samples, channels, dtype):
    """Tests the most samples and channels for which the contract says so."""
    params = core.validate_roi(
        "DeformableROIAlign",
        (1, 2**17, 2**17, channels),
        (3, 5),
        spatial_scale=1.0,
        pooled_size=(1, 1),
        sampling_ratio=samples,
    )
    function = core._roi_function("DeformableROIAlign", "CpuWorkspaceBytes")
    num_bytes = function(ctypes.byref(params), core.DTYPES[dtype], 3)
    assert num_bytes < 3 * 2**22
