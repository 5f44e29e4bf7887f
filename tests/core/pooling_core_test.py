# SPDX-License-Identifier: Apache-2.0
"""Tests both pooling ops in the core, through their C interface.

`pooling_cuda_test.py` runs most of these tests once more, on the CUDA kernels:
a test calls the op through the fixture `runner`. Behaviour of only one of the
ops is tested in the op's own file.
"""

import itertools
import re
import time

import core
import numpy as np
import pooling
import pytest
import roi_reference
from compare import assert_close, assert_equal, assert_same_bits
from pairwise import grid
from pooling import DTYPES, PSROI_POOL, ROI_ALIGN, results


@pytest.fixture(params=pooling.OPS, ids=str)
def op(request):
    return request.param


@pytest.fixture
def runner(op):
    """Returns the object that runs the op: here on the CPU."""
    return pooling.Runner(op)


# The number of samples follows from the ROI's size, or is given.
RATIOS = [(ROI_ALIGN, dict(sampling_ratio=ratio)) for ratio in (0, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(100))
def test_agrees_with_reference_for_any_threads(runner, seed, dtype):
    operands, attributes = runner.op.draw_call(seed)
    pooling.check(runner, operands, attributes, dtype, threads=(2, 5))


def draw(op, seed, *, size, channels, num_rois=3, classes=1, batch=2, **more):
    """Draws ROIs of all kinds, and the attributes; `more` are attributes.

    The channels are those of the output.
    """
    common = dict(spatial_scale=0.5, pooled_size=(2, 3), sample_per_part=2)
    common |= dict(group_size=(2, 1), part_size=(1, 2))
    attributes = op.attributes(channels, **common | more)
    sizes = dict(channels=channels, classes=classes)
    rng = np.random.default_rng(seed)
    common = dict(batch=batch, size=size, num_rois=num_rois, **sizes)
    return op.draw(rng, attributes, **common), attributes


# Channels of a class, classes, and groups, around vectors of 4, 8 and 16
# elements, and their sums.
CLASS_EDGES = [
    (PSROI_POOL, per_class, classes, (1, 2))
    for per_class, classes in [
        *((1, 3), (3, 3), (4, 2), (5, 3), (7, 2), (8, 3), (9, 2), (15, 2)),
        *((16, 2), (17, 2), (1, 21), (63, 1), (64, 1), (65, 1), (70, 1)),
        *((35, 2), (23, 3)),
    ]
]
VECTOR_EDGES = [*range(1, 21), 24, 31, 32, 33, 48]


@pytest.mark.parametrize(
    "op, per_class, classes, group_size",
    CLASS_EDGES
    + [(PSROI_POOL, n, 1, g) for n in VECTOR_EDGES for g in (1, (2, 1))]
    + [(ROI_ALIGN, n, 1, 1) for n in [*VECTOR_EDGES, 47, 49, 63, 64, 65, 70]],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_vector_edges(runner, per_class, classes, group_size, dtype):
    channels = per_class * classes
    sizes = dict(size=(4, 5), channels=channels, classes=classes)
    sizes |= dict(group_size=group_size, sampling_ratio=2)
    operands, attributes = draw(runner.op, channels, **sizes)
    pooling.check(runner, operands, attributes, dtype, threads=(2,))


def draw_crowd(op, seed, num_rois, dtype):
    """Draws many ROIs of all kinds on the same pixels of three images."""
    sizes = dict(size=(19, 23), batch=3, num_rois=num_rois, classes=3)
    sizes |= dict(pooled_size=(5, 4), group_size=(3, 4), part_size=(2, 3))
    sizes |= dict(channels=6 if op.counts else 21, sample_per_part=3)
    operands, attributes = draw(op, seed, spatial_scale=1 / 8, **sizes)
    return core.rounded(operands, dtype), attributes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rois", [1, 2, 63, 64, 65, 300])
def test_threads_change_no_bit_of_many_rois(runner, num_rois, dtype):
    crowd, attributes = draw_crowd(runner.op, num_rois, num_rois, dtype)
    for one in runner.every():
        expected = results(one, crowd, dtype=dtype, **attributes)
        for threads in (2, 3, 5, 16):
            common = threads, dtype, attributes
            pooling.check_threads(one, crowd, expected, *common)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_each_result_is_the_same_alone(runner, dtype, threads):
    exact, attributes = draw_crowd(runner.op, 0, 40, dtype)
    common = dict(dtype=dtype, threads=threads, **attributes)
    pooling.check_alone(runner, exact, **common)
    together = results(runner, exact, **common)
    alone = {"output": runner.forward(*exact[:3], **common)}
    assert_same_bits(alone, {"output": together["output"]}, "without count")


@pytest.mark.parametrize("one", [3, 12, 36])
def test_a_roi_does_not_depend_on_the_others(runner, one):
    """Tests that a ROI's place has no effect: alone, it gives the same bits."""
    exact, attributes = draw_crowd(runner.op, 5, 37, "float32")
    inputs, rois, displacement, _ = exact
    output = runner.forward(inputs, rois, displacement, **attributes)
    back = slice(None, None, -1)
    for case, some in (("turned", back), ("alone", slice(one, one + 1))):
        received = runner.forward(
            inputs, rois[some], displacement[some], **attributes
        )
        expected = {"output": output[some]}
        assert_same_bits({"output": received}, expected, case)


# A column of three pixels, 1, 3 and 7, lies under a bin of one sample at y.
OWN_PLACES = [  # y, value, slope in y
    (PSROI_POOL, -0.75, 0, 0),  # More than half a pixel outside: skipped.
    (PSROI_POOL, -0.5, 1, 0),  # Not more: counted, and clamped.
    (PSROI_POOL, 2.25, 7, 0),
    (PSROI_POOL, 2.5, 7, 0),
    (PSROI_POOL, 2.75, 0, 0),
    (ROI_ALIGN, -1.25, 0, 0),
    (ROI_ALIGN, -1, 1, 0),  # The farthest place that is read; clamped.
    (ROI_ALIGN, 2.75, 7, 0),
    (ROI_ALIGN, 3, 7, 0),
    (ROI_ALIGN, 3.25, 0, 0),
]
PLACES = [
    (-0.25, 1, 0),
    (0, 1, 2),  # The cell [0, 1].
    (0.25, 1.5, 2),
    (1, 3, 4),  # The cell to the right of an integer.
    (1.5, 5, 4),
    (2, 7, 0),  # The edge's value holds from here on.
    *((far, 0, 0) for far in (1e9, -1e9, np.nan, np.inf, -np.inf)),
]


def one_bin(op, channels):
    """Returns the ROI and the attributes of `channels` bins of one sample."""
    return np.array([op.roi(0, 0, 1, 1.0)]), op.attributes(
        channels, **op.one_sample
    )


@grid(
    {
        "op, y, value, slope": OWN_PLACES
        + [(op, *place) for op in pooling.OPS for place in PLACES],
        "dtype": DTYPES,
        "axis": [0, 1],
        "channels": [1, 40],
    }
)
def test_value_and_slope_at_a_place(
    runner, y, value, slope, axis, dtype, channels
):
    """Tests that value and slope are exact in every type, along either axis."""
    op = runner.op
    shape = (1, 3, 1, 1) if axis == 0 else (1, 1, 3, 1)
    rois, attributes = one_bin(op, channels)
    place = np.array([y, 0] if axis == 0 else [0, y]) + op.shift
    output_grad = np.zeros((1, 1, 1, channels))
    output_grad[..., -1] = 1
    operands = (
        np.repeat(np.reshape([1.0, 3.0, 7.0], shape), channels, axis=3),
        *(rois, place.reshape(1, 1, 1, 2), output_grad),
    )
    read = float(value != 0)
    for one in runner.every():
        received = results(one, operands, dtype=dtype, **attributes)
        assert (received["output"] == value).all(), str(one.on)
        if op.counts:
            assert (received["count"] == read).all(), str(one.on)
        slopes = received["displacement"].reshape(2)
        assert slopes[axis] == slope and slopes[1 - axis] == 0, str(one.on)
        assert received["inputs"].sum() == read, str(one.on)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [(3, 2), (1, 1)])
def test_every_place_at_once(runner, size, dtype):
    """Tests all pairs of places around the edges."""
    op, real = runner.op, np.dtype(dtype).type
    axes = []
    for n in size:
        marks = [real(v) for v in (-op.margin, 0, 1, n - 1, n - 1 + op.margin)]
        marks += [
            np.nextafter(v, real(way))
            for v in marks
            for way in (-np.inf, np.inf)
        ]
        axes.append([*marks, np.nan, np.inf, 1e30, -1e30])
    places = np.array(list(itertools.product(*axes)), real) + real(op.shift)
    rng = np.random.default_rng(0)
    roi, attributes = one_bin(op, 3)
    operands = (
        rng.normal(size=(1, *size, 3)).astype(real),
        np.tile(roi.astype(real), (len(places), 1)),
        places.reshape(-1, 1, 1, 2),
        rng.normal(size=(len(places), 1, 1, 3)).astype(real),
    )
    pooling.check(runner, operands, attributes, dtype)


def test_each_bin_and_class_reads_its_own_displacement(runner):
    """Tests on ramps of rows and columns that the output moves as told."""
    op, classes, part = runner.op, 1, (5, 3)
    if op.counts:
        classes, part = 3, (2, 4)
    rng = np.random.default_rng(0)
    displacement = rng.uniform(-1, 1, size=(1, *part, 2 * classes))
    y, x = np.mgrid[:40, :40]
    inputs = np.repeat((100.0 * y + x)[np.newaxis, ..., np.newaxis], 6, axis=3)
    attributes = dict(spatial_scale=0.5, pooled_size=(5, 3), part_size=part)
    attributes |= dict(group_size=1, sample_per_part=2, sampling_ratio=2)
    attributes = op.attributes(6, trans_std=0.25, gamma=0.25, **attributes)
    rois = np.array([op.roi(24, 22, 56, 42.0)])  # 16 pixels wide, 10 high
    common = dict(dtype="float64", **attributes)
    still = runner.forward(inputs, rois, **common)
    moved = runner.forward(inputs, rois, displacement, **common)
    # The mean of two samples of a bin, which begin at its start or lie inside.
    middle = 0.25 if op.counts else 0.5
    for i, j, o in np.ndindex(5, 3, 6):
        row, column = 10.5 + 2 * (i + middle), 11.5 + 16 / 3 * (j + middle)
        kind = 2 * (o * classes // 6)
        cell = displacement[0, i * part[0] // 5, j * part[1] // 3]
        dy, dx = 0.25 * cell[kind : kind + 2] * [10, 16]
        expected = 100 * row + column + np.array([0, 100 * dy + dx])
        received = [still[0, i, j, o], moved[0, i, j, o]]
        assert_close(received, expected, 1e-12, case=(i, j, o))


@grid(
    {"op": pooling.OPS, "axis": [0, 1], "dtype": ["float64", "float32"]},
)
def test_far_corners_and_large_sizes_keep_their_order_of_operations(
    runner, axis, dtype
):
    """Tests roundings, which show where float32 coordinates are coarse."""
    op, rng = runner.op, np.random.default_rng(axis)
    num_rois, far = 12, 30000
    rois = np.tile(np.array(op.roi(0, 0, 1, 1.0)), (num_rois, 1))
    rois[:, 2 - axis] = rng.uniform(0.5 * far, far, num_rois)
    rois[:, 4 - axis] = rois[:, 2 - axis] + rng.uniform(0, 9000, num_rois)
    size, bins = ((far, 1), (5, 1)) if axis == 0 else ((1, far), (1, 5))
    operands = (
        rng.normal(size=(1, *size, 2)),
        np.float32(rois),
        np.float32(rng.normal(size=(num_rois, *bins, 2))),
        rng.normal(size=(num_rois, *bins, 2)),
    )
    attributes = op.attributes(
        2,
        spatial_scale=0.9,
        pooled_size=bins,
        group_size=1,
        sample_per_part=6,  # From 3 on, the product with a step is rounded.
        sampling_ratio=5,
    )
    pooling.check(runner, operands, attributes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("op", "more"), [(PSROI_POOL, dict(output_dim=5)), *RATIOS], ids=str
)
def test_padding_and_rois_that_are_not_finite_touch_nothing(
    runner, more, dtype
):
    """Tests padding also where maps, displacements and gradients are NaN."""
    attributes = dict(spatial_scale=1.0, pooled_size=2, **more)
    shapes = runner.op.shapes(attributes, 2, (6, 7), 12, channels=5)
    operands = [np.full(shape, np.nan) for shape in shapes]
    rois, displacement = operands[1:3]
    displacement[::2] = 0
    rois[:] = [0, 0, 0, 5, 5]
    rois[:4, 0] = [-1, -7, -np.inf, -(2.0**40)]
    for index in range(4, 12):
        rois[index, 1 + index % 4] = [np.nan, np.inf, -np.inf][index % 3]
    pooling.assert_zero(results(runner, operands, dtype=dtype, **attributes))


def huge_corners(real):
    """Returns ROIs with corners at each of five huge numbers."""
    return np.array(
        [
            [0, *corner]
            for v in [1e30, 1e18, 2.0**31, 2.0**63, float(np.finfo(real).max)]
            for corner in [
                *((2, 2, v, v), (2, 1, 5, v), (-v, -v, v, v), (-v, 1, 4, 4)),
                *((v, v, v, v), (-v, -v, -v, -v), (v, v, -v, -v)),
                (2, v, 4, -v),
            ]
        ],
        real,
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("displaced", ["not", "drawn", "by zero"])
@pytest.mark.parametrize("scale", [1.0, 0.25, 16.0])
@pytest.mark.parametrize(
    ("op", "more"),
    [
        (PSROI_POOL, dict(output_dim=4, group_size=1, sample_per_part=2)),
        *[(ROI_ALIGN, dict(sampling_ratio=ratio)) for ratio in (0, 2, 3)],
    ],
    ids=str,
)
def test_huge_corners_give_what_the_formula_gives(
    runner, more, scale, displaced, dtype
):
    """Tests that huge corners also take no time.

    If some overflow, nothing is read.
    """
    op, real = runner.op, np.dtype(dtype).type
    rois = huge_corners(real)
    rng = np.random.default_rng(0)
    bins = (2, 2) if op.counts else (2, 3)
    attributes = dict(spatial_scale=scale, pooled_size=bins, **more)
    inputs = rng.normal(size=(1, 6, 7, 4)).astype(real)
    output_grad = rng.normal(size=(len(rois), *bins, 4)).astype(real)
    displacement = None
    if displaced != "not":
        displacement = rng.normal(size=(len(rois), *bins, 2)).astype(real)
        displacement *= displaced == "drawn"
    exact = (inputs, rois, displacement, output_grad)
    expected = op.expected(exact, attributes)
    start = time.monotonic()
    received = results(runner, exact, dtype=dtype, **attributes)
    assert time.monotonic() - start < 5
    if displacement is not None:
        # Up to 1e29 pixels a unit: slopes are compared.
        with np.errstate(all="ignore"):
            reach = roi_reference.reach_of_displacements(
                op.make_bins(*exact[:3], **attributes), displacement.shape
            )
        for values in (received, expected):
            values["displacement"] = values["displacement"] / reach
    pooling.assert_results_close(received, expected, dtype)
    if op.counts and displaced == "by zero":
        assert expected["count"].max() > 0  # Some ROIs start on the map.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_types_are_summed_in_float32_and_rounded_once(runner, dtype):
    """Tests 4096 ROIs that add to a pixel, and bins of 256 samples."""
    op = runner.op
    rois, attributes = one_bin(op, 1)
    common = dict(dtype=dtype, **attributes)
    one, ones = np.ones((1, 1, 1, 1)), np.ones((4096, 1, 1, 1))
    for each in runner.every():
        operands = one, np.tile(rois, (4096, 1)), None, ones
        gradients = each.backward(*operands, **common)
        assert gradients["inputs"].item() == 4096, str(each.on)
        options = common | {op.samples: 16}
        number = 1.5 + 2.0**-7
        output = each.forward(number * one, rois, None, **options)
        assert output.item() == number, str(each.on)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_show_where_they_are_read(runner, dtype):
    op = runner.op
    inputs = np.zeros((2, 6, 6, 3))
    inputs[0, 2, 2, 1] = np.nan
    rois = [op.roi(1, 1, 4, 4), op.roi(4, 4, 6, 6), op.roi(1, 1, 4, 4.0, 1)]
    attributes = op.attributes(3, spatial_scale=1.0, pooled_size=1)
    output = runner.forward(inputs, np.array(rois), dtype=dtype, **attributes)
    assert np.argwhere(~np.isfinite(output)).tolist() == [[0, 0, 0, 1]]


@grid(
    {
        "batch, size, num_rois": [
            *((0, (4, 5), 0), (0, (4, 5), 3), (2, (0, 5), 3)),
            *((2, (4, 0), 3), (2, (0, 0), 3), (2, (4, 5), 0)),
        ],
        "dtype": DTYPES,
        "op, more": [
            (PSROI_POOL, dict(output_dim=3, group_size=2, part_size=(2, 1))),
            *RATIOS,
        ],
        "threads": [1, 2],
    }
)
def test_empty(runner, more, batch, size, num_rois, dtype, threads):
    """Tests inputs of no image and empty maps.

    No image takes padding only; an empty map gives zeros.
    """
    rois = np.zeros((num_rois, 5))
    rois[:, 0] = 1 if batch else -1
    rois[:, 3:] = 4
    attributes = dict(spatial_scale=1.0, pooled_size=(3, 2), **more)
    inputs, _, displacement, output = runner.op.shapes(
        attributes, batch, size, num_rois, channels=3
    )
    received = results(
        runner,
        (np.ones(inputs), rois, np.ones(displacement), np.ones(output)),
        dtype=dtype,
        threads=threads,
        **attributes,
    )
    assert received["output"].shape == output
    assert received.get("count", received["output"]).shape == output
    pooling.assert_zero(received)


BAD_INDICES = [2, 3, 1e30, np.inf, np.nan, 0.5, 2.5, -0.5, -7.25, 1 + 2.0**-23]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", BAD_INDICES)
@pytest.mark.parametrize("corner", [1.0, np.nan])
def test_batch_index_is_checked_and_never_followed(
    runner, bad, corner, dtype, threads
):
    """Tests that the error names the row, also if corners are not finite."""
    op = runner.op
    attributes = op.attributes(1, spatial_scale=1.0, pooled_size=2)
    shapes = op.shapes(attributes, 2, (4, 4), 9, channels=3)
    inputs, rois, displacement, output_grad = map(np.ones, shapes)
    rois[:] = [0, 0, 0, 2, 2]
    rois[5, 0], rois[5, 2] = bad, corner
    displacement[:] = 0
    common = dict(dtype=dtype, threads=threads, **attributes)
    with pytest.raises(core.CoreError) as error:
        runner.forward(inputs, rois, displacement, **common)
    text = str(error.value)
    assert re.match("Expected .*batch ind.*`rois`.*below 2.*", text)
    assert re.search(r"Received: rois\[5, 0\]=", text)
    try:
        gradients = runner.backward(
            inputs, rois, displacement, output_grad, **common
        )
    except core.CoreError as caught:
        assert "rois[5, 0]=" in str(caught)
    else:
        assert not gradients["displacement"][5].any()
    # Callers that cannot take an error get the results of padding.
    padding = rois.copy()
    padding[5, 0] = -1
    common["bad_rois_are_padding"] = True
    received, expected = (
        results(runner, (inputs, given, displacement, output_grad), **common)
        for given in (rois, padding)
    )
    assert_equal(received, expected)
    assert received["output"][4].any() and not received["output"][5].any()


def test_more_elements_than_32_bits_can_count(runner):
    """Tests the last pixels of an image of 2**31 + 4633 elements.

    The memory is allocated, but only pages that are read occupy memory.
    """
    size = 46341
    inputs = np.zeros((1, size, size, 1), np.float16)
    inputs[0, -1, -2:, 0] = [3, 5]
    # The ROI is one sample, at (size - 1, size - 1.75).
    _, attributes = one_bin(runner.op, 1)
    operands = (
        runner.on.lend(inputs),
        np.array([runner.op.roi(size - 2, size - 1, size - 1, size)], float),
        np.reshape([0, 0.25], (1, 1, 1, 2)) + runner.op.shift,
    )
    common = dict(dtype="float16", **attributes)
    assert runner.forward(*operands, **common).item() == 3.5
    gradients = runner.backward(
        *operands, np.ones((1, 1, 1, 1)), wanted=("displacement",), **common
    )
    assert_equal(gradients["displacement"].ravel(), [0, 2])
