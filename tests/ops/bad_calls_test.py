# SPDX-License-Identifier: Apache-2.0
"""Tests that every wrong call gets an error from which a person can act."""

import re

import every_op
import numpy as np
import pytest
import tensorflow as tf
from bad_calls import (
    BAD_DATA,
    BAD_SHAPES,
    BAD_TYPES,
    ERRORS,
    GOOD,
    arguments_of,
    in_graph,
    in_graph_once,
    rows_of,
    words,
)

POOLING = [op.function for op in every_op.POOLING.values()]


@pytest.mark.parametrize("op", GOOD)
def test_the_good_calls_are_good(op):
    operands, options = arguments_of(op, {})
    expected = op(**operands, **options)
    for known in (True, False):
        actual = in_graph(op, operands, options, known)
        np.testing.assert_array_equal(actual, expected)


def test_there_are_enough_of_them():
    for op in GOOD:
        assert len(BAD_SHAPES[op] + BAD_TYPES[op] + BAD_DATA) >= 50


@pytest.mark.parametrize("form", ["tensors", "arrays"])
@pytest.mark.parametrize(**rows_of(BAD_SHAPES, BAD_TYPES))
def test_eager(op, bad_call, form):
    operands, options = arguments_of(op, bad_call.changes)
    if form == "arrays":
        operands = {
            name: None if x is None else x.numpy()
            for name, x in operands.items()
        }
    with pytest.raises(ERRORS) as info:
        op(**operands, **options)
    bad_call.check(info.value)


@pytest.mark.parametrize(**rows_of(BAD_SHAPES, BAD_TYPES))
def test_graph_with_known_shapes(op, bad_call):
    """Tests that the graph is refused while being built, before it runs."""
    with pytest.raises((ValueError, TypeError)) as info:
        in_graph(op, *arguments_of(op, bad_call.changes), known=True)
    bad_call.check(info.value)


@pytest.mark.parametrize(**rows_of(BAD_SHAPES, BAD_TYPES))
def test_graph_with_unknown_shapes(op, bad_call):
    """Tests that the kernel refuses shapes that the graph cannot know."""
    with pytest.raises(ERRORS) as info:
        in_graph_once(op, *arguments_of(op, bad_call.changes))
    bad_call.check(info.value)


@pytest.mark.parametrize(**rows_of(BAD_SHAPES))
def test_bad_shape_under_a_tape(op, bad_call):
    """Tests that computing a gradient does not hide the error."""
    operands, options = arguments_of(op, bad_call.changes)
    with tf.GradientTape() as tape, pytest.raises(ERRORS) as info:
        tape.watch([x for x in operands.values() if x is not None])
        op(**operands, **options)
    bad_call.check(info.value)


@pytest.mark.parametrize(**rows_of(BAD_SHAPES))
def test_portable_ops_say_the_same(op, bad_call):
    """Tests the same text in the same type of error, alone and in graphs.

    In graphs that know no shapes, an error takes the place of broadcasting or
    reshaping to a wrong result.
    """
    operands, options = arguments_of(op, bad_call.changes)

    def errors(implementation):
        call = {**options, "implementation": implementation}
        with pytest.raises(ERRORS) as eager:
            op(**operands, **call)
        with pytest.raises(ERRORS) as graph:
            in_graph(op, operands, call, known=True)
        return [(info.type, words(info.value)) for info in (eager, graph)]

    assert errors("portable") == errors("native")
    options["implementation"] = "portable"
    with pytest.raises((ValueError, tf.errors.OpError)):
        in_graph_once(op, operands, options)


@pytest.mark.parametrize("mode", ["eager", "known", "unknown"])
@pytest.mark.parametrize(**rows_of({op: BAD_DATA for op in POOLING}))
def test_batch_indices(op, bad_call, mode):
    operands, options = arguments_of(op, bad_call.changes)
    with pytest.raises(tf.errors.InvalidArgumentError) as info:
        if mode == "eager":
            op(**operands, **options)
        elif mode == "known":
            in_graph(op, operands, options, known=True)
        else:
            in_graph_once(op, operands, options)
    bad_call.check(info.value)


@pytest.mark.parametrize("op", POOLING)
def test_batch_indices_of_float64_inputs(op):
    """Tests indices that are no integers, but that float32 would round."""
    rois = np.zeros((7, 5))
    rois[3, 0] = 1 + 1e-12
    operands, options = arguments_of(op, {"inputs": "float64"})
    op(**operands, **options)
    operands["rois"] = rois
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"rois\[3, 0\]"):
        op(**operands, **options)


@pytest.mark.parametrize("op", POOLING)
def test_no_image_has_no_batch_index(op):
    operands, options = arguments_of(op, {})
    operands["inputs"] = operands["inputs"][:0]
    with pytest.raises(tf.errors.InvalidArgumentError, match="below 0"):
        op(**operands, **options)
    operands["rois"] = operands["rois"] - 1
    assert not op(**operands, **options).numpy().any()


@pytest.mark.parametrize("op", GOOD)
def test_options_are_keywords(op):
    operands, options = arguments_of(op, {})
    with pytest.raises(TypeError):
        op(*operands.values(), *options.values())
    required = ["output_dim", "spatial_scale", "pooled_size"]
    for name in [name for name in required if name in options]:
        some = {k: v for k, v in options.items() if k != name}
        with pytest.raises(TypeError, match=name):
            op(**operands, **some)
    with pytest.raises(TypeError, match="data_format"):
        op(**operands, **options, data_format="NCHW")


@pytest.mark.parametrize("op", POOLING)
@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1e-38, 3e38, 1e300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_scales_give_an_answer(op, scale, dtype):
    """Tests extreme finite positive scales.

    The output is of zeros and edges, or an error.
    """
    operands, options = arguments_of(op, {"spatial_scale": scale})
    operands["inputs"] = tf.ones(operands["inputs"].shape, dtype)
    try:
        output = op(**operands, **options).numpy()
    except ERRORS as error:
        assert re.search("Expected.*`spatial_scale`.*Received", str(error))
    else:
        assert set(output.ravel()) <= {0.0, 1.0}
