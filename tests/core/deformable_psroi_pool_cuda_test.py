# SPDX-License-Identifier: Apache-2.0
"""Tests the CUDA kernels by rules that PS-ROI pooling alone has: see gpu.py.

The tests of the core that are imported here run once more, on the kernels.
"""

import pytest
from deformable_psroi_pool_core_test import (
    test_16_bit_maps_keep_float32_coordinates,
    test_a_class_that_samples_nothing_touches_nothing,
    test_batch_index_minus_zero_is_the_first_image,
    test_corners_round_half_away_from_zero,
)
from pooling import DTYPES, PSROI_POOL
from pooling_core_test import draw
from pooling_cuda_test import (
    check_against_cpu,
    deterministic,
    misaligned,
    runner,
)


@pytest.fixture
def op():
    return PSROI_POOL


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", [1, 2, 5, 33])
@pytest.mark.parametrize("per_class", [1, 4, 9])
def test_classes_on_large_maps(runner, classes, per_class, dtype):
    """Tests maps that are read in place, because a copy would cost more."""
    sizes = dict(size=(20, 30), part_size=(5, 2), group_size=(1, 3))
    channels = dict(channels=classes * per_class, classes=classes)
    operands, attributes = draw(PSROI_POOL, classes, **sizes, **channels)
    check_against_cpu(runner, operands, attributes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 2, (4, 4), (5, 7)])
def test_cells_in_the_banks_of_shared_memory(runner, group_size, dtype):
    sizes = dict(size=(6, 5), channels=7, num_rois=12, pooled_size=(5, 7))
    operands, attributes = draw(PSROI_POOL, 0, group_size=group_size, **sizes)
    check_against_cpu(runner, operands, attributes, dtype)
