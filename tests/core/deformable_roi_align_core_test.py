# SPDX-License-Identifier: Apache-2.0
"""Deformable ROIAlign in the core, through its C interface."""

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

OP = "DeformableROIAlign"
validate = functools.partial(core.validate_roi, OP)
forward = functools.partial(core.forward_roi, OP)
backward = functools.partial(core.backward_roi, OP)

DTYPES = list(core.DTYPES)
# Fewer in the runs with other instruction sets.
SEEDS = 30 if os.environ.get("TF_DEFORM_MAX_ISA") else 100


def check(operands, attributes, dtypes=DTYPES, threads=(1, 2, 5)):
    """Output and gradients, in every type, for any number of threads."""
    for dtype in dtypes:
        exact = core.rounded(operands, dtype)
        expected = roi_reference.deformable_roi_align(*exact[:3], **attributes)
        gradients = roi_reference.deformable_roi_align_grad(
            *exact, **attributes
        )
        results = []
        for workers in threads:
            common = dict(dtype=dtype, threads=workers, **attributes)
            made = backward(*exact, **common)
            results.append([forward(*exact[:3], **common), *made.values()])
        assert_close(results[0][0], expected, dtype, "output")
        coordinates = "float64" if dtype == "float64" else "float32"
        for name, gradient in zip(made, results[0][1:], strict=True):
            gradient_type = dtype if name == "inputs" else coordinates
            assert_close(
                gradient, getattr(gradients, name), gradient_type, name
            )
        for other in results[1:]:
            for one, two in zip(results[0], other, strict=True):
                assert one.tobytes() == two.tobytes(), "threads changed it"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_agrees_with_reference_for_any_type_and_number_of_threads(seed):
    check(*roi_reference.draw_roi_align_call(seed))


# One below, at, and one past vectors of 4, 8 and 16 elements, and their sums.
@pytest.mark.parametrize(
    "channels", [*range(1, 21), 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70]
)
def test_vector_edges(channels):
    rng = np.random.default_rng(channels)
    operands = (
        rng.normal(size=(1, 4, 5, channels)),
        [[0, 1, 1, 6, 5]],
        rng.normal(size=(1, 2, 3, 2)),
        rng.normal(size=(1, 2, 3, channels)),
    )
    attributes = dict(pooled_size=(2, 3), spatial_scale=0.6, sampling_ratio=2)
    check(operands, attributes, ["float64", "float32", "bfloat16"], (1, 2))


def draw_crowd(seed, num_rois, dtype):
    """Many ROIs of all kinds on the same pixels of three images."""
    rng = np.random.default_rng(seed)
    size, channels = (19, 23), 21
    attributes = dict(pooled_size=(5, 4), spatial_scale=1 / 8)
    operands = (
        rng.normal(size=(3, *size, channels)),
        roi_reference.draw_rois(rng, 3, size, 1 / 8, num_rois),
        rng.normal(size=(num_rois, 5, 4, 2)),
        rng.normal(size=(num_rois, 5, 4, channels)),
    )
    return core.rounded(operands, dtype), attributes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rois", [1, 2, 63, 64, 65, 300])
def test_threads_change_no_bit_of_many_rois(num_rois, dtype):
    operands, attributes = draw_crowd(num_rois, num_rois, dtype)
    results = []
    for threads in (1, 2, 3, 5, 16):
        common = dict(dtype=dtype, threads=threads, **attributes)
        output = forward(*operands[:3], **common)
        made = backward(*operands, **common)
        results.append([a.tobytes() for a in (output, *made.values())])
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_gradient_is_the_same_alone(dtype, threads):
    operands, attributes = draw_crowd(0, 40, dtype)
    common = dict(dtype=dtype, threads=threads, **attributes)
    together = backward(*operands, **common)
    for name in ("inputs", "displacement"):
        alone = backward(*operands, wanted=(name,), **common)
        assert list(alone) == [name]
        assert alone[name].tobytes() == together[name].tobytes()
    assert backward(*operands, wanted=(), **common) == {}


