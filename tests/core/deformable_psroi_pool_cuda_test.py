# SPDX-License-Identifier: Apache-2.0
"""Deformable PS-ROI pooling's CUDA kernels, on a GPU or emulated: see gpu.py.

The core's tests that are imported here run once more, on the kernels.
"""

import core
import deformable_psroi_pool_core_test as core_test
import numpy as np
import pytest
import roi_gpu
import roi_reference
from deformable_psroi_pool_core_test import (  # noqa: F401
    test_16_bit_maps_keep_float32_coordinates,
    test_16_bit_types_are_summed_in_float32_and_rounded_once,
    test_a_class_that_samples_nothing_touches_nothing,
    test_a_roi_does_not_depend_on_the_others,
    test_batch_index_minus_zero_is_the_first_image,
    test_each_bin_and_class_reads_its_own_displacement,
    test_empty,
    test_every_place_at_once,
    test_far_corners_and_large_sizes_keep_their_order_of_operations,
    test_first_corners_round_half_away_from_zero,
    test_gradients_equal_finite_differences,
    test_huge_corners_give_what_the_formula_gives,
    test_last_corners_round_half_away_from_zero,
    test_padding_and_rois_that_are_not_finite_touch_nothing,
    test_value_and_slope_at_a_place,
    test_values_that_are_not_finite_show_where_they_are_read,
    test_vector_edges_of_a_class,
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
    operands, attributes = roi_reference.draw_psroi_pool_call(seed)
    options = dict(deterministic=deterministic, misaligned=seed % 3 == 0)
    roi_gpu.check(OP, operands, attributes, DTYPES, **options)


def draw(seed, *, size, output_dim, classes=1, num_rois=3, **attributes):
    """ROIs of all kinds on two images, and the attributes."""
    rng = np.random.default_rng(seed)
    attributes = (
        dict(
            output_dim=output_dim,
            spatial_scale=0.5,
            pooled_size=(2, 3),
            group_size=(2, 1),
            part_size=(1, 2),
            sample_per_part=2,
        )
        | attributes
    )
    groups = roi_reference.pair(attributes["group_size"])
    parts = roi_reference.pair(attributes["part_size"])
    bins = roi_reference.pair(attributes["pooled_size"])
    operands = (
        rng.normal(size=(2, *size, output_dim * groups[0] * groups[1])),
        roi_reference.draw_rois(rng, 2, size, 0.5, num_rois),
        rng.normal(size=(num_rois, *parts, 2 * classes)),
        rng.normal(size=(num_rois, *bins, output_dim)),
    )
    return operands, attributes


# Around 16 bytes, filled up or not, and the threads of a block.
@pytest.mark.parametrize(
    "output_dim",
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 65]
    + [127, 128, 129, 130, 255, 257, 511, 512, 513, 1024, 1025],
)
@pytest.mark.parametrize("group_size", [1, (2, 1)])
@pytest.mark.parametrize("misaligned", [False, True])
def test_channels(output_dim, group_size, misaligned, deterministic):
    operands, attributes = draw(
        output_dim, size=(4, 5), output_dim=output_dim, group_size=group_size
    )
    options = dict(deterministic=deterministic, misaligned=misaligned)
    roi_gpu.check_against_cpu(OP, operands, attributes, DTYPES, **options)


@pytest.mark.parametrize("classes", [1, 2, 5, 33])
@pytest.mark.parametrize("per_class", [1, 4, 9])
def test_classes_on_large_maps(classes, per_class, deterministic):
    """Maps that are read as they are: a copy would be dearer."""
    operands, attributes = draw(
        classes,
        size=(20, 30),
        output_dim=classes * per_class,
        classes=classes,
        part_size=(5, 2),
        group_size=(1, 3),
    )
    dtypes = ["float32", "bfloat16"]
    options = dict(deterministic=deterministic)
    roi_gpu.check_against_cpu(OP, operands, attributes, dtypes, **options)


# Around bins, tiles of pixels and ROIs of a block.
@pytest.mark.parametrize("num_rois", [1, 2, 31, 32, 33, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rois(num_rois, dtype, deterministic):
    operands, attributes = core_test.draw_crowd(num_rois, num_rois, dtype)
    options = dict(deterministic=deterministic)
    roi_gpu.check_against_cpu(OP, operands, attributes, [dtype], **options)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (4, 8), (5, 9), (13, 17)])
def test_tiles_of_pixels(size, deterministic):
    operands, attributes = draw(0, size=size, output_dim=6, num_rois=9)
    options = dict(deterministic=deterministic)
    roi_gpu.check_against_cpu(OP, operands, attributes, DTYPES, **options)


# Around what a window of taps holds, from one row of pixels to samples that
# are many pixels apart.
@pytest.mark.parametrize("samples", [1, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("size", [(1, 40), (9, 16), (200, 17)])
def test_samples(samples, size, deterministic):
    operands, attributes = draw(
        samples,
        size=size,
        output_dim=4,
        classes=2,
        num_rois=8,
        pooled_size=(1, 2),
        sample_per_part=samples,
    )
    dtypes = ["float64", "float32"]
    options = dict(deterministic=deterministic)
    roi_gpu.check_against_cpu(OP, operands, attributes, dtypes, **options)


@pytest.mark.parametrize("group_size", [1, 2, (4, 4), (5, 7)])
def test_cells_in_the_banks_of_shared_memory(group_size, deterministic):
    operands, attributes = draw(
        0,
        size=(6, 5),
        output_dim=7,
        num_rois=12,
        pooled_size=(5, 7),
        group_size=group_size,
    )
    options = dict(deterministic=deterministic)
    roi_gpu.check_against_cpu(OP, operands, attributes, DTYPES, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [1, (3, 4)])
def test_each_result_is_the_same_alone_and_again(dtype, group_size):
    operands, attributes = draw(
        1,
        size=(19, 23),
        output_dim=21,
        classes=3,
        num_rois=40,
        group_size=group_size,
        part_size=(2, 1),
        sample_per_part=9,
    )
    exact = core.rounded(operands, dtype)
    roi_gpu.check_alone_and_again(OP, exact, dtype, attributes)


def test_bad_batch_indices_are_padding():
    attributes = dict(output_dim=3, spatial_scale=1.0, pooled_size=2)
    roi_gpu.check_bad_batch_indices(OP, attributes, 12)


def test_more_images_than_the_workspace_holds(deterministic):
    """Three images of 24 MiB, repacked or summed up, two at a time."""
    rng = np.random.default_rng(0)
    num_rois, size, output_dim = 50, (78, 79), 512
    rois = roi_reference.draw_rois(rng, 3, size, 0.5, num_rois)
    operands = core.rounded(
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
    options = dict(deterministic=deterministic)
    dtypes = ["float32"]
    roi_gpu.check_against_cpu(OP, operands, attributes, dtypes, **options)
    assert roi_gpu.workspace_bytes == 2 * operands[0][0].nbytes


def test_more_elements_than_32_bits_can_count():
    core_test.test_more_elements_than_32_bits_can_count()
