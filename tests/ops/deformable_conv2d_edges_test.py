# SPDX-License-Identifier: Apache-2.0
"""Tests `deformable_conv2d` at edges, kinks, NaN, and for empty inputs."""

import dataclasses
import itertools

import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from deformable_conv2d_test import (
    DTYPES,
    case_id,
    check_against_reference,
    results,
)
from operands import (
    BOUNDARIES,
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
    operands, options = one_sample_per_image(coordinates, size, channels)
    output_grad = np.random.default_rng(1).normal(
        size=(len(coordinates), 1, 1, 3)
    )
    check_against_reference(
        operands,
        output_grad.astype(dtype),
        dtype,
        boundary=boundary,
        **options,
    )


@pytest.mark.parametrize(
    ("boundary", "y", "value"),
    [
        ("zeros", -1.0, 0.0),
        ("zeros", -0.25, 0.75 * 1.0),
        ("zeros", 0.0, 1.0),
        ("zeros", 2.0, 7.0),
        ("zeros", 2.25, 0.75 * 7.0),
        ("zeros", 3.0, 0.0),
        ("clamp", -0.25, 0.0),
        ("clamp", 0.0, 1.0),
        ("clamp", 0.25, 0.75 * 1.0 + 0.25 * 3.0),
        ("clamp", 2.0, 7.0),
        ("clamp", 2.75, 7.0),
        ("clamp", 3.0, 0.0),
    ],
)
def test_value_at_a_coordinate(boundary, y, value):
    """Reads a column of three pixels, 1, 3 and 7, at one place."""
    output = deformable_conv2d(
        np.reshape([1.0, 3.0, 7.0], (1, 3, 1, 1)),
        np.ones((1, 1, 1, 1)),
        np.reshape([y, 0.0], (1, 1, 1, 2)),
        strides=3,
        boundary=boundary,
    )
    assert output.numpy().item() == value


@pytest.mark.parametrize(
    ("boundary", "y", "slope"),
    [
        ("zeros", -1.5, 0.0),
        ("zeros", -1.0, 0.0),  # Outside, so no gradient.
        ("zeros", -0.5, 1.0),
        ("zeros", 0.0, 2.0),  # The cell [0, 1], not [-1, 0].
        ("zeros", 1.0, 4.0),
        ("zeros", 2.0, -7.0),  # The cell [2, 3]: down to zero.
        ("zeros", 3.0, 0.0),
        ("clamp", -0.5, 0.0),
        ("clamp", 0.0, 2.0),
        ("clamp", 1.0, 4.0),
        ("clamp", 1.5, 4.0),
        ("clamp", 2.0, 0.0),  # The edge's value holds from here on.
        ("clamp", 2.5, 0.0),
        ("clamp", 3.0, 0.0),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
def test_derivative_is_the_right_hand_one(boundary, y, slope, axis):
    """Reads a line of three pixels, 1, 3 and 7, along either axis."""
    shape = (1, 3, 1, 1) if axis == 0 else (1, 1, 3, 1)
    displacement = [y, 0.0] if axis == 0 else [0.0, y]
    operands = [
        np.reshape([1.0, 3.0, 7.0], shape),
        np.ones((1, 1, 1, 1)),
        np.reshape(displacement, (1, 1, 1, 2)),
    ]
    _, gradients = results(
        operands, np.ones((1, 1, 1, 1)), strides=3, boundary=boundary
    )
    assert gradients[2].numpy().reshape(2)[axis] == slope


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
    size, channels = (4, 4), 19
    coordinates = np.array([[outside, 1.5], [1.5, outside], [outside] * 2])
    coordinates = coordinates.astype(
        np.float64 if dtype == "float64" else np.float32
    )
    operands, options = one_sample_per_image(coordinates, size, channels)
    operands[0][:] = np.nan
    operands[3][:] = np.nan
    operands = [tf.cast(x, dtype) for x in operands[:2]] + operands[2:]
    output, gradients = results(
        operands,
        np.ones((3, 1, 1, 3), tf.as_dtype(dtype).as_numpy_dtype),
        boundary=boundary,
        **options,
    )
    for tensor in [output, *gradients]:
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


def test_mask_may_be_any_real_number():
    """Tests that the op does not squash: the output is linear in the mask."""
    inputs, kernel, offset, mask = Conv2DCase().operands("float64")
    output = deformable_conv2d(inputs, kernel, offset, mask, padding="same")
    scaled = deformable_conv2d(
        inputs, kernel, offset, -100.0 * mask, padding="same"
    )
    assert_close(scaled, -100.0 * output.numpy(), 1e-12)


def test_no_mask_is_a_mask_of_ones():
    inputs, kernel, offset, mask = Conv2DCase().operands("float64")
    assert_equal(
        deformable_conv2d(inputs, kernel, offset, padding="same"),
        deformable_conv2d(
            inputs, kernel, offset, np.ones_like(mask), padding="same"
        ),
    )


# Empty tensors.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        Conv2DCase(batch=0),
        Conv2DCase(batch=0, padding="valid"),
        Conv2DCase(batch=0, padding=((1, 0), (2, 3)), strides=2),
        Conv2DCase(size=(0, 5)),
        Conv2DCase(size=(7, 0), strides=(2, 3)),
        Conv2DCase(size=(0, 0), dilation_rate=3),
        Conv2DCase(batch=0, size=(0, 5)),
    ],
    ids=case_id,
)
@pytest.mark.parametrize("has_mask", [True, False])
def test_empty(case, has_mask, dtype):
    """Tests the shape of the empty output, and gradients of zero."""
    case = dataclasses.replace(case, has_mask=has_mask)
    operands = case.operands(dtype)
    output, gradients = results(
        operands, case.output_grad(dtype), **case.options
    )
    assert tuple(output.shape) == case.output_shape
    assert 0 in output.shape
    for operand, gradient in zip(operands, gradients, strict=True):
        assert gradient.dtype == operand.dtype
        assert tuple(gradient.shape) == operand.shape
        assert_equal(np.asarray(gradient, np.float64), np.zeros(operand.shape))
