# SPDX-License-Identifier: Apache-2.0
"""Tests values, gradients and common features of both pooling ops.

The promises of every op are tested in `every_op_test.py`. Each op's own file
compares it with other implementations and tests its corners.
"""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from every_op import POOLING, typed
from operands import DTYPES
from pooling import OPS

both_ops = pytest.mark.parametrize("op", OPS, ids=str)


@pytest.mark.parametrize("still", ["zeros", "no factor"])
@both_ops
def test_no_displacement_is_a_displacement_of_zero(op, still):
    call = POOLING[op]
    operands, _ = call.draw("float64")
    expected = call.function(
        operands["inputs"], operands["rois"], **call.options
    )
    options = dict(call.options)
    if still == "zeros":
        operands[op.displacement] = np.zeros_like(operands[op.displacement])
    else:
        options["trans_std" if op.counts else "gamma"] = 0
    actual = call.function(**operands, **options)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("displaced", [True, False])
@both_ops
def test_no_rois(op, displaced, dtype):
    call = POOLING[op]
    operands, output_grad = call.draw(dtype, larger=0)
    if not displaced:
        operands[op.displacement] = None
    outputs, gradients = call.results(operands, output_grad)
    for output in outputs:
        assert output.shape == (0, 3, 4, 6)
    assert_equal(gradients["inputs"], np.zeros(operands["inputs"].shape))
    if displaced:
        shape = operands[op.displacement].shape
        assert gradients[op.displacement].shape == shape


@pytest.mark.parametrize(
    "batch, height, width", [(0, 8, 9), (2, 0, 9), (2, 8, 0)]
)
@both_ops
def test_no_images_and_empty_maps(op, batch, height, width):
    call = POOLING[op]
    operands, output_grad = call.draw()
    channels = operands["inputs"].shape[3]
    shape = (batch, height, width, channels)
    operands["inputs"] = np.ones(shape, np.float32)
    rois = np.where(np.isfinite(operands["rois"]), operands["rois"], 1)
    rois[:, 0] = 1 if batch else -1
    operands["rois"] = rois
    outputs, gradients = call.results(operands, output_grad)
    assert gradients["inputs"].shape == shape
    for tensor in tf.nest.flatten([outputs, gradients]):
        assert not tensor.numpy().any()


@pytest.mark.parametrize("integers", [np.int32, np.int64, np.uint8, list])
@both_ops
def test_rois_may_be_integers(op, integers):
    call = POOLING[op]
    inputs = call.draw()[0]["inputs"]
    rois = [[0, 4, 5, 20, 30], [1, 0, 3, 9, 9]]
    expected = call.function(inputs, np.float32(rois), **call.options)
    given = rois if integers is list else integers(rois)
    assert_equal(call.function(inputs, given, **call.options), expected)


@pytest.mark.parametrize("scale, factor", [(0.1, 0.3), (0.7, 1e-9)])
@both_ops
def test_options_are_not_rounded_for_float64(op, scale, factor):
    """Tests the scale 0.1, which float32 cannot hold exactly."""
    options = op.attributes(
        1,
        spatial_scale=scale,
        pooled_size=1,
        trans_std=factor,
        gamma=factor,
        **{op.samples: 1},
    )
    output = POOLING[op].function(
        np.arange(200.0).reshape(1, 1, 200, 1),
        np.array([[0, 150, 0, 153, 1.0]]),
        np.array([[[[0.0, 1.0]]]]),
        **options,
    )
    # The sample is in the middle of the ROI, or at its start.
    size = (3 + op.inclusive) * scale
    start = 150 * scale - 0.5 + (0 if op.counts else size / 2)
    expected = start + factor * size
    assert_close(output, np.full((1, 1, 1, 1), expected), 1e-12)


# Graphs.


# Shapes of ROIs and displacements: the known dimensions determine others.
@pytest.mark.parametrize(
    ("inputs", "rois", "displacement", "num_rois"),
    [
        ("all", (7, 5), "all", 7),
        ("all", (None, 5), "all", 7),
        ("all", (7, 5), (None, None, None, None), 7),
        ("all", (7, None), None, 7),
        ("channels", (None, 5), "all but ROIs", None),
        ("all but channels", (7, 5), None, 7),
        ((None, None, None, None), None, (4, None, None, None), 4),
        (None, None, None, None),
        (None, (3, 5), "absent", 3),
        ("all", None, "absent", None),
        ("none of them", (0, 5), "absent", 0),
    ],
)
@both_ops
def test_static_output_shape(op, inputs, rois, displacement, num_rois):
    call = POOLING[op]
    operands, _ = call.draw()
    whole = operands["inputs"].shape
    moves = operands[op.displacement].shape
    shapes = {
        "all": whole,
        "channels": (None, None, None, whole[3]),
        "all but channels": (*whole[:3], None),
        "none of them": (0, 0, 0, whole[3]),
    }
    inputs = shapes.get(inputs, inputs)
    specs = [inputs, rois]
    if displacement != "absent":
        shapes = {"all": moves, "all but ROIs": (None, *moves[1:])}
        specs.append(shapes.get(displacement, displacement))
    # ROIAlign's output has the channels of the inputs.
    channels = 6 if op.counts or (inputs or [None])[-1] else None
    with tf.Graph().as_default():
        operands = [tf.compat.v1.placeholder(tf.float32, s) for s in specs]
        outputs = call.function(*operands, **call.options, **call.every_output)
    for tensor in tf.nest.flatten(outputs):
        assert tensor.shape.as_list() == [num_rois, 3, 4, channels]


# Values that are not finite.


@pytest.mark.parametrize("dtype", DTYPES)
@both_ops
def test_what_is_not_read_may_be_anything(op, dtype):
    """Tests padding, NaN and infinite operands, and ROIs outside."""
    call = POOLING[op]
    corners = [np.nan, np.inf, -np.inf, 1e30, -1e30]
    rois = [[-1, 0, 0, 4, 4], [-np.inf, 0, 0, 4, 4], [0, 90, 90, 99, 99]]
    for place, corner in itertools.product(range(1, 5), corners[:3]):
        rois.append([0, 0, 0, 4, 4])
        rois[-1][place] = corner
    rois += [[0, c, c, c, c] for c in corners]
    bad = len(rois)
    rois += [[0, 0, 0, 4, 4]] * 3
    inputs, _, displacement, output = op.shapes(
        call.options, 1, (8, 9), len(rois), channels=6, classes=3
    )
    moves = np.zeros(displacement)
    moves[bad:] = np.reshape([np.nan, np.inf, -np.inf], (3, 1, 1, 1))
    given = {
        "inputs": np.full(inputs, np.nan),
        "rois": rois,
        op.displacement: moves,
    }
    outputs, gradients = call.results(
        *typed((given, np.full(output, np.nan), call.options), dtype)
    )
    for tensor in tf.nest.flatten([outputs, gradients]):
        assert (np.asarray(tensor).astype(float) == 0).all()