def test_a_roi_does_not_depend_on_the_others():
    """Nor on its place among them: each is pooled alone to the same bits."""
    (inputs, rois, offset, _), attributes = draw_crowd(5, 37, "float32")
    output = forward(inputs, rois, offset, **attributes)
    back = slice(None, None, -1)
    turned = forward(inputs, rois[back], offset[back], **attributes)
    assert turned[back].tobytes() == output.tobytes()
    for one in (slice(3, 4), slice(12, 13), slice(36, 37)):
        alone = forward(inputs, rois[one], offset[one], **attributes)
        assert alone.tobytes() == output[one].tobytes()


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_gradients_equal_finite_differences(seed, sampling_ratio):
    """In float64; displacements keep samples off the places of a jump."""
    rng = np.random.default_rng(seed)
    attributes = dict(
        pooled_size=(2, 3),
        spatial_scale=0.5,
        sampling_ratio=sampling_ratio,
        gamma=0.2,
    )
    inputs = rng.normal(size=(2, 5, 7, 3))
    kinds = ("inside", "across the edge", "padding", "not finite")
    if sampling_ratio > 0:
        kinds += ("reversed",)
    rois = roi_reference.draw_rois(rng, 2, (5, 7), 0.5, 5, kinds)
    offset = rng.uniform(-1, 1, (5, 2, 3, 2))
    roi_reference.move_off_kinks(
        rng,
        lambda: roi_reference.roi_align_bins(
            inputs, rois, offset, **attributes
        ),
        offset,
    )
    output_grad = rng.normal(size=(5, 2, 3, 3))
    gradients = backward(
        inputs, rois, offset, output_grad, dtype="float64", **attributes
    )

    def loss():
        output = forward(inputs, rois, offset, dtype="float64", **attributes)
        return np.sum(output * output_grad)

    assert_finite_differences(rng, loss, inputs, gradients["inputs"])
    assert_finite_differences(rng, loss, offset, gradients["displacement"])
    assert np.abs(gradients["displacement"]).max() > 0.01


# A column of three pixels, 1, 3 and 7, under a bin of one sample. The ROI is
# 1 high and begins at -0.5, so its centre is 0, and a displacement of y reads
# at y.
PLACES = [  # y, value, slope in y
    (-1.25, 0, 0),
    (-1, 1, 0),  # As far as it goes; clamped.
    (-0.25, 1, 0),
    (0, 1, 2),  # The cell [0, 1].
    (0.25, 1.5, 2),
    (1, 3, 4),  # The cell to the right of an integer.
    (1.5, 5, 4),
    (2, 7, 0),  # The edge is held from here on.
    (2.75, 7, 0),
    (3, 7, 0),
    (3.25, 0, 0),
    (1e9, 0, 0),
    (-1e9, 0, 0),
    (np.nan, 0, 0),
    (np.inf, 0, 0),
    (-np.inf, 0, 0),
]


