# SPDX-License-Identifier: Apache-2.0
"""Tests the CUDA kernels by rules that ROIAlign alone has: see gpu.py.

The tests of the core that are imported here run once more, on the kernels.
"""

import core
import numpy as np
import pytest
from deformable_roi_align_core_test import (
    test_16_bit_maps_keep_float32_coordinates,
    test_adaptive_number_of_samples,
    test_samples_outside_count_in_the_mean,
    test_samples_outside_touch_nothing,
)
from operands import draw_rois
from pooling import ROI_ALIGN
from pooling_cuda_test import (
    check_against_cpu,
    deterministic,
    misaligned,
    runner,
)


@pytest.fixture
def op():
    return ROI_ALIGN


def test_more_images_than_the_workspace_holds(runner, deterministic):
    """Tests three images of 24 MiB in float32, summed up two at a time."""
    rng = np.random.default_rng(0)
    num_rois, size, channels = 30, (78, 79), 1024
    exact = core.rounded(
        (
            rng.random((3, *size, channels), np.float32) - 0.5,
            draw_rois(rng, 3, size, 0.5, num_rois),
            None,
            rng.normal(size=(num_rois, 2, 1, channels)),
        ),
        "float16",
    )
    attributes = dict(spatial_scale=0.5, pooled_size=(2, 1), sampling_ratio=1)
    check_against_cpu(runner, exact, attributes, "float16")
    if not deterministic:
        assert runner.on.used[-1] == 2 * 2 * exact[0][0].nbytes
