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


def check_never_less(op, params, dtype, kind):
    """Checks both passes, the gradient's for all choices of gradients."""
    common = ctypes.byref(params), core.DTYPES[dtype]
    entry = f"TfDeform{op}Cpu"
    choices = itertools.product((None, 1), repeat=len(kind._fields_))
    calls = [(entry, *common)]
    for wanted in choices:
        gradients = ctypes.byref(kind(*wanted))
        calls.append((f"{entry}Backward", *common, gradients))
    for call in calls:
        needed = [core.Cpu().num_bytes(*call, workers) for workers in WORKERS]
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
    check_never_less(core.CONV2D, params, dtype, core.Pointers)


@pytest.mark.parametrize("dtype", core.DTYPES)
@pytest.mark.parametrize("rois", [0, 1, 300])
@pytest.mark.parametrize("size", [(0, 5, 6), (2, 1, 1), (16, 38, 63)])
@pytest.mark.parametrize("op", [core.PSROI_POOL, core.ROI_ALIGN])
def test_roi_pooling(op, size, rois, dtype):
    attributes = dict(spatial_scale=0.1, pooled_size=(3, 7))
    if op == core.PSROI_POOL:
        attributes["output_dim"] = 21
    params = core.validate_roi(op, (*size, 441), (rois, 5), **attributes)
    check_never_less(op, params, dtype, core.ROIGradients)


@pytest.mark.parametrize("dtype", core.DTYPES)
@pytest.mark.parametrize(("samples", "channels"), [(20000, 250000), (1, 1)])
def test_roi_align_keeps_to_4_mib_a_worker(samples, channels, dtype):
    """Tests the most samples and channels for which the contract says so."""
    params = core.validate_roi(
        core.ROI_ALIGN,
        (1, 2**17, 2**17, channels),
        (3, 5),
        spatial_scale=1.0,
        pooled_size=(1, 1),
        sampling_ratio=samples,
    )
    num_bytes = core.Cpu().num_bytes(
        "TfDeformDeformableROIAlignCpu",
        ctypes.byref(params),
        *(core.DTYPES[dtype], 3),
    )
    assert num_bytes < 3 * 2**22