@pytest.mark.parametrize("y, value, slope", PLACES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_slope_at_a_place(y, value, slope, axis, dtype):
    """Exact in every type, along either axis, and with 40 channels too."""
    shape = (1, 3, 1, 1) if axis == 0 else (1, 1, 3, 1)
    attributes = dict(
        spatial_scale=1.0, pooled_size=1, sampling_ratio=1, gamma=1.0
    )
    offset = np.reshape([y, 0] if axis == 0 else [0, y], (1, 1, 1, 2))
    for channels in (1, 40):
        pixels = np.reshape([1.0, 3.0, 7.0], shape)
        operands = (
            np.repeat(pixels, channels, axis=3),
            np.array([[0, 0, 0, 1, 1.0]]),
            offset,
        )
        output = forward(*operands, dtype=dtype, **attributes)
        assert (output == value).all()
        output_grad = np.zeros((1, 1, 1, channels))
        output_grad[..., -1] = 1
        gradients = backward(*operands, output_grad, dtype=dtype, **attributes)
        assert gradients["displacement"].reshape(2)[axis] == slope
        assert gradients["displacement"].reshape(2)[1 - axis] == 0
        assert gradients["inputs"].sum() == (value != 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_place_at_once(dtype):
    """All pairs of places around the edges, also on a map of one pixel."""
    real = np.dtype(dtype).type
    for size in ((3, 2), (1, 1)):
        axes = []
        for n in size:
            marks = [real(v) for v in (-1, 0, 1, n - 1, n)]
            marks += [
                np.nextafter(v, real(way))
                for v in marks
                for way in (-np.inf, np.inf)
            ]
            axes.append([*marks, np.nan, np.inf, 1e30, -1e30])
        offset = np.array(list(itertools.product(*axes)), real)
        rng = np.random.default_rng(0)
        operands = (
            rng.normal(size=(1, *size, 3)).astype(real),
            np.tile(np.array([0, 0, 0, 1, 1], real), (len(offset), 1)),
            offset.reshape(-1, 1, 1, 2),
            rng.normal(size=(len(offset), 1, 1, 3)).astype(real),
        )
        attributes = dict(
            spatial_scale=1.0, pooled_size=1, sampling_ratio=1, gamma=1.0
        )
        check(operands, attributes, [dtype], (1,))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("displaced", [False, True])
@pytest.mark.parametrize("channels", [1, 19])
@pytest.mark.parametrize("samples", [2, 3, 4, 5, 7, 8, 9, 11, 16, 17])
def test_samples_outside_count_in_the_mean(samples, channels, displaced, dtype):
    """Ones everywhere, so that the mean is the share of samples on the map.

    On 4 pixels, samples at -1.5, -0.5, ...: up to five are in [-1, 4].
    """
    offset = np.zeros((1, 1, 1, 2)) if displaced else None
    for size, roi in (
        ((1, 4), [0, -1.5, 0, samples - 1.5, 1]),
        ((4, 1), [0, 0, -1.5, 1, samples - 1.5]),
    ):
        output = forward(
            np.ones((1, *size, channels)),
            np.array([roi]),
            offset,
            dtype=dtype,
            pooled_size=1,
            spatial_scale=1.0,
            sampling_ratio=samples,
        )
        expected = min(samples - 1, 5) / samples
        np.testing.assert_allclose(output.ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "height, samples",
    [(0, 0), (-3, 0), (0.5, 1), (2, 1), (2.25, 2), (6, 3), (6.5, 4)]
    + [(13.5, 7), (14, 7), (16, 7), (1e9, 7), (1e30, 7)],
)
def test_adaptive_number_of_samples(height, samples, dtype):
    """ceil(height / 2) for 2 bins on 7 rows, and at most ceil(2 * 7 / 2).

    One sample more than that would give another mean.
    """
    inputs = np.random.default_rng(0).normal(size=(1, 7, 40, 3))
    rois = np.array([[0, 4, 1.25, 4 + 3, 1.25 + height]], dtype)
    attributes = dict(pooled_size=(2, 3), spatial_scale=1.0, dtype=dtype)
    output = forward(inputs, rois, sampling_ratio=0, **attributes)
    np.testing.assert_array_equal(
        output, forward(inputs, rois, sampling_ratio=1 - 2**31, **attributes)
    )
    if samples == 0:
        assert not output.any()
        return
    # One sample along x in each of the 3 bins, of width 1.
    xs, bin_size = [4, 5, 6], rois[0, 4] - rois[0, 2]
    bin_size = bin_size / rois.dtype.type(2)
    for n in (samples, samples + 1):
        step = bin_size / rois.dtype.type(n)
        means = np.zeros((2, 3, 3))
        for bin_row in range(2):
            ys = rois[0, 2] - rois.dtype.type(0.5) + bin_row * bin_size
            ys = ys + (np.arange(n) + 0.5).astype(dtype) * step
            for y in ys.astype(float):
                if -1 <= y <= 7:
                    y = min(max(y, 0), 6)
                    low = min(int(y), 5)
                    rows = inputs[0, low : low + 2, xs]
                    both = (low + 1 - y) * rows[:, 0] + (y - low) * rows[:, 1]
                    means[bin_row] += both / n
        same = np.allclose(output[0], means, rtol=0, atol=1e-5)
        if n == samples:
            assert same
        elif samples > 1 and np.abs(means).max() > 1e-3:
            assert not same


@pytest.mark.parametrize("axis", [0, 1])
def test_far_corners_and_large_sizes_keep_their_order_of_operations(axis):
    """Where float32 coordinates are coarse, each rounding shows."""
    rng = np.random.default_rng(axis)
    num_rois, far = 12, 30000
    rois = np.zeros((num_rois, 5))
    rois[:, 3:] = 1
    rois[:, 2 - axis] = rng.uniform(0.5 * far, far, num_rois)
    rois[:, 4 - axis] = rois[:, 2 - axis] + rng.uniform(0, 9000, num_rois)
    size, bins = ((far, 1), (5, 1)) if axis == 0 else ((1, far), (1, 5))
    operands = (
        rng.normal(size=(1, *size, 2)),
        np.float32(rois),
        np.float32(rng.normal(size=(num_rois, *bins, 2))),
        rng.normal(size=(num_rois, *bins, 2)),
    )
    attributes = dict(pooled_size=bins, spatial_scale=0.9, sampling_ratio=5)
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
    offset = np.zeros((12, 2, 2, 2))
    offset[1::2] = np.nan
    operands = (np.full((2, 6, 7, 5), np.nan), rois, offset)
    output_grad = np.full((12, 2, 2, 5), np.nan)
    for ratio in (0, 2):
        attributes = dict(
            dtype=dtype, spatial_scale=1.0, pooled_size=2, sampling_ratio=ratio
        )
        assert (forward(*operands, **attributes) == 0).all()
        gradients = backward(*operands, output_grad, **attributes)
        assert (gradients["inputs"] == 0).all()
        assert (gradients["displacement"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_outside_touch_nothing(dtype):
    """Also where maps and gradients are NaN."""
    rois = np.array([[0, 20, 1, 25, 4], [1, 1, -30, 5, -20.0], [0, 0, 0, 3, 3]])
    offset = np.zeros((3, 2, 2, 2))
    offset[2] = [[[np.nan, 0], [0, np.nan]], [[np.inf, 0], [90, -np.inf]]]
    operands = (np.full((2, 6, 7, 5), np.nan), rois, offset)
    output_grad = np.full((3, 2, 2, 5), np.nan)
    attributes = dict(dtype=dtype, spatial_scale=1.0, pooled_size=2)
    assert (forward(*operands, **attributes) == 0).all()
    gradients = backward(*operands, output_grad, **attributes)
    assert (gradients["inputs"] == 0).all()
    assert (gradients["displacement"] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_corners_give_what_the_formula_gives(dtype):
    """And at once. Some overflow on the way; then nothing is read."""
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
    inputs = rng.normal(size=(1, 6, 7, 4)).astype(real)
    output_grad = rng.normal(size=(len(rois), 2, 3, 4)).astype(real)
    drawn = rng.normal(size=(len(rois), 2, 3, 2)).astype(real)
    for scale, ratio, offset in itertools.product(
        (1.0, 0.25, 16.0), (0, 2, 3), (None, drawn, np.zeros_like(drawn))
    ):
        exact = inputs, rois, offset
        attributes = dict(
            pooled_size=(2, 3), spatial_scale=scale, sampling_ratio=ratio
        )
        expected = roi_reference.deformable_roi_align(*exact, **attributes)
        gradients = roi_reference.deformable_roi_align_grad(
            *exact, output_grad, **attributes
        )
        start = time.monotonic()
        received = forward(*exact, dtype=dtype, **attributes)
        made = backward(*exact, output_grad, dtype=dtype, **attributes)
        assert time.monotonic() - start < 5
        assert_close(received, expected, dtype, "output")
        assert_close(made["inputs"], gradients.inputs, dtype, "inputs")
        if offset is not None:
            # Up to 1e29 pixels a unit: slopes are compared.
            bins = roi_reference.roi_align_bins(*exact, **attributes)
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


def test_each_bin_reads_its_own_displacement():
    """On a plane of rows and columns, the output moves as it was told."""
    rng = np.random.default_rng(0)
    pooled = (5, 3)
    offset = rng.uniform(-1, 1, size=(1, *pooled, 2))
    y, x = np.mgrid[:40, :40]
    inputs = (100.0 * y + x)[np.newaxis, ..., np.newaxis]
    attributes = dict(
        dtype="float64",
        spatial_scale=0.5,
        pooled_size=pooled,
        sampling_ratio=2,
        gamma=0.25,
    )
    rois = np.array([[0.0, 24, 22, 56, 42]])  # 16 wide, 10 high
    still = forward(inputs, rois, **attributes)
    moved = forward(inputs, rois, offset, **attributes) - still
    expected = 0.25 * (100 * offset[..., 0] * 10 + offset[..., 1] * 16)
    np.testing.assert_allclose(moved[..., 0], expected, atol=1e-9)
    # Corners 12 and 11, less half a pixel; bins of 16/3 by 2 pixels.
    rows, cols = (
        10.5 + 2 * (np.arange(5) + 0.5),
        11.5 + 16 / 3 * (np.arange(3) + 0.5),
    )
    np.testing.assert_allclose(
        still[0, ..., 0], 100 * rows[:, np.newaxis] + cols, atol=1e-9
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_types_are_summed_in_float32_and_rounded_once(dtype):
    """4096 ROIs add to one pixel, 256 samples to one bin."""
    rois = np.zeros((4096, 5))
    rois[:, 3:] = 0.5
    attributes = dict(
        dtype=dtype, spatial_scale=1.0, pooled_size=1, sampling_ratio=1
    )
    inputs, output_grad = np.ones((1, 1, 1, 1)), np.ones((4096, 1, 1, 1))
    gradients = backward(inputs, rois, None, output_grad, **attributes)
    assert gradients["inputs"].item() == 4096
    attributes["sampling_ratio"] = 16
    inputs = np.full((1, 1, 1, 1), 1.5 + 2.0**-7)
    output = forward(inputs, rois[:1], None, **attributes)
    assert output.item() == 1.5 + 2.0**-7


def test_16_bit_maps_keep_float32_coordinates():
    """0.3 pixels, a thousand pixels from the origin."""
    x1 = np.float32(1000.3)
    for dtype in HALF_UNIT:
        inputs = np.zeros((1, 1, 1100, 1))
        inputs[0, 0, 1001] = 1.0
        output = forward(
            inputs,
            np.array([[0, x1, 0, x1 + 1, 1]], np.float32),
            dtype=dtype,
            spatial_scale=1.0,
            pooled_size=1,
            sampling_ratio=1,
        )
        fraction = np.float64(x1) - 1000
        # The corners are coarse: 2**-14 apart.
        allowed = HALF_UNIT[dtype] * fraction + 2.0**-14
        assert abs(output.item() - fraction) <= allowed


def test_values_that_are_not_finite_show_where_they_are_read():
    inputs = np.zeros((2, 6, 6, 3))
    inputs[0, 2, 2, 1] = np.nan
    rois = np.array([[0, 1, 1, 4, 4], [0, 4, 4, 6, 6], [1, 1, 1, 4, 4.0]])
    attributes = dict(spatial_scale=1.0, pooled_size=1)
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
@pytest.mark.parametrize("ratio", [0, 2])
def test_empty(batch, size, num_rois, dtype, ratio):
    """No image takes padding only; an empty map gives zeros."""
    rois = np.zeros((num_rois, 5))
    rois[:, 0] = 1 if batch else -1
    rois[:, 3:] = 4
    operands = (
        np.ones((batch, *size, 3)),
        rois,
        np.ones((num_rois, 3, 2, 2)),
        np.ones((num_rois, 3, 2, 3)),
    )
    attributes = dict(
        spatial_scale=1.0, pooled_size=(3, 2), sampling_ratio=ratio
    )
    for threads in (1, 2):
        common = dict(dtype=dtype, threads=threads, **attributes)
        output = forward(*operands[:3], **common)
        assert output.shape == (num_rois, 3, 2, 3)
        assert not output.any()
        gradients = backward(*operands, **common)
        assert not gradients["inputs"].any()
        assert not gradients["displacement"].any()


BAD_INDICES = [2, 3, 1e30, np.inf, np.nan, 0.5, 2.5, -0.5, -7.25]


@pytest.mark.parametrize("bad", [*BAD_INDICES, 1 + 2.0**-23])
@pytest.mark.parametrize("corner", [1.0, np.nan])
def test_batch_index_is_checked_and_never_followed(bad, corner):
    """Also of a ROI whose corners are not finite. The row is named."""
    rois = np.zeros((9, 5))
    rois[:, 3:] = 2
    rois[5, 0], rois[5, 2] = bad, corner
    inputs, offset = np.ones((2, 4, 4, 3)), np.zeros((9, 2, 2, 2))
    attributes = dict(spatial_scale=1.0, pooled_size=2)
    output_grad = np.ones((9, 2, 2, 3))
    for threads, dtype in itertools.product((1, 3), ("float32", "float64")):
        common = dict(dtype=dtype, threads=threads, **attributes)
        with pytest.raises(core.CoreError) as error:
            forward(inputs, rois, offset, **common)
        text = str(error.value)
        assert re.match("Expected .*batch ind.*`rois`.*below 2.*", text)
        assert re.search(r"Received: rois\[5, 0\]=", text)
        try:
            gradients = backward(inputs, rois, offset, output_grad, **common)
        except core.CoreError as caught:
            assert "rois[5, 0]=" in str(caught)
        else:
            assert not gradients["displacement"][5].any()
        # Callers that cannot take an error get what padding gives.
        outputs, gradients = [], []
        padding = rois.copy()
        padding[5, 0] = -1
        for given in (rois, padding):
            operands = (inputs, given, offset)
            more = dict(common, bad_rois_are_padding=True)
            outputs.append(forward(*operands, **more))
            gradients.append(backward(*operands, output_grad, **more))
        np.testing.assert_array_equal(*outputs)
        assert outputs[0][4].any() and not outputs[0][5].any()
        for name in ("inputs", "displacement"):
            np.testing.assert_array_equal(*(g[name] for g in gradients))


def test_more_elements_than_32_bits_can_count():
    """The last pixels of an image of 2**31 + 4633 elements.

    The memory is allocated, but only the pages that are read become real.
    """
    size = 46341
    inputs = np.zeros((1, size, size, 1), np.float16)
    inputs[0, -1, -2:, 0] = [3, 5]
    # One sample, at (size - 1, size - 1.75).
    rois = np.array([[0, size - 2, size - 1, size - 1, size]], float)
    offset = np.reshape([0, 0.25], (1, 1, 1, 2))
    common = dict(
        dtype="float16",
        spatial_scale=1.0,
        pooled_size=1,
        sampling_ratio=1,
        gamma=1.0,
    )
    output = forward(inputs, rois, offset, **common)
    assert output.item() == 3.5
    gradients = backward(
        inputs,
        rois,
        offset,
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
    (dict(inputs=(1, 2, 8, 9, 6)), "`inputs`"),
    (dict(inputs=(2, 8, 9, 0)), "`inputs`"),
    (dict(rois=(5, 4)), "`rois`"),
    (dict(rois=(None, 6)), "`rois`"),
    (dict(rois=(5,)), "`rois`"),
    (dict(rois=(1, 5, 5)), "`rois`"),
    (dict(offset=(5, 3, 8)), "`offset`"),
    (dict(offset=(4, 3, 4, 2)), "`offset`"),
    (dict(offset=(5, 4, 3, 2)), "`offset`"),
    (dict(offset=(5, 3, 1, 2)), "`offset`"),
    (dict(offset=(None, None, 5, None)), "`offset`"),
    (dict(offset=(5, 3, 4, 1)), "`offset`"),
    (dict(offset=(5, 3, 4, 4)), "`offset`"),
    (dict(offset=(5, 3, 4, 0)), "`offset`"),
    (dict(grad_output=(5, 3, 4, 5)), "`grad_output`"),
    (dict(grad_output=(5, 4, 3, 6)), "`grad_output`"),
    (dict(grad_output=(4, 3, 4, 6)), "`grad_output`"),
    (dict(grad_output=(5, 3, 24)), "`grad_output`"),
    (dict(pooled_size=(0, 4)), "pooled_size"),
    (dict(pooled_size=(3, -1)), "pooled_size"),
    (dict(spatial_scale=0.0), "spatial_scale"),
    (dict(spatial_scale=-0.5), "spatial_scale"),
    (dict(spatial_scale=np.nan), "spatial_scale"),
    (dict(spatial_scale=np.inf), "spatial_scale"),
    (dict(gamma=-0.1), "gamma"),
    (dict(gamma=np.nan), "gamma"),
    (dict(gamma=np.inf), "gamma"),
    (dict(sampling_ratio=2**31), "sampling_ratio"),
    (dict(sampling_ratio=2**62), "sampling_ratio"),
    # Products that 64 bits cannot hold.
    (dict(pooled_size=2**40, offset=None), ""),
    (dict(pooled_size=2**24, rois=(2**20, 5), offset=None), ""),
    (dict(inputs=(2**62, 8, 9, 6)), "`inputs`"),
    (dict(inputs=(2**30, 2**30, 9, 6)), "`inputs`"),
    (dict(inputs=(1, 1, 1, 2**60)), ""),
    (dict(rois=(2**62, 5), offset=None), ""),
    # Good ones.
    (dict(), None),
    (dict(offset=None), None),
    (dict(inputs=None, rois=None, offset=None), None),
    (dict(inputs=(None,) * 4, rois=(None, 5), offset=(None,) * 4), None),
    (dict(inputs=(0, 0, 0, 6), rois=(0, 5), offset=(0, 3, 4, 2)), None),
    (dict(grad_output=(5, 3, 4, 6)), None),
    (dict(gamma=0.0, sampling_ratio=2**31 - 1), None),
    (dict(sampling_ratio=1 - 2**31), None),
]


@pytest.mark.parametrize("change, text", BAD, ids=str)
def test_judges_shapes(change, text):
    call = dict(
        inputs=(2, 8, 9, 6),
        rois=(5, 5),
        offset=(5, 3, 4, 2),
        grad_output=None,
        spatial_scale=0.25,
        pooled_size=(3, 4),
    )
    call.update(change)
    call["displacement"] = call.pop("offset")
    if text is None:
        validate(**call)
        return
    with pytest.raises(core.CoreError) as error:
        validate(**call)
    assert text in str(error.value)
    assert re.match("Expected .* Received: ", str(error.value))


def test_says_what_it_found():
    params = validate(
        (2, 8, 9, 6),
        (7, 5),
        (7, 3, 4, 2),
        spatial_scale=0.25,
        pooled_size=(3, 4),
    )
    found = {name: getattr(params, name) for name, _ in params._fields_[5:]}
    assert found == dict(batch=2, height=8, width=9, channels=6, num_rois=7)
