# SPDX-License-Identifier: Apache-2.0
"""Deformable ROIAlign's CUDA kernels, on a GPU or emulated: see gpu.py.

The core's tests that are imported here run once more, on the kernels.
"""

import core
import deformable_roi_align_core_test as core_test
import numpy as np
import pytest
import roi_gpu
import roi_reference
from deformable_roi_align_core_test import (  # noqa: F401
    test_16_bit_maps_keep_float32_coordinates,
    test_16_bit_types_are_summed_in_float32_and_rounded_once,
    test_a_roi_does_not_depend_on_the_others,
    test_adaptive_number_of_samples,
    test_each_bin_reads_its_own_displacement,
    test_empty,
    test_every_place_at_once,
    test_far_corners_and_large_sizes_keep_their_order_of_operations,
    test_gradients_equal_finite_differences,
    test_huge_corners_give_what_the_formula_gives,
    test_padding_and_rois_that_are_not_finite_touch_nothing,
    test_samples_outside_count_in_the_mean,
    test_samples_outside_touch_nothing,
    test_value_and_slope_at_a_place,
    test_values_that_are_not_finite_show_where_they_are_read,
)

OP = core_test.OP
DTYPES = core_test.DTYPES


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def deterministic(request):
    return request.param


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch, deterministic):
    roi_gpu.fixture(OP, core_test, monkeypatch, deterministic)


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_reference(seed, deterministic):
    operands, attributes = roi_reference.draw_roi_align_call(seed)
    options = dict(deterministic=deterministic, misaligned=seed % 3 == 0)
    roi_gpu.check(OP, operands, attributes, DTYPES, **options)


def draw(seed, *, size, channels, num_rois=3, **attributes):
    """ROIs of all kinds on two images, and the attributes."""
    rng = np.random.default_rng(seed)
    attributes = dict(spatial_scale=0.5, pooled_size=(2, 3)) | attributes
    bins = roi_reference.pair(attributes["pooled_size"])
    operands = (
        rng.normal(size=(2, *size, channels)),
        roi_reference.draw_rois(rng, 2, size, 0.5, num_rois),
        rng.normal(size=(num_rois, *bins, 2)),
        rng.normal(size=(num_rois, *bins, channels)),
    )
    return operands, attributes


# Around 16 bytes, and the threads of a block.
@pytest.mark.parametrize(
    "channels",
    [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65]
    + [127, 128, 129, 130, 255, 257, 511, 512, 513, 1024, 1025],
)
@pytest.mark.parametrize("misaligned", [False, True])
def test_channels(channels, misaligned, deterministic):
    operands, attributes = draw(channels, size=(4, 5), channels=channels)
    options = dict(deterministic=deterministic, misaligned=misaligned)
    roi_gpu.check_against_cpu(OP, operands, attributes, DTYPES, **options)


# Around bins, tiles of pixels and ROIs of a block.
@pytest.mark.parametrize("num_rois", [1, 2, 31, 32, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rois(num_rois, dtype, deterministic):
    operands, attributes = core_test.draw_crowd(num_rois, num_rois, dtype)
    options = dict(deterministic=deterministic)
    roi_gpu.check_against_cpu(OP, operands, attributes, [dtype], **options)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (4, 8), (5, 9), (13, 17)])
def test_tiles_of_pixels(size, deterministic):
    operands, attributes = draw(0, size=size, channels=6, num_rois=9)
    options = dict(deterministic=deterministic)
    roi_gpu.check_against_cpu(OP, operands, attributes, DTYPES, **options)


# Around what a window of taps holds, from one row of pixels to samples that
# are many pixels apart; and as many as the ROI is large.
@pytest.mark.parametrize("samples", [0, 1, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("size", [(1, 40), (9, 16), (200, 17)])
def test_samples(samples, size, deterministic):
    operands, attributes = draw(
        samples,
        size=size,
        channels=4,
        num_rois=8,
        pooled_size=(1, 2),
        sampling_ratio=samples,
    )
    dtypes = ["float64", "float32"]
    options = dict(deterministic=deterministic)
    roi_gpu.check_against_cpu(OP, operands, attributes, dtypes, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_result_is_the_same_alone_and_again(dtype):
    operands, attributes = draw(
        1, size=(19, 23), channels=40, num_rois=40, sampling_ratio=9
    )
    exact = core.rounded(operands, dtype)
    roi_gpu.check_alone_and_again(OP, exact, dtype, attributes)


@pytest.mark.parametrize("ratio", [0, 2])
def test_bad_batch_indices_are_padding(ratio):
    attributes = dict(spatial_scale=1.0, pooled_size=2, sampling_ratio=ratio)
    roi_gpu.check_bad_batch_indices(OP, attributes, 12)


def test_more_images_than_the_workspace_holds(deterministic):
    """Three images of 24 MiB in float32, summed up two at a time."""
    rng = np.random.default_rng(0)
    num_rois, size, channels = 30, (78, 79), 1024
    operands = core.rounded(
        (
            rng.random((3, *size, channels), np.float32) - 0.5,
            roi_reference.draw_rois(rng, 3, size, 0.5, num_rois),
            None,
            rng.normal(size=(num_rois, 2, 1, channels)),
        ),
        "float16",
    )
    attributes = dict(spatial_scale=0.5, pooled_size=(2, 1), sampling_ratio=1)
    options = dict(deterministic=deterministic)
    dtypes = ["float16"]
    roi_gpu.check_against_cpu(OP, operands, attributes, dtypes, **options)
    if not deterministic:
        assert roi_gpu.workspace_bytes == 2 * 2 * operands[0][0].nbytes


def test_more_elements_than_32_bits_can_count():
    core_test.test_more_elements_than_32_bits_can_count()
