# SPDX-License-Identifier: Apache-2.0
"""Deformable PS-ROI pooling in the core, through its C interface."""

import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
import time

import core
import numpy as np
import pytest
import roi_reference
from roi_reference import HALF_UNIT, assert_close, assert_finite_differences

OP = "DeformablePSROIPool"
validate = functools.partial(core.validate_roi, OP)
forward = functools.partial(core.forward_roi, OP)
backward = functools.partial(core.backward_roi, OP)

DTYPES = list(core.DTYPES)
# Fewer in the runs with other instruction sets.
SEEDS = 30 if os.environ.get("TF_DEFORM_MAX_ISA") else 100


def check(operands, attributes, dtypes=DTYPES, threads=(1, 2, 5)):
    """Output, count and gradients, in every type, for any threads."""
    for dtype in dtypes:
        exact = core.rounded(operands, dtype)
        expected, count = roi_reference.deformable_psroi_pool(
            *exact[:3], return_count=True, **attributes
        )
        gradients = roi_reference.deformable_psroi_pool_grad(
            *exact, **attributes
        )
        results = []
        for workers in threads:
            common = dict(dtype=dtype, threads=workers, **attributes)
            made = backward(*exact, **common)
            results.append(
                [*forward(*exact[:3], return_count=True, **common)]
                + list(made.values())
            )
        assert_close(results[0][0], expected, dtype, "output")
        np.testing.assert_array_equal(results[0][1], count)
        coordinates = "float64" if dtype == "float64" else "float32"
        for name, gradient in zip(made, results[0][2:], strict=True):
            gradient_type = dtype if name == "inputs" else coordinates
            assert_close(
                gradient, getattr(gradients, name), gradient_type, name
            )
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert one.tobytes() == two.tobytes(), "threads changed it"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_agrees_with_reference_for_any_type_and_number_of_threads(seed):
    check(*roi_reference.draw_psroi_pool_call(seed))


# One below, at, and one past vectors of 4, 8 and 16 elements, and their sums.
@pytest.mark.parametrize("output_dim", [*range(1, 21), 24, 31, 32, 33, 48])
@pytest.mark.parametrize("group_size", [1, (2, 1)])
def test_vector_edges(output_dim, group_size):
    rng = np.random.default_rng(output_dim)
    check_channels(rng, output_dim, 1, group_size)


@pytest.mark.parametrize(
    "per_class, classes",
    [(1, 3), (3, 3), (4, 2), (5, 3), (7, 2), (8, 3), (9, 2), (15, 2), (16, 2)]
    + [(17, 2), (1, 21), (63, 1), (64, 1), (65, 1), (70, 1), (35, 2), (23, 3)],
)
def test_vector_edges_of_a_class(per_class, classes):
    rng = np.random.default_rng(per_class)
    check_channels(rng, per_class * classes, classes, (1, 2))


def check_channels(rng, output_dim, classes, group_size):
    groups = roi_reference.pair(group_size)
    attributes = dict(
        output_dim=output_dim,
        spatial_scale=0.5,
        pooled_size=(2, 3),
        group_size=group_size,
        part_size=(1, 2),
        sample_per_part=2,
    )
    channels = output_dim * groups[0] * groups[1]
    operands = (
        rng.normal(size=(1, 4, 5, channels)),
        [[0, 1, 1, 6, 5]],
        rng.normal(size=(1, 1, 2, 2 * classes)),
        rng.normal(size=(1, 2, 3, output_dim)),
    )
    check(operands, attributes, ["float64", "float32", "bfloat16"], (1, 2))


def draw_crowd(sizes_seed, num_rois, dtype):
    """Many ROIs of all kinds on the same pixels of three images."""
    rng = np.random.default_rng(sizes_seed)
    size, output_dim, classes = (19, 23), 6, 3
    attributes = dict(
        output_dim=output_dim,
        spatial_scale=1 / 8,
        pooled_size=(5, 4),
        group_size=(3, 4),
        part_size=(2, 3),
        sample_per_part=3,
    )
    operands = (
        rng.normal(size=(3, *size, output_dim * 12)),
        roi_reference.draw_rois(rng, 3, size, 1 / 8, num_rois),
        rng.normal(size=(num_rois, 2, 3, 2 * classes)),
        rng.normal(size=(num_rois, 5, 4, output_dim)),
    )
    return core.rounded(operands, dtype), attributes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rois", [1, 2, 63, 64, 65, 300])
