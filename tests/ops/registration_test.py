# SPDX-License-Identifier: Apache-2.0
"""Tests that TensorFlow knows the limits of attributes, and the ops' cost."""

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context, execute

from tf_deform import ops

CONVOLUTION = {
    "strides": [1, 1],
    "padding": "VALID",
    "explicit_paddings": [],
    "dilations": [1, 1],
    "offset_groups": 1,
    "boundary": "zeros",
}
POOLING = {
    "output_dim": 2,
    "spatial_scale": [1.0],
    "pooled_size": [2, 2],
    "group_size": [1, 1],
    "part_size": [2, 2],
    "sample_per_part": 2,
    "trans_std": [0.1],
}
ALIGN = {
    "pooled_size": [2, 2],
    "spatial_scale": [1.0],
    "sampling_ratio": 2,
    "gamma": [0.1],
}
# Op, shapes of its operands, the optional operand, the result, attributes.
OPS = {
    "DeformableConv2D": (
        [(1, 4, 3, 2), (1, 1, 2, 3), (1, 4, 3, 2)],
        ("mask", (1, 4, 3, 1)),
        [(1, 4, 3, 3)],
        CONVOLUTION,
    ),
    "DeformablePSROIPool": (
        [(1, 4, 3, 2), (3, 5)],
        ("trans", (3, 2, 2, 2)),
        [(3, 2, 2, 2), (3, 2, 2, 2)],
        POOLING,
    ),
    "DeformableROIAlign": (
        [(1, 4, 3, 2), (3, 5)],
        ("offset", (3, 2, 2, 2)),
        [(3, 2, 2, 2)],
        ALIGN,
    ),
}


def run(name, number, is_gradient):
    """Runs the op alone, as a graph from elsewhere may contain it."""
    shapes, (optional, shape), results, attributes = OPS[name]
    inputs = [tf.zeros(shape) for shape in [*shapes, *[shape] * number]]
    attributes = {
        "T": tf.float32.as_datatype_enum,
        "Tcoord": tf.float32.as_datatype_enum,
        f"num_{optional}": number,
        **attributes,
    }
    outputs = len(results)
    if is_gradient:
        inputs.append(tf.zeros(results[0]))
        outputs = number + (3 if name == "DeformableConv2D" else 1)
        attributes["wanted"] = [True] * outputs
    kind = f"TfDeform>{name}{'Grad' if is_gradient else ''}"
    if tf.executing_eagerly():
        flat = [part for pair in attributes.items() for part in pair]
        return execute.execute(
            kind.encode(), outputs, inputs, tuple(flat), context.context()
        )
    node = tf.compat.v1.NodeDef(name="op", op=kind)
    feeds = {}
    for number, tensor in enumerate(inputs):
        feeds[f"in{number}:0"] = tensor
        node.input.append(f"in{number}:0")
    for key, value in attributes.items():
        attribute = node.attr[key]
        kind = type(value[0] if isinstance(value, list) and value else value)
        target = attribute.list if isinstance(value, list) else attribute
        field = {bool: "b", int: "i", float: "f", str: "s", list: "i"}[kind]
        if key in ("T", "Tcoord"):
            field = "type"
        if isinstance(value, list):
            target.SetInParent()
            getattr(target, field).extend(value)
        else:
            value = value.encode() if isinstance(value, str) else value
            setattr(target, field, value)
    graph = tf.compat.v1.GraphDef(node=[node])
    graph.versions.producer = 2000
    return tf.import_graph_def(graph, input_map=feeds, return_elements=["op:0"])


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("is_gradient", [False, True], ids=["op", "gradient"])
@pytest.mark.parametrize("name", OPS)
def test_optional_operands_are_at_most_one(name, is_gradient, in_graph):
    """Tests that this holds also in a graph that somebody has edited."""

    def call(number):
        if in_graph:
            return tf.function(lambda: run(name, number, is_gradient))()
        return run(name, number, is_gradient)

    for number in (0, 1):
        assert call(number)
    for number in (2, 3, 17):
        with pytest.raises(
            (ValueError, tf.errors.InvalidArgumentError)
        ) as info:
            call(number)
        assert "to hold at most one tensor" in str(info.value)
        assert f"Received: {number}" in str(info.value)


