# SPDX-License-Identifier: Apache-2.0
"""Tests the rules that deformable ROIAlign alone has, in the core.

Most tests of the op are shared by both pooling ops: `pooling_core_test.py`.
"""

import numpy as np
import pooling
import pytest
from compare import Tolerance, assert_close, assert_equal
from pairwise import grid
from tolerances import HALF_UNIT


@pytest.fixture
def runner():
    """Returns the object that runs the op: here on the CPU."""
    return pooling.Runner(pooling.ROI_ALIGN)


@grid(
    {
        "samples": [2, 3, 4, 5, 7, 8, 9, 11, 16, 17],
        "axis": [1, 0],
        "channels": [1, 19],
        "displaced": [False, True],
        "dtype": ["float32", "float64"],
    }
)
def test_samples_outside_count_in_the_mean(
    runner, samples, axis, channels, displaced, dtype
):
    """Tests maps of ones, so that the mean is the share of samples on the map.

    On 4 pixels, samples at -1.5, -0.5, ...: up to five are in [-1, 4].
    """
    size, roi = (1, 4), [0, -1.5, 0, samples - 1.5, 1]
    if axis == 0:
        size, roi = (4, 1), [0, 0, -1.5, 1, samples - 1.5]
    output = runner.forward(
        np.ones((1, *size, channels)),
        np.array([roi]),
        np.zeros((1, 1, 1, 2)) if displaced else None,
        dtype=dtype,
        pooled_size=1,
        spatial_scale=1.0,
        sampling_ratio=samples,
    )
    expected = np.full(channels, min(samples - 1, 5) / samples)
    assert_close(output.ravel(), expected, 1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "height, samples",
    [(0, 0), (-3, 0), (0.5, 1), (2, 1), (2.25, 2), (6, 3), (6.5, 4)]
    + [(13.5, 7), (14, 7), (16, 7), (1e9, 7), (1e30, 7)],
)
def test_adaptive_number_of_samples(runner, height, samples, dtype):
    """Tests 2 bins on 7 rows; one sample more would give another mean.

    The op takes ceil(height / 2) samples, at most ceil(2 * 7 / 2).
    """
    # All columns are equal, so that the samples of a row have no effect.
    rows = np.random.default_rng(0).normal(size=(1, 7, 1, 3)).astype(dtype)
    inputs = np.repeat(rows, 40, axis=2)
    rois = np.array([[0, 4, 1.25, 4 + 3, 1.25 + height]], dtype)
    attributes = dict(pooled_size=(2, 3), spatial_scale=1.0)

    def compute(ratio):
        common = dict(sampling_ratio=ratio, dtype=dtype, **attributes)
        return runner.forward(inputs, rois, **common)

    output = compute(0)
    assert_equal(compute(1 - 2**31), output)
    if samples == 0:
        assert not output.any()
        return
    attributes["sampling_ratio"] = samples
    expected = runner.op.reference(inputs, rois, **attributes)["output"]
    assert_close(output, expected, Tolerance(1e-5, at_least=1))
    attributes["sampling_ratio"] += 1
    other = runner.op.reference(inputs, rois, **attributes)["output"]
    if samples > 1 and np.abs(other).max() > 1e-3:
        assert np.abs(output - other).max() > 1e-5


@pytest.mark.parametrize("dtype", pooling.DTYPES)
def test_samples_outside_touch_nothing(runner, dtype):
    """Tests samples outside also where maps and gradients are NaN."""
    rois = np.array([[0, 20, 1, 25, 4], [1, 1, -30, 5, -20.0], [0, 0, 0, 3, 3]])
    offset = np.zeros((3, 2, 2, 2))
    offset[2] = [[[np.nan, 0], [0, np.nan]], [[np.inf, 0], [90, -np.inf]]]
    exact = (
        np.full((2, 6, 7, 5), np.nan),
        rois,
        offset,
        np.full((3, 2, 2, 5), np.nan),
    )
    common = dict(dtype=dtype, spatial_scale=1.0, pooled_size=2)
    pooling.assert_zero(pooling.results(runner, exact, **common))


@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_16_bit_maps_keep_float32_coordinates(runner, dtype):
    """Tests a displacement of 0.3 pixels, a thousand pixels from the origin."""
    x1 = np.float32(1000.3)
    inputs = np.zeros((1, 1, 1100, 1))
    inputs[0, 0, 1001] = 1.0
    rois = np.array([[0, x1, 0, x1 + 1, 1]], np.float32)
    options = dict(dtype=dtype, **runner.op.one_sample)
    fraction = np.float64(x1) - 1000
    # Corners that far away are 2**-14 apart.
    allowed = HALF_UNIT[dtype] * fraction + 2.0**-14
    for one in runner.every():
        output = one.forward(inputs, rois, **options).item()
        assert abs(output - fraction) <= allowed, str(one.on)