def test_threads_change_no_bit_of_many_rois(num_rois, dtype):
    operands, attributes = draw_crowd(num_rois, num_rois, dtype)
    results = []
    for threads in (1, 2, 3, 5, 16):
        common = dict(dtype=dtype, threads=threads, **attributes)
        output, count = forward(*operands[:3], return_count=True, **common)
        made = backward(*operands, **common)
        arrays = [output, count, *made.values()]
        results.append([array.tobytes() for array in arrays])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_result_is_the_same_alone(dtype, threads):
    operands, attributes = draw_crowd(0, 40, dtype)
    common = dict(dtype=dtype, threads=threads, **attributes)
    together = backward(*operands, **common)
    for name in ("inputs", "displacement"):
        alone = backward(*operands, wanted=(name,), **common)
        assert list(alone) == [name]
        assert alone[name].tobytes() == together[name].tobytes()
    assert backward(*operands, wanted=(), **common) == {}
    output, _ = forward(*operands[:3], return_count=True, **common)
    assert forward(*operands[:3], **common).tobytes() == output.tobytes()


def test_a_roi_does_not_depend_on_the_others():
    """Nor on its place among them: each is pooled alone to the same bits."""
    (inputs, rois, trans, _), attributes = draw_crowd(5, 37, "float32")
    output = forward(inputs, rois, trans, **attributes)
    back = slice(None, None, -1)
    turned = forward(inputs, rois[back], trans[back], **attributes)
    assert turned[back].tobytes() == output.tobytes()
    for one in (slice(3, 4), slice(12, 13), slice(36, 37)):
        alone = forward(inputs, rois[one], trans[one], **attributes)
        assert alone.tobytes() == output[one].tobytes()


