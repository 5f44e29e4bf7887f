# SPDX-License-Identifier: Apache-2.0
"""Tests that TensorFlow knows the limits of attributes, and the ops' cost."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from every_op import every_op
from tensorflow.python.eager import context, execute

from tf_deform import ops


@functools.cache
def traced(op, is_gradient):
    """Returns the op in the graph of its full call, or its gradient op."""
    graph = tf.function(lambda: op.results(*op.draw())).get_concrete_function()
    kind = f"TfDeform>{op.name}{'Grad' if is_gradient else ''}"
    (found,) = (x for x in graph.graph.get_operations() if x.type == kind)
    return found


def run(op, number, is_gradient):
    """Runs the op alone with `number` tensors as its optional operand."""
    node = traced(op, is_gradient)
    inputs = [tf.zeros(x.shape, x.dtype) for x in node.inputs]
    *required, optional = op.draw()[0]
    place = len(required)
    inputs[place : place + 1] = number * inputs[place : place + 1]
    wanted = [True] * (len(op.differentiable) - 1 + number)
    if tf.executing_eagerly():
        attributes = {x.name: node.get_attr(x.name) for x in node.op_def.attr}
        for name in ("T", "Tcoord"):
            attributes[name] = attributes[name].as_datatype_enum
        attributes[f"num_{optional}"] = number
        if is_gradient:
            attributes["wanted"] = wanted
        flat = [part for pair in attributes.items() for part in pair]
        outputs = len(wanted if is_gradient else node.outputs)
        return execute.execute(
            node.type.encode(), outputs, inputs, tuple(flat), context.context()
        )
    definition = tf.compat.v1.NodeDef()
    definition.CopyFrom(node.node_def)
    definition.name = "op"
    definition.attr[f"num_{optional}"].i = number
    if is_gradient:
        definition.attr["wanted"].list.b[:] = wanted
    feeds = {f"in{index}:0": tensor for index, tensor in enumerate(inputs)}
    definition.input[:] = feeds
    graph = tf.compat.v1.GraphDef(node=[definition])
    graph.versions.producer = 2000
    return tf.import_graph_def(graph, input_map=feeds, return_elements=["op:0"])


@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("is_gradient", [False, True], ids=["op", "gradient"])
@every_op
def test_optional_operands_are_at_most_one(op, is_gradient, in_graph):
    """Tests that this holds also in a graph that somebody has edited."""

    def call(number):
        if in_graph:
            return tf.function(lambda: run(op, number, is_gradient))()
        return run(op, number, is_gradient)

    for number in (0, 1):
        assert call(number)
    for number in (2, 3, 17):
        with pytest.raises(
            (ValueError, tf.errors.InvalidArgumentError),
            match=f"(?s)to hold at most one tensor.*Received: {number}",
        ):
            call(number)


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
        with pytest.raises(
            tf.errors.InvalidArgumentError,
            match=f"Expected `{name}` to be a finite number of at least",
        ):
            function(inputs, rois, displacement, **{**options, name: value})


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


@pytest.mark.parametrize(
    ("modulation", "channels"),
    [("mask", (36, 18)), ("none", (36,)), ("2sigmoid", (54,))],
)
def test_flops_of_a_convolution(modulation, channels):
    shapes = [(2, 8, 9, 12), (3, 3, 6, 10), *((2, 6, 7, n) for n in channels)]

    def call(*operands):
        return ops.deformable_conv2d(
            *operands, offset_groups=2, modulation=modulation
        )

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
