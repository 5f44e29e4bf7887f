# SPDX-License-Identifier: Apache-2.0
"""Tests the rules that deformable PS-ROI pooling alone has, in the core.

Most tests of the op are shared by both pooling ops: `pooling_core_test.py`.
"""

import core
import numpy as np
import pooling
import pytest
from compare import assert_close, assert_equal
from tolerances import HALF_UNIT


@pytest.fixture
def runner():
    """Returns the object that runs the op: here on the CPU."""
    return pooling.Runner(pooling.PSROI_POOL)


def halves_and_near(real):
    """Returns corners, and the integers to which the op rounds them."""
    below = np.nextafter(real(0.5), real(0))
    cases = [(0.5, 1), (1.5, 2), (2.5, 3), (3.5, 4), (-0.5, -1), (-1.5, -2)]
    cases += [(below, 0), (-below, 0), (2.49, 2), (2.51, 3), (-2.5, -3)]
    cases += [(np.nextafter(real(3.5), real(0)), 3), (-0.0, 0), (6, 6)]
    return np.array(cases, real).T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("corner", ["first", "last"])
def test_corners_round_half_away_from_zero(runner, corner, dtype):
    """Tests ROIs of one sample on a ramp, whose pixel p has the value p - 4."""
    x, expected = halves_and_near(np.dtype(dtype).type)
    rois = np.zeros((len(x), 5), dtype)
    # A displacement of 4.5 pixels on a ROI of size 1 moves x - 0.5 to x + 4.
    rois[:, 1] = rois[:, 3] = x
    displacement = 4.5
    if corner == "last":
        # From -6.5, twice the size leads to x + 1 + 6.
        rois[:, 1], displacement, expected = -6, 2, 2 * expected + 3.5
    output = runner.forward(
        np.arange(-4.0, 20).reshape(1, 1, -1, 1),
        rois,
        np.full((len(rois), 1, 1, 2), [0.5, displacement]),
        dtype=dtype,
        output_dim=1,
        **runner.op.one_sample,
    )
    assert_equal(output.ravel(), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_class_that_samples_nothing_touches_nothing(runner, dtype):
    """Pushes a class off the map.

    The other class is pooled as if it were alone.
    """
    rng = np.random.default_rng(0)
    trans = np.zeros((1, 1, 1, 4))
    trans[..., 2:] = 100
    inputs = rng.normal(size=(1, 5, 6, 6))
    inputs[..., 3:] = np.nan
    output_grad = np.ones((1, 1, 1, 6))
    output_grad[..., 3:] = np.inf
    received = pooling.results(
        runner,
        (inputs, np.array([[0.0, 1, 1, 3, 3]]), trans, output_grad),
        dtype=dtype,
        output_dim=6,
        spatial_scale=1.0,
        pooled_size=1,
        part_size=1,
    )
    output, count = received["output"], received["count"]
    assert (output[..., 3:] == 0).all() and (count[..., 3:] == 0).all()
    assert (output[..., :3] != 0).all() and (count[..., :3] == 16).all()
    assert (received["inputs"][..., 3:] == 0).all()
    assert (received["displacement"][..., 2:] == 0).all()
    assert_close(received["inputs"].sum(), 3, 1e-6)


def test_channels_are_group_and_class_major():
    """Tests outputs that name the channel.

    Each channel holds its own number.
    """
    output_dim, pooled, group = 6, (5, 4), (3, 2)
    channels = output_dim * group[0] * group[1]
    inputs = np.broadcast_to(np.arange(float(channels)), (1, 4, 4, channels))
    output = core.run_forward(
        core.PSROI_POOL,
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


@pytest.mark.parametrize("dtype", HALF_UNIT)
def test_16_bit_maps_keep_float32_coordinates(runner, dtype):
    """Tests a displacement of 0.3 pixels, a thousand pixels from the origin."""
    inputs = np.zeros((1, 1, 1100, 1))
    inputs[0, 0, 1001] = 1.0
    moved = np.reshape([0.5, 1000.8], (1, 1, 1, 2))
    options = dict(dtype=dtype, output_dim=1, **runner.op.one_sample)
    fraction = np.float32(1000.8) - np.float32(0.5) - 1000
    for one in runner.every():
        output = one.forward(inputs, np.zeros((1, 5)), moved, **options).item()
        error = abs(output - fraction)
        assert error <= HALF_UNIT[dtype] * fraction, str(one.on)


def test_batch_index_minus_zero_is_the_first_image(runner):
    inputs = np.ones((2, 3, 3, 1)) * np.reshape([5, 6], (2, 1, 1, 1))
    rois = np.array([[-0.0, 0, 0, 2, 2], [1, 0, 0, 2, 2]])
    output = runner.forward(
        inputs, rois, output_dim=1, spatial_scale=1.0, pooled_size=1
    )
    assert_equal(output.ravel(), [5, 6])
