# SPDX-License-Identifier: Apache-2.0
"""Tests values, gradients and common features of both pooling ops.

The promises of every op are tested in `every_op_test.py`. Each op's own file
compares it with other implementations and tests its corners.
"""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal, assert_finite_differences
from full_calls import POOLING
from operands import coordinate_type, forward_and_gradients, numpy_type
from pooling import OPS, PSROI_POOL, ROI_ALIGN, assert_results_close
from tolerances import POOLING as TOLERANCES

DTYPES = ["float16", "bfloat16", "float32", "float64"]

both_ops = pytest.mark.parametrize("op", OPS, ids=str)
both_calls = pytest.mark.parametrize("call", POOLING.values(), ids=str)


def cast(op, operands, dtype):
    """Returns operands by name and the gradient, in the types of a call."""
    xy = numpy_type(coordinate_type(dtype))
    value = numpy_type(dtype)
    types = (value, xy, xy, value)
    *given, output_grad = (
        None if operand is None else np.asarray(operand).astype(type_)
        for operand, type_ in zip(operands, types, strict=True)
    )
    names = ("inputs", "rois", op.displacement)
    return dict(zip(names, given, strict=True)), output_grad


# Tests of the reference itself, on which other tests rely.


@pytest.mark.parametrize(
    ("op", "classes", "more"),
    [
        *[
            (PSROI_POOL, classes, dict(group_size=group_size))
            for group_size in (None, 1, (2, 1))
            for classes in (1, 3)
        ],
        *[(ROI_ALIGN, n, dict(sampling_ratio=n)) for n in (0, 1, 3)],
    ],
    ids=str,
)
def test_reference_gradients_equal_finite_differences(op, classes, more):
    rng = np.random.default_rng(classes)
    attributes = op.attributes(
        2 * classes,
        spatial_scale=0.5,
        pooled_size=(2, 3),
        part_size=(3, 2),
        sample_per_part=2,
        trans_std=0.2,
        gamma=0.2,
        **more,
    )
    kinds = ("inside", "across the edge", "padding")
    if op.counts:
        kinds += ("reversed",)
    *operands, output_grad = op.draw_differentiable(
        rng,
        attributes,
        size=(5, 6),
        num_rois=4,
        kinds=kinds,
        channels=3,
        classes=classes,
    )
    gradients = op.reference_gradients(*operands, output_grad, **attributes)

    def loss() -> float:
        output = op.reference(*operands, **attributes)["output"]
        return np.sum(output * output_grad)

    for operand, name in ((0, "inputs"), (2, "displacement")):
        assert_finite_differences(
            rng,
            loss,
            operands[operand],
            gradients[name],
            name=name,
            how_many=10,
        )


# Outputs and gradients against the float64 reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(300, 325))
@both_ops
def test_random_configurations(op, seed, dtype):
    operands, attributes = op.draw_call(seed)
    given, output_grad = cast(op, operands, dtype)
    options = {**attributes, **({"return_count": True} if op.counts else {})}
    outputs, gradients = forward_and_gradients(
        POOLING[op].function, given, output_grad, **options
    )
    outputs = outputs if op.counts else [outputs]
    assert gradients.pop("rois") is None
    received = dict(zip(("output", "count"), outputs, strict=False))
    assert received["output"].dtype == gradients["inputs"].dtype == dtype
    assert not op.counts or received["count"].dtype == "float32"
    received["inputs"] = gradients["inputs"]
    if op.displacement in gradients:
        received["displacement"] = gradients[op.displacement]
        assert received["displacement"].dtype == coordinate_type(dtype)
    exact = list(given.values())
    expected = {
        **op.reference(*exact, **attributes),
        **op.reference_gradients(*exact, output_grad, **attributes),
    }
    assert_results_close(received, expected, dtype, attributes)


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
    for output in outputs if op.counts else [outputs]:
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
@both_calls
def test_rois_may_be_integers(call, integers):
    inputs = call.draw()[0]["inputs"]
    rois = [[0, 4, 5, 20, 30], [1, 0, 3, 9, 9]]
    expected = call.function(inputs, np.float32(rois), **call.options)
    given = rois if integers is list else integers(rois)
    assert_equal(call.function(inputs, given, **call.options), expected)


# Graphs.


@both_ops
def test_one_trace_serves_every_number_of_rois(op):
    call = POOLING[op]

    @tf.function(
        input_signature=[
            tf.TensorSpec([None] * 4),
            tf.TensorSpec([None, 5]),
            tf.TensorSpec([None] * 4),
        ]
    )
    def graph(*operands):
        return call.function(*operands, **call.options)

    every = list(call.draw(larger=3)[0].values())
    for num_rois in (7, 0, 1, 20):
        operands = [every[0], *(x[:num_rois] for x in every[1:])]
        assert_close(
            graph(*operands),
            op.reference(*operands, **call.options)["output"],
            TOLERANCES["float32"],
            case=f"{num_rois} ROIs",
        )


# Shapes of ROIs and displacements: the known dimensions determine others.
@pytest.mark.parametrize(
    ("inputs", "rois", "displacement", "num_rois"),
    [
        ("all", (7, 5), "all", 7),
        ("all", (None, 5), "all", 7),
        ("all", (7, 5), (None, None, None, None), 7),
        ("all", (7, None), None, 7),
        ("channels", (None, 5), "all but ROIs", None),
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
        "none of them": (0, 0, 0, whole[3]),
    }
    inputs = shapes.get(inputs, inputs)
    specs = [tf.TensorSpec(inputs), tf.TensorSpec(rois)]
    if displacement != "absent":
        shapes = {"all": moves, "all but ROIs": (None, *moves[1:])}
        specs.append(tf.TensorSpec(shapes.get(displacement, displacement)))
    options = {**call.options, **({"return_count": True} if op.counts else {})}

    @tf.function(input_signature=specs)
    def graph(*operands):
        return call.function(*operands, **options)

    # ROIAlign's output has the channels of the inputs.
    channels = 6 if op.counts or (inputs or [None])[-1] else None
    outputs = graph.get_concrete_function().structured_outputs
    for tensor in tf.nest.flatten(outputs):
        assert tuple(tensor.shape) == (num_rois, 3, 4, channels)


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
    operands = (np.full(inputs, np.nan), rois, moves, np.full(output, np.nan))
    outputs, gradients = call.results(*cast(op, operands, dtype))
    for tensor in tf.nest.flatten([outputs, gradients]):
        assert (np.asarray(tensor).astype(float) == 0).all()
