# SPDX-License-Identifier: Apache-2.0
"""Tests `deformable_conv2d` at edges, kinks, NaN, and for empty inputs."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from compare import assert_equal
from every_op import CONV2D, broken_fields, conv2d_call, typed
from operands import (
    BOUNDARIES,
    DTYPES,
    FACTORS,
    Conv2DCase,
    conv2d_places,
    one_sample_per_image,
)

from tf_deform.ops import deformable_conv2d


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels", [1, 5, 32])
@pytest.mark.parametrize("size", [(4, 3), (1, 1), (2, 5)])
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_every_place_of_a_sample(boundary, size, channels, dtype):
    """Tests pairs of edges, integers, NaN, infinities, huge coordinates."""
    coordinates = np.array(
        list(itertools.product(*(conv2d_places(n, dtype) for n in size)))
    )
    call = one_sample_per_image(coordinates, size, channels, boundary)
    CONV2D.check(call, dtype)


@pytest.mark.parametrize(
    ("boundary", "y", "value", "slope"),
    [
        ("zeros", -1.5, 0.0, 0.0),
        ("zeros", -1.0, 0.0, 0.0),  # Outside, so no gradient.
        ("zeros", -0.5, 0.5 * 1.0, 1.0),
        ("zeros", -0.25, 0.75 * 1.0, 1.0),
        ("zeros", 0.0, 1.0, 2.0),  # The cell [0, 1], not [-1, 0].
        ("zeros", 1.0, 3.0, 4.0),
        ("zeros", 2.0, 7.0, -7.0),  # The cell [2, 3]: down to zero.
        ("zeros", 2.25, 0.75 * 7.0, -7.0),
        ("zeros", 3.0, 0.0, 0.0),
        ("clamp", -0.5, 0.0, 0.0),
        ("clamp", -0.25, 0.0, 0.0),
        ("clamp", 0.0, 1.0, 2.0),
        ("clamp", 0.25, 0.75 * 1.0 + 0.25 * 3.0, 2.0),
        ("clamp", 1.0, 3.0, 4.0),
        ("clamp", 1.5, 5.0, 4.0),
        ("clamp", 2.0, 7.0, 0.0),  # The edge's value holds from here on.
        ("clamp", 2.5, 7.0, 0.0),
        ("clamp", 2.75, 7.0, 0.0),
        ("clamp", 3.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_value_and_right_hand_derivative(boundary, y, value, slope, axis):
    """Reads a line of three pixels, 1, 3 and 7, along either axis."""
    line, place = [(1, 3, 1, 1), (1, 1, 3, 1)][axis], [0.0, 0.0]
    place[axis] = y
    (output,), gradients = CONV2D.results(
        {
            "inputs": np.reshape([1.0, 3.0, 7.0], line),
            "kernel": np.ones((1, 1, 1, 1)),
            "offset": np.reshape(place, (1, 1, 1, 2)),
        },
        options=dict(strides=3, boundary=boundary),
    )
    assert output.numpy().item() == value
    assert gradients["offset"].numpy().reshape(2)[axis] == slope


OUTSIDE = [
    *[("zeros", y) for y in (-1.0, 4.0, -7.5, 1e30)],
    *[("clamp", y) for y in (-0.25, 4.0, 1e30)],
    *[(b, y) for b in BOUNDARIES for y in (np.nan, np.inf, -np.inf)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("boundary", "outside"), OUTSIDE)
def test_a_sample_outside_gives_zero_whatever_else_is_nan(
    boundary, outside, dtype
):
    """Tests NaN in image and mask, which a sample outside does not read."""
    coordinates = np.array([[outside, 1.5], [1.5, outside], [outside] * 2])
    given, _, options = one_sample_per_image(coordinates, (4, 4), 19, boundary)
    given["inputs"][:] = given["mask"][:] = np.nan
    for tensor in tf.nest.flatten(
        CONV2D.results(*typed((given, np.ones((3, 1, 1, 3)), options), dtype))
    ):
        assert not np.asarray(tensor, np.float64).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["inputs", "mask"])
def test_inside_ordinary_arithmetic_holds(operand, bad):
    """Tests that a value that is not finite shows exactly where it is read."""
    case = Conv2DCase(batch=1, size=(6, 5), kernel_size=(1, 1), channels=3)
    inputs, kernel, offset, mask = case.operands("float64")
    offset = np.full_like(offset, 0.5)
    if operand == "inputs":
        inputs[0, 3, 2, 1] = bad
        readers = [(2, 1), (2, 2), (3, 1), (3, 2)]
    else:
        mask[0, 3, 2, 0] = bad
        readers = [(3, 2)]
    output = deformable_conv2d(inputs, kernel, offset, mask)
    not_finite = ~np.isfinite(output.numpy()).all(axis=-1)
    assert [tuple(index) for index in np.argwhere(not_finite[0])] == readers


def test_zero_mask_times_infinity_is_nan():
    inputs = np.full((1, 1, 1, 1), np.inf, np.float32)
    one, zero = np.ones((1, 1, 1, 1)), np.zeros((1, 1, 1, 1))
    output = deformable_conv2d(
        inputs, one.astype(np.float32), np.zeros((1, 1, 1, 2)), zero
    )
    assert np.isnan(output.numpy().item())


# What a branch predicts.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("modulation", ["none", *FACTORS])
def test_a_nan_displacement_of_a_branch_shows(modulation, boundary, dtype):
    """Tests NaN in all filters of its pixel alone, and no gradient of it."""
    call = broken_fields(modulation, boundary, dtype, factors=False)
    (output,), gradients = CONV2D.results(*call)
    nan = np.isnan(np.float32(output))
    assert nan.sum() == 8 * nan.shape[-1] and nan.any(-1).sum() == 8
    for gradient in gradients.values():
        assert np.isfinite(np.float32(gradient)).all()
    CONV2D.check(call, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("modulation", FACTORS)
def test_a_factor_that_is_nan_or_infinite(modulation, boundary, dtype):
    """Tests NaN in all filters of its pixel alone, and as any factor's.

    Infinity is a limit: the factor is 0 or the largest one.
    """
    call = broken_fields(modulation, boundary, dtype, factors=True)
    nan = np.isnan(np.float32(CONV2D.results(*call)[0][0]))
    assert nan.sum() == 4 * nan.shape[-1] and nan.any(-1).sum() == 4
    if boundary == "zeros":  # A held edge has no slope, whatever the factor.
        CONV2D.check(call, dtype)


# Empty tensors.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "settings",
    [
        dict(batch=0),
        dict(batch=0, padding="valid"),
        dict(batch=0, padding=((1, 0), (2, 3)), strides=2),
        dict(size=(0, 5)),
        dict(size=(7, 0), strides=(2, 3)),
        dict(size=(0, 0), dilation_rate=3),
        dict(batch=0, size=(0, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_mask", [True, False])
def test_empty(settings, has_mask, dtype):
    """Tests the shape of the empty output, and gradients of zero."""
    case = Conv2DCase(has_mask=has_mask, **settings)
    call = given, *_ = conv2d_call(case, dtype)
    (output,), gradients = CONV2D.results(*call)
    assert tuple(output.shape) == case.output_shape
    assert 0 in output.shape
    for name, operand in given.items():
        assert_equal(
            gradients[name], np.zeros_like(operand), dtype=operand.dtype
        )