@pytest.mark.parametrize("seed", range(6))
def test_gradients_equal_finite_differences(seed):
    """In float64; displacements keep samples off the places of a jump."""
    rng = np.random.default_rng(seed)
    batch, size, classes = 2, (5, 7), 1 + seed % 3
    part = [(2, 3), (1, 1), (4, 2)][seed % 3]
    attributes = dict(
        output_dim=2 * classes,
        spatial_scale=0.5,
        pooled_size=(2, 3),
        group_size=[None, 1, (3, 2)][seed // 2],
        part_size=part,
        sample_per_part=1 + seed % 3,
        trans_std=0.2,
    )
    groups = roi_reference.pair(attributes["group_size"] or (2, 3))
    channels = 2 * classes * groups[0] * groups[1]
    inputs = rng.normal(size=(batch, *size, channels))
    rois = roi_reference.draw_rois(
        rng,
        batch,
        size,
        0.5,
        5,
        ("inside", "across the edge", "reversed", "padding", "not finite"),
    )
    trans = rng.uniform(-1, 1, (5, *part, 2 * classes))
    roi_reference.move_off_kinks(
        rng,
        lambda: roi_reference.psroi_bins(inputs, rois, trans, **attributes),
        trans,
    )
    output_grad = rng.normal(size=(5, 2, 3, 2 * classes))
    gradients = backward(
        inputs, rois, trans, output_grad, dtype="float64", **attributes
    )

    def loss():
        output = forward(inputs, rois, trans, dtype="float64", **attributes)
        return np.sum(output * output_grad)

    assert_finite_differences(rng, loss, inputs, gradients["inputs"])
    assert_finite_differences(rng, loss, trans, gradients["displacement"])
    assert np.abs(gradients["displacement"]).max() > 0.01


# A column of three pixels, 1, 3 and 7, under a bin of one sample. The ROI
# starts at -0.5 and is 1 high, so a displacement of y + 0.5 reads at y.
PLACES = [  # y, value, count, slope in y
    (-0.75, 0, 0, 0),  # Beyond half a pixel outside: skipped.
    (-0.5, 1, 1, 0),  # Not beyond: counted, and clamped.
    (-0.25, 1, 1, 0),
    (0, 1, 1, 2),  # The cell [0, 1].
    (0.25, 1.5, 1, 2),
    (1, 3, 1, 4),  # The cell to the right of an integer.
    (1.5, 5, 1, 4),
    (2, 7, 1, 0),  # The edge is held from here on.
    (2.25, 7, 1, 0),
    (2.5, 7, 1, 0),
    (2.75, 0, 0, 0),
    (1e9, 0, 0, 0),
    (-1e9, 0, 0, 0),
    (np.nan, 0, 0, 0),
    (np.inf, 0, 0, 0),
    (-np.inf, 0, 0, 0),
]


@pytest.mark.parametrize("y, value, count, slope", PLACES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_slope_at_a_place(y, value, count, slope, axis, dtype):
    """Exact in every type, along either axis, and with 40 channels too."""
    shape = (1, 3, 1, 1) if axis == 0 else (1, 1, 3, 1)
    trans = [y + 0.5, 0.5] if axis == 0 else [0.5, y + 0.5]
    attributes = dict(
        spatial_scale=1.0, pooled_size=1, sample_per_part=1, trans_std=1.0
    )
    for channels in (1, 40):
        attributes["output_dim"] = channels
        pixels = np.reshape([1.0, 3.0, 7.0], shape)
        operands = (
            np.repeat(pixels, channels, axis=3),
            np.zeros((1, 5)),
            np.reshape(trans, (1, 1, 1, 2)),
        )
        output, counts = forward(
            *operands, dtype=dtype, return_count=True, **attributes
        )
        assert (output == value).all()
        assert (counts == count).all()
        output_grad = np.zeros((1, 1, 1, channels))
        output_grad[..., -1] = 1
        gradients = backward(*operands, output_grad, dtype=dtype, **attributes)
        assert gradients["displacement"].reshape(2)[axis] == slope
        assert gradients["displacement"].reshape(2)[1 - axis] == 0
        assert gradients["inputs"].sum() == count


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_place_at_once(dtype):
    """All pairs of places around the edges, also on a map of one pixel."""
    real = np.dtype(dtype).type
    for size in ((3, 2), (1, 1)):
        axes = []
        for n in size:
            marks = [real(v) for v in (-0.5, 0, 1, n - 1, n - 0.5)]
            marks += [
                np.nextafter(v, real(way))
                for v in marks
                for way in (-np.inf, np.inf)
            ]
            axes.append([*marks, np.nan, np.inf, 1e30, -1e30])
        trans = np.array(list(itertools.product(*axes)), real) + real(0.5)
        rng = np.random.default_rng(0)
        operands = (
            rng.normal(size=(1, *size, 3)).astype(real),
            np.zeros((len(trans), 5), real),
            trans.reshape(-1, 1, 1, 2),
            rng.normal(size=(len(trans), 1, 1, 3)).astype(real),
        )
        attributes = dict(
            output_dim=3,
            spatial_scale=1.0,
            pooled_size=1,
            sample_per_part=1,
            trans_std=1.0,
        )
        check(operands, attributes, [dtype], (1,))


def halves_and_near(real):
    """Corners, and the integers that they are rounded to."""
    below = np.nextafter(real(0.5), real(0))
    cases = [(0.5, 1), (1.5, 2), (2.5, 3), (3.5, 4), (-0.5, -1), (-1.5, -2)]
    cases += [(below, 0), (-below, 0), (2.49, 2), (2.51, 3), (-2.5, -3)]
    cases += [(np.nextafter(real(3.5), real(0)), 3), (-0.0, 0), (6, 6)]
    return np.array(cases, real).T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_first_corners_round_half_away_from_zero(dtype):
    """Each ROI is one sample at its rounded corner, on a ramp."""
    x1, expected = halves_and_near(np.dtype(dtype).type)
    ramp = np.arange(-4.0, 9)  # Pixel p is p - 4.
    rois = np.zeros((len(x1), 5), dtype)
    rois[:, 1] = rois[:, 3] = x1
    # A displacement of 4.5 pixels over a ROI of 1: from x - 0.5 to x + 4.
    assert_reads_along_x(ramp, rois, 4.5, expected, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_last_corners_round_half_away_from_zero(dtype):
    """Each ROI is one sample two sizes from its start, on a ramp."""
    x2, expected = halves_and_near(np.dtype(dtype).type)
    rois = np.zeros((len(x2), 5), dtype)
    rois[:, 1], rois[:, 3] = -6, x2
    # From -6.5, twice the size, which is x + 1 + 6.
    assert_reads_along_x(np.arange(24.0), rois, 2, 2 * expected + 7.5, dtype)


def assert_reads_along_x(ramp, rois, displacement, expected, dtype):
    output = forward(
        ramp.reshape(1, 1, -1, 1),
        rois,
        np.full((len(rois), 1, 1, 2), [0.5, displacement]),
        dtype=dtype,
        output_dim=1,
        spatial_scale=1.0,
        pooled_size=1,
        sample_per_part=1,
        trans_std=1.0,
    )
    np.testing.assert_array_equal(output.ravel(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_far_corners_and_large_sizes_keep_their_order_of_operations(axis):
    """Where float32 coordinates are coarse, each rounding shows."""
    rng = np.random.default_rng(axis)
    num_rois, far = 12, 30000
    rois = np.zeros((num_rois, 5))
    rois[:, 2 - axis] = rng.uniform(0.5 * far, far, num_rois)
    rois[:, 4 - axis] = rois[:, 2 - axis] + rng.uniform(0, 9000, num_rois)
    size, bins = ((far, 1), (5, 1)) if axis == 0 else ((1, far), (1, 5))
    operands = (
        rng.normal(size=(1, *size, 2)),
        np.float32(rois),
        np.float32(rng.normal(size=(num_rois, *bins, 2))),
        rng.normal(size=(num_rois, *bins, 2)),
    )
    attributes = dict(
        output_dim=2,
        spatial_scale=0.9,
        pooled_size=bins,
        group_size=1,
        sample_per_part=6,  # From 3 on, times a step is rounded.
    )
    check(operands, attributes, ["float64", "float32"], (2,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_rois_that_are_not_finite_touch_nothing(dtype):
    """Also where maps, displacements and gradients are NaN."""
    rois = np.zeros((12, 5))
    rois[:, 3:] = 5
    rois[:4, 0] = [-1, -7, -np.inf, -(2.0**40)]
    for index in range(4, 12):
        bad = [np.nan, np.inf, -np.inf][index % 3]
        rois[index, 1 + index % 4] = bad
    trans = np.zeros((12, 2, 2, 2))
    trans[1::2] = np.nan
    operands = (np.full((2, 6, 7, 20), np.nan), rois, trans)
    output_grad = np.full((12, 2, 2, 5), np.nan)
    attributes = dict(output_dim=5, spatial_scale=1.0, pooled_size=2)
    output, count = forward(
        *operands, dtype=dtype, return_count=True, **attributes
    )
    assert (output == 0).all() and (count == 0).all()
    gradients = backward(*operands, output_grad, dtype=dtype, **attributes)
    assert (gradients["inputs"] == 0).all()
    assert (gradients["displacement"] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_class_that_samples_nothing_touches_nothing(dtype):
    """One class is pushed off the map; the other is pooled as if alone."""
    rng = np.random.default_rng(0)
    trans = np.zeros((1, 1, 1, 4))
    trans[..., 2:] = 100
    attributes = dict(
        output_dim=6, spatial_scale=1.0, pooled_size=1, part_size=1
    )
    inputs = rng.normal(size=(1, 5, 6, 6))
    inputs[..., 3:] = np.nan
    output_grad = np.ones((1, 1, 1, 6))
    output_grad[..., 3:] = np.inf
    rois = np.array([[0.0, 1, 1, 3, 3]])
    output, count = forward(
        inputs, rois, trans, dtype=dtype, return_count=True, **attributes
    )
    assert (output[..., 3:] == 0).all() and (count[..., 3:] == 0).all()
    assert (output[..., :3] != 0).all() and (count[..., :3] == 16).all()
    gradients = backward(
        inputs, rois, trans, output_grad, dtype=dtype, **attributes
    )
    assert (gradients["inputs"][..., 3:] == 0).all()
    assert (gradients["displacement"][..., 2:] == 0).all()
    np.testing.assert_allclose(gradients["inputs"].sum(), 3, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_corners_give_what_the_formula_gives(dtype):
    """And at once. Some overflow on the way; then nothing is counted."""
    real = np.dtype(dtype).type
    huge = [1e30, 1e18, 2.0**31, 2.0**63, float(np.finfo(real).max)]
    corners = [
        [a, b, c, d]
        for v in huge
        for a, b, c, d in [
            (2, 2, v, v),
            (2, 1, 5, v),
            (-v, -v, v, v),
            (-v, 1, 4, 4),
            (v, v, v, v),
            (-v, -v, -v, -v),
            (v, v, -v, -v),
            (2, v, 4, -v),
        ]
    ]
    rois = np.array([[0, *corner] for corner in corners], real)
    rng = np.random.default_rng(0)
    operands = (
        rng.normal(size=(1, 6, 7, 4)).astype(real),
        rois,
        rng.normal(size=(len(rois), 2, 2, 2)).astype(real),
    )
    output_grad = rng.normal(size=(len(rois), 2, 2, 4)).astype(real)
    for scale in (1.0, 0.25, 16.0):
        for trans in (None, operands[2], np.zeros_like(operands[2])):
            exact = (*operands[:2], trans)
            attributes = dict(
                output_dim=4,
                spatial_scale=scale,
                pooled_size=2,
                group_size=1,
                sample_per_part=2,
            )
            expected, count = roi_reference.deformable_psroi_pool(
                *exact, return_count=True, **attributes
            )
            gradients = roi_reference.deformable_psroi_pool_grad(
                *exact, output_grad, **attributes
            )
            start = time.monotonic()
            received = forward(
                *exact, dtype=dtype, return_count=True, **attributes
            )
            made = backward(*exact, output_grad, dtype=dtype, **attributes)
            assert time.monotonic() - start < 5
            assert_close(received[0], expected, dtype, "output")
            np.testing.assert_array_equal(received[1], count)
            assert_close(made["inputs"], gradients.inputs, dtype, "inputs")
            if trans is not None:
                # Up to 1e29 pixels a unit: slopes are compared.
                bins = roi_reference.psroi_bins(*exact, **attributes)
                with np.errstate(all="ignore"):
                    reach = roi_reference.reach_of_displacements(
                        bins, exact[2].shape
                    )
                assert_close(
                    made["displacement"] / reach,
                    gradients.displacement / reach,
                    dtype,
                    "displacement",
                )
    assert count.max() > 0  # Some start on the map.


def test_channels_are_group_and_class_major():
    """Each channel holds its own number, so the output names what it read."""
    output_dim, pooled, group = 6, (5, 4), (3, 2)
    channels = output_dim * group[0] * group[1]
    inputs = np.broadcast_to(np.arange(float(channels)), (1, 4, 4, channels))
    output = forward(
        inputs,
        np.array([[0.0, 0, 0, 3, 3]]),
        dtype="float64",
        output_dim=output_dim,
        spatial_scale=1.0,
        pooled_size=pooled,
        group_size=group,
        part_size=7,
        sample_per_part=2,
    )
    rows, cols = [0, 0, 1, 1, 2], [0, 0, 1, 1]
    for o, i, j in np.ndindex(output_dim, *pooled):
        expected = (o * group[0] + rows[i]) * group[1] + cols[j]
        assert output[0, i, j, o] == expected


def test_each_bin_and_class_reads_its_own_displacement():
    """On a plane of rows and columns, the output moves as it was told."""
    rng = np.random.default_rng(0)
    pooled, part, classes, per_class = (5, 3), (2, 4), 3, 2
    trans = rng.uniform(-1, 1, size=(1, *part, 2 * classes))
    y, x = np.mgrid[:40, :40]
    plane = (100.0 * y + x)[np.newaxis, ..., np.newaxis]
    attributes = dict(
        dtype="float64",
        output_dim=classes * per_class,
        spatial_scale=1.0,
        pooled_size=pooled,
        group_size=1,
        part_size=part,
        sample_per_part=2,
        trans_std=0.25,
    )
    inputs = np.repeat(plane, classes * per_class, axis=3)
    rois = np.array([[0.0, 12, 11, 27, 20]])  # 16 wide, 10 high
    still = forward(inputs, rois, **attributes)
    moved = forward(inputs, rois, trans, **attributes) - still
    rows, cols = [0, 0, 0, 1, 1], [0, 1, 2]
    for i, j, o in np.ndindex(*pooled, classes * per_class):
        kind = o // per_class
        dy, dx = trans[0, rows[i], cols[j], 2 * kind : 2 * kind + 2]
        expected = 0.25 * (100 * dy * 10 + dx * 16)
        np.testing.assert_allclose(moved[0, i, j, o], expected, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_types_are_summed_in_float32_and_rounded_once(dtype):
    """4096 ROIs add to one pixel, 256 samples to one bin."""
    rois = np.zeros((4096, 5))
    attributes = dict(
        dtype=dtype, output_dim=1, spatial_scale=1.0, pooled_size=1
    )
    inputs, output_grad = np.ones((1, 1, 1, 1)), np.ones((4096, 1, 1, 1))
    gradients = backward(inputs, rois, None, output_grad, **attributes)
    assert gradients["inputs"].item() == 4096
    attributes["sample_per_part"] = 16
    inputs = np.full((1, 1, 1, 1), 1.5 + 2.0**-7)
    output = forward(inputs, rois[:1], None, **attributes)
    assert output.item() == 1.5 + 2.0**-7


def test_16_bit_maps_keep_float32_coordinates():
    """0.3 pixels, a thousand pixels from the origin."""
    for dtype in HALF_UNIT:
        inputs = np.zeros((1, 1, 1100, 1))
        inputs[0, 0, 1001] = 1.0
        trans = np.reshape([0.5, 1000.8], (1, 1, 1, 2))
        output = forward(
            inputs,
            np.zeros((1, 5)),
            trans,
            dtype=dtype,
            output_dim=1,
            spatial_scale=1.0,
            pooled_size=1,
            sample_per_part=1,
            trans_std=1.0,
        )
        fraction = np.float32(1000.8) - np.float32(0.5) - 1000
        error = abs(output.item() - fraction)
        assert error <= HALF_UNIT[dtype] * fraction


def test_values_that_are_not_finite_show_where_they_are_read():
    inputs = np.zeros((2, 6, 6, 3))
    inputs[0, 2, 2, 1] = np.nan
    rois = np.array([[0, 1, 1, 3, 3], [0, 4, 4, 5, 5], [1, 1, 1, 3, 3.0]])
    attributes = dict(output_dim=3, spatial_scale=1.0, pooled_size=1)
    for dtype in DTYPES:
        output = forward(inputs, rois, dtype=dtype, **attributes)
        bad = np.argwhere(~np.isfinite(output))
        np.testing.assert_array_equal(bad, [[0, 0, 0, 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, size, num_rois",
    [(0, (4, 5), 0), (0, (4, 5), 3), (2, (0, 5), 3), (2, (4, 0), 3)]
    + [(2, (0, 0), 3), (2, (4, 5), 0)],
)
def test_empty(batch, size, num_rois, dtype):
    """No image takes padding only; an empty map gives zeros."""
    rois = np.zeros((num_rois, 5))
    rois[:, 0] = 1 if batch else -1
    operands = (
        np.ones((batch, *size, 12)),
        rois,
        np.ones((num_rois, 2, 1, 2)),
        np.ones((num_rois, 3, 2, 3)),
    )
    attributes = dict(
        output_dim=3,
        spatial_scale=1.0,
        pooled_size=(3, 2),
        group_size=2,
        part_size=(2, 1),
    )
    for threads in (1, 2):
        common = dict(dtype=dtype, threads=threads, **attributes)
        output, count = forward(*operands[:3], return_count=True, **common)
        assert output.shape == count.shape == (num_rois, 3, 2, 3)
        assert not output.any() and not count.any()
        gradients = backward(*operands, **common)
        assert not gradients["inputs"].any()
        assert not gradients["displacement"].any()


BAD_INDICES = [2, 3, 1e30, np.inf, np.nan, 0.5, 2.5, -0.5, -7.25, 1.0000001]


@pytest.mark.parametrize("bad", BAD_INDICES)
@pytest.mark.parametrize("corner", [1.0, np.nan])
def test_batch_index_is_checked_and_never_followed(bad, corner):
    """Also of a ROI whose corners are not finite. The row is named."""
    rois = np.zeros((9, 5))
    rois[:, 3:] = 2
    rois[5, 0], rois[5, 2] = bad, corner
    if bad == 1.0000001 and np.float32(bad) == 1:
        rois[5, 0] = bad = 1 + 2.0**-23
    inputs, trans = np.ones((2, 4, 4, 4)), np.zeros((9, 2, 2, 2))
    attributes = dict(output_dim=1, spatial_scale=1.0, pooled_size=2)
    output_grad = np.ones((9, 2, 2, 1))
    for threads, dtype in itertools.product((1, 3), ("float32", "float64")):
        common = dict(dtype=dtype, threads=threads, **attributes)
        with pytest.raises(core.CoreError) as error:
            forward(inputs, rois, trans, **common)
        text = str(error.value)
        assert re.match("Expected .*batch ind.*`rois`.*below 2.*", text)
        assert re.search(r"Received: rois\[5, 0\]=", text)
        try:
            gradients = backward(inputs, rois, trans, output_grad, **common)
        except core.CoreError as caught:
            assert "rois[5, 0]=" in str(caught)
        else:
            assert not gradients["displacement"][5].any()
        # Callers that cannot take an error get what padding gives.
        outputs, gradients = [], []
        padding = rois.copy()
        padding[5, 0] = -1
        for given in (rois, padding):
            operands = (inputs, given, trans)
            more = dict(common, bad_rois_are_padding=True)
            outputs.append(forward(*operands, **more))
            gradients.append(backward(*operands, output_grad, **more))
        np.testing.assert_array_equal(*outputs)
        assert outputs[0][4].any() and not outputs[0][5].any()
        for name in ("inputs", "displacement"):
            np.testing.assert_array_equal(*(g[name] for g in gradients))


def test_batch_index_minus_zero_is_the_first_image():
    inputs = np.ones((2, 3, 3, 1)) * np.reshape([5, 6], (2, 1, 1, 1))
    rois = np.array([[-0.0, 0, 0, 2, 2], [1, 0, 0, 2, 2]])
    output = forward(
        inputs, rois, output_dim=1, spatial_scale=1.0, pooled_size=1
    )
    np.testing.assert_array_equal(output.ravel(), [5, 6])


def test_more_elements_than_32_bits_can_count():
    """The last pixels of an image of 2**31 + 4633 elements.

    The memory is allocated, but only the pages that are read become real.
    """
    size = 46341
    inputs = np.zeros((1, size, size, 1), np.float16)
    inputs[0, -1, -2:, 0] = [3, 5]
    # One sample, at (size - 1, size - 1.75).
    rois = np.array([[0, size - 2, size - 1, size - 2, size - 1.0]])
    trans = np.reshape([0.5, 0.75], (1, 1, 1, 2))
    common = dict(
        dtype="float16",
        output_dim=1,
        spatial_scale=1.0,
        pooled_size=1,
        sample_per_part=1,
        trans_std=1.0,
    )
    output = forward(inputs, rois, trans, **common)
    assert output.item() == 3.5
    gradients = backward(
        inputs,
        rois,
        trans,
        np.ones((1, 1, 1, 1)),
        wanted=("displacement",),
        **common,
    )
    np.testing.assert_array_equal(gradients["displacement"].ravel(), [0, 2])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    """The same tests, with faster instructions switched off."""
    if os.environ.get("TF_DEFORM_MAX_ISA"):
        pytest.skip("this is the inner run")
    here = pathlib.Path(__file__)
    script = "import core; print(core.instruction_set())"
    environment = {**os.environ, "TF_DEFORM_MAX_ISA": isa}
    path = [str(here.parents[1] / "lib")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    name = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    if isa != name.stdout.strip():
        pytest.skip(f"this processor has no {isa}")
    selected = "reference or edges or place or alone or 16_bit or order"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + ["-k", selected, str(here)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


# Judging shapes and attributes. A change to None: the call is good.
BAD = [
    (dict(inputs=(2, 8, 9)), "`inputs`"),
    (dict(inputs=(1, 2, 8, 9, 36)), "`inputs`"),
    (dict(inputs=(2, 8, 9, 35)), "36"),
    (dict(inputs=(None, None, None, 37)), "36"),
    (dict(inputs=(2, 8, 9, 0)), "36"),
    (dict(rois=(5, 4)), "`rois`"),
    (dict(rois=(None, 6)), "`rois`"),
    (dict(rois=(5,)), "`rois`"),
    (dict(rois=(1, 5, 5)), "`rois`"),
    (dict(trans=(5, 5, 2)), "`trans`"),
    (dict(trans=(4, 5, 2, 6)), "`trans`"),
    (dict(trans=(5, 2, 5, 6)), "`trans`"),
    (dict(trans=(5, 5, 3, 6)), "`trans`"),
    (dict(trans=(None, None, 4, None)), "`trans`"),
    (dict(trans=(5, 5, 2, 5)), "`trans`"),
    (dict(trans=(5, 5, 2, 0)), "`trans`"),
    (dict(trans=(5, 5, 2, 8)), "output_dim"),
    (dict(trans=(None, None, None, 14)), "output_dim"),
    (dict(grad_output=(5, 3, 4, 5)), "`grad_output`"),
    (dict(grad_output=(5, 4, 3, 6)), "`grad_output`"),
    (dict(grad_output=(4, 3, 4, 6)), "`grad_output`"),
    (dict(output_dim=0), "output_dim"),
    (dict(output_dim=-6), "output_dim"),
    (dict(pooled_size=(0, 4)), "pooled_size"),
    (dict(pooled_size=(3, -1)), "pooled_size"),
    (dict(group_size=(0, 2)), "group_size"),
    (dict(part_size=(5, 0)), "part_size"),
    (dict(part_size=(5, 0), trans=None), "part_size"),
    (dict(sample_per_part=0), "sample_per_part"),
    (dict(sample_per_part=-1), "sample_per_part"),
    (dict(spatial_scale=0.0), "spatial_scale"),
    (dict(spatial_scale=-0.5), "spatial_scale"),
    (dict(spatial_scale=np.nan), "spatial_scale"),
    (dict(spatial_scale=np.inf), "spatial_scale"),
    (dict(trans_std=-0.1), "trans_std"),
    (dict(trans_std=np.nan), "trans_std"),
    (dict(trans_std=np.inf), "trans_std"),
    # Products that 64 bits cannot hold.
    (dict(output_dim=2**62, inputs=None, trans=None), ""),
    (dict(output_dim=2**40, group_size=2**20, inputs=None, trans=None), ""),
    (dict(group_size=2**62, inputs=None), ""),
    (dict(pooled_size=2**40, part_size=(5, 2)), ""),
    (dict(pooled_size=2**62, part_size=(5, 2)), ""),
    (dict(pooled_size=2**24, rois=(2**20, 5), trans=None), ""),
    (dict(sample_per_part=2**40), ""),
    (dict(inputs=(2**62, 8, 9, 36)), "`inputs`"),
    (dict(inputs=(2**30, 2**30, 9, 36)), "`inputs`"),
    (dict(rois=(2**62, 5), trans=None), ""),
    # Good ones.
    (dict(), None),
    (dict(trans=None, part_size=2**31 - 1), None),
    (dict(inputs=None, rois=None, trans=None), None),
    (dict(inputs=(None,) * 4, rois=(None, 5), trans=(None,) * 4), None),
    (dict(inputs=(0, 0, 0, 36), rois=(0, 5), trans=(0, 5, 2, 6)), None),
    (dict(grad_output=(5, 3, 4, 6)), None),
    (dict(trans_std=0.0, sample_per_part=1), None),
    (dict(pooled_size=(7, 2)), None),
]


@pytest.mark.parametrize("change, text", BAD, ids=str)
def test_judges_shapes(change, text):
    call = dict(
        inputs=(2, 8, 9, 36),
        rois=(5, 5),
        trans=(5, 5, 2, 6),
        grad_output=None,
        output_dim=6,
        spatial_scale=0.25,
        pooled_size=(3, 4),
        group_size=(3, 2),
        part_size=(5, 2),
    )
    call.update(change)
    call["displacement"] = call.pop("trans")
    if text is None:
        validate(**call)
        return
    with pytest.raises(core.CoreError) as error:
        validate(**call)
    assert text in str(error.value)
    assert re.match("Expected .* Received: ", str(error.value))


def test_says_what_it_found():
    params = validate(
        (2, 8, 9, 36),
        (7, 5),
        (7, 5, 2, 6),
        output_dim=6,
        spatial_scale=0.25,
        pooled_size=(3, 4),
        group_size=(3, 2),
        part_size=(5, 2),
    )
    found = {name: getattr(params, name) for name, _ in params._fields_[10:]}
    assert found == dict(
        batch=2, height=8, width=9, channels=36, num_rois=7, num_classes=3
    )
