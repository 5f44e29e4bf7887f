# SPDX-License-Identifier: Apache-2.0
"""Tests the CUDA kernels by rules that ROIAlign alone has: see gpu.py.

The tests of the core that are imported here run once more, on the kernels.
"""

import pytest
from deformable_roi_align_core_test import (
    test_16_bit_maps_keep_float32_coordinates,
    test_adaptive_number_of_samples,
    test_samples_outside_count_in_the_mean,
    test_samples_outside_touch_nothing,
)
from pooling import ROI_ALIGN
from pooling_cuda_test import (
    deterministic,
    misaligned,
    runner,
)


@pytest.fixture
def op():
    return ROI_ALIGN
