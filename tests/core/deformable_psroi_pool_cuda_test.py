# SPDX-License-Identifier: Apache-2.0
"""Tests the CUDA kernels by rules that PS-ROI pooling alone has: see gpu.py.

The tests of the core that are imported here run once more, on the kernels.
"""

import core
import numpy as np
import pytest
from deformable_psroi_pool_core_test import (
    test_16_bit_maps_keep_float32_coordinates,
    test_a_class_that_samples_nothing_touches_nothing,
    test_batch_index_minus_zero_is_the_first_image,
    test_corners_round_half_away_from_zero,
)
from operands import draw_rois
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
    operands, attributes = draw(
        *(PSROI_POOL, classes),
        **dict(size=(20, 30), channels=classes * per_class, classes=classes),
        **dict(part_size=(5, 2), group_size=(1, 3)),
    )
    check_against_cpu(runner, operands, attributes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, 2, (4, 4), (5, 7)])
def test_cells_in_the_banks_of_shared_memory(runner, group_size, dtype):
    operands, attributes = draw(
        *(PSROI_POOL, 0),
        **dict(size=(6, 5), channels=7, num_rois=12),
        **dict(pooled_size=(5, 7), group_size=group_size),
    )
    check_against_cpu(runner, operands, attributes, dtype)


def test_more_images_than_the_workspace_holds(runner):
    """Tests three images of 24 MiB, repacked or summed up two at a time."""
    rng = np.random.default_rng(0)
    num_rois, size, output_dim = 50, (78, 79), 512
    rois = draw_rois(rng, 3, size, 0.5, num_rois)
    exact = core.rounded(
        (
            rng.random((3, *size, 2 * output_dim), np.float32) - 0.5,
            rois,
            rng.normal(size=(num_rois, 1, 1, 2)),
            rng.normal(size=(num_rois, 5, 6, output_dim)),
        ),
        "float32",
    )
    attributes = dict(
        output_dim=output_dim,
        spatial_scale=0.5,
        pooled_size=(5, 6),
        group_size=(1, 2),
        part_size=1,
        sample_per_part=1,
    )
    check_against_cpu(runner, exact, attributes, "float32")
    assert runner.on.used[-1] == 2 * exact[0][0].nbytes