@pytest.mark.parametrize("implementation", ["native", "portable"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("function", "name", "least"),
    [
        (ops.deformable_psroi_pool, "spatial_scale", 2.0**-126),
        (ops.deformable_psroi_pool, "trans_std", 0.0),
        (ops.deformable_roi_align, "spatial_scale", 2.0**-126),
        (ops.deformable_roi_align, "gamma", 0.0),
    ],
)
def test_factors_are_normal_numbers(
    function, name, least, dtype, implementation
):
    """Tests subnormal factors.

    Some threads and instructions treat such numbers as 0.
    """
    inputs = tf.ones((1, 4, 3, 2), dtype)
    rois = tf.constant([[0.0, 0, 0, 2, 3]])
    options = dict(
        pooled_size=2, spatial_scale=1.0, implementation=implementation
    )
    if function is ops.deformable_psroi_pool:
        options.update(output_dim=2, group_size=1)
    displacement = tf.zeros((1, 2, 2, 2))
    for value in (least, 2.0**-126, 1e-30, 3.0):
        function(inputs, rois, displacement, **{**options, name: value})
    for value in (1e-39, 2.0**-127, 1e-45, -1e-39, -1.0, np.nan):
        with pytest.raises(tf.errors.InvalidArgumentError) as info:
            function(inputs, rois, displacement, **{**options, name: value})
        assert f"Expected `{name}` to be a finite number of at least" in str(
            info.value
        )


def flops(function, *shapes):
    graph = tf.function(function).get_concrete_function(
        *(tf.TensorSpec(shape) for shape in shapes)
    )
    options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
    options["output"] = "none"
    counted = tf.compat.v1.profiler.profile(graph.graph, options=options)
    return {
        child.name: child.total_float_ops
        for child in counted.children
        if "Deformable" in child.name
    }, counted.total_float_ops


def test_flops_of_a_convolution():
    shapes = [(2, 8, 9, 12), (3, 3, 6, 10), (2, 6, 7, 36), (2, 6, 7, 18)]

    def call(*operands):
        return ops.deformable_conv2d(*operands, offset_groups=2)

    taps = 2 * 6 * 7 * 9
    product, sampling = 2 * taps * 6 * 10, 8 * taps * 12
    by_name, total = flops(call, *shapes)
    assert total == sum(by_name.values()) == product + sampling
    # The numbers of products are those of the plain convolution.
    _, plain = flops(lambda x, k: tf.nn.conv2d(x, k, 1, "VALID"), *shapes[:2])
    assert plain == product

    def gradient(*operands):
        return tf.gradients(call(*operands), operands)

    by_name, _ = flops(gradient, *shapes)
    assert max(by_name.values()) == 2 * product + 3 * sampling
    assert sum(by_name.values()) == 3 * product + 4 * sampling
    unknown = [(None, *shape[1:]) for shape in shapes]
    assert flops(call, *unknown) == ({}, 0)


@pytest.mark.parametrize(
    ("function", "options", "samples"),
    [
        (ops.deformable_psroi_pool, {"output_dim": 6, "group_size": 1}, 16),
        (
            ops.deformable_psroi_pool,
            {"output_dim": 6, "group_size": 1, "sample_per_part": 3},
            9,
        ),
        (ops.deformable_roi_align, {"sampling_ratio": 3}, 9),
        (ops.deformable_roi_align, {}, 4),
    ],
)
def test_flops_of_pooling(function, options, samples):
    def call(*operands):
        return function(
            *operands, pooled_size=(2, 3), spatial_scale=1.0, **options
        )

    def gradient(inputs, rois, offset):
        return tf.gradients(call(inputs, rois, offset), [inputs, offset])

    shapes = [(2, 8, 9, 6), (5, 5), (5, 2, 3, 2)]
    one = 8 * samples * 5 * 2 * 3 * 6
    by_name, total = flops(call, *shapes)
    assert total == sum(by_name.values()) == one
    by_name, _ = flops(gradient, *shapes)
    assert sum(by_name.values()) == 3 * one
