# SPDX-License-Identifier: Apache-2.0
"""Tests displacements that the caller gives, of all layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import (
    KINDS,
    POOLS,
    by_hand,
    by_the_op,
    displaced,
    given_call,
    new,
    own_call,
    plain_call,
)
from operands import random

from tf_deform.layers import DeformableConv2D
from tf_deform.ops import deformable_conv2d

MODULATIONS = [None, "sigmoid", "2sigmoid"]

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_given_displacements(kind):
    """Tests that no branch is built, and that the values are used unchanged."""
    call, layer = given_call(kind), new(kind)
    output = layer(**call)
    kernel = ["kernel", "bias"] if kind == "conv2d" else []
    assert [v.name for v in layer.weights] == kernel
    assert layer.offset_kernel is None and layer.offset_bias is None
    assert_equal(output, by_the_op(layer, *call.values()))
    assert_close(output, by_hand(layer, *call.values()), 1e-5)


@every_kind
def test_given_displacements_the_branch_does_not_run(kind):
    """Tests that a branch full of NaN has no effect."""
    layer, call = displaced(kind), given_call(kind)
    before = layer(**call)
    branch = [v for v in layer.weights if v.name.startswith("offset_")]
    for variable in branch:
        variable.assign(np.full(variable.shape, np.nan))
    assert_equal(layer(**call), before)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(**call))
    assert tape.gradient(loss, branch) == [None] * len(branch)
    assert len(branch) == 2


@every_kind
def test_given_by_position(kind):
    call, layer = given_call(kind), new(kind)
    assert_equal(layer(*call.values()), layer(**call))
    call, layer = own_call(kind), displaced(kind)
    arguments = list(call.values())
    if kind == "psroi":
        arguments.insert(2, None)
    assert_equal(layer(*arguments), layer(**call))


@every_kind
def test_gradients_reach_given_displacements(kind):
    layer = new(kind)
    call = {k: tf.constant(v) for k, v in given_call(kind).items()}
    results = []
    for function in (layer, lambda **x: by_the_op(layer, *x.values())):
        with tf.GradientTape() as tape:
            tape.watch(list(call.values()))
            output = function(**call)
        results.append(tape.gradient(output, call))
    actual, expected = results
    assert actual.pop("rois", None) is expected.pop("rois", None) is None
    for gradient in expected.values():
        assert np.any(gradient)
    assert_equal(actual, expected, name="gradients")


@every_kind
def test_given_in_tf_function_of_unknown_sizes(kind):
    layer, call = new(kind), given_call(kind)
    expected = layer(**call)
    signature = [
        tf.TensorSpec((None,) * (v.ndim - 1) + v.shape[-1:])
        for v in call.values()
    ]
    function = tf.function(layer, input_signature=signature)
    assert_equal(function(*call.values()), expected)
    nothing = function(
        *(
            v[:2] if k == "inputs" and kind != "conv2d" else v[:0]
            for k, v in call.items()
        )
    )
    assert nothing.shape == (0, *KINDS[kind].output)


# Errors of pooling.


@pytest.mark.parametrize("kind", POOLS)
def test_a_factor_of_zero_switches_displacements_off(kind):
    layer = displaced(kind, **{KINDS[kind].factor: 0})
    plain = by_the_op(layer, **plain_call(kind))
    assert_close(layer(**own_call(kind)), plain, 1e-5)
    assert_close(layer(**given_call(kind)), plain, 1e-5)


@pytest.mark.parametrize("classes", [1, 2, 6])
def test_given_displacements_tell_their_own_number_of_classes(classes):
    call, layer = plain_call("psroi"), new("psroi")
    call["trans"] = 0.8 * random(7, 2, 5, 2 * classes)
    assert_close(layer(**call), by_hand(layer, *call.values()), 1e-5)


# Displacements of a convolution.


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("has_modulator", [True, False])
def test_given_offset(modulation, data_format, has_modulator):
    """Tests that no branch is built; `modulator` is used unchanged, or is 1."""
    x, offset = random(2, 8, 9, 6), 2 * random(2, 6, 7, 36, seed=1)
    modulator = random(2, 6, 7, 18, seed=2) if has_modulator else None
    layer = DeformableConv2D(
        4,
        3,
        offset_groups=2,
        modulation=modulation,
        data_format=data_format,
        bias_initializer="normal",
    )

    def to_layer(array):
        if array is None or data_format == "channels_last":
            return array
        return np.transpose(array, (0, 3, 1, 2))

    output = layer(to_layer(x), to_layer(offset), to_layer(modulator))
    if data_format == "channels_first":
        output = np.transpose(output, (0, 2, 3, 1))
    assert [v.name for v in layer.weights] == ["kernel", "bias"]
    expected = deformable_conv2d(
        x, layer.kernel, offset, modulator, offset_groups=2
    )
    assert_close(output, expected + layer.bias, 1e-5)


def test_given_offset_in_a_functional_model():
    """Tests one branch for two layers, as a model may share it."""
    x = random(2, 8, 9, 6)
    inputs = keras.Input((None, None, 6))
    shared = keras.layers.Conv2D(27, 3, padding="same", name="shared")(inputs)
    offset = shared[..., :18]
    modulator = keras.ops.sigmoid(shared[..., 18:])
    layers = [DeformableConv2D(n, 3, padding="same") for n in (4, 5)]
    outputs = [f(inputs, offset=offset, modulator=modulator) for f in layers]
    model = keras.Model(inputs, outputs)
    assert len(model.weights) == 2 + 2 + 2
    values = model.get_layer("shared")(x)
    for output, layer in zip(model.predict(x, verbose=0), layers, strict=True):
        expected = deformable_conv2d(
            x,
            layer.kernel,
            values[..., :18],
            tf.sigmoid(values[..., 18:]),
            padding="same",
        )
        assert_close(output, expected, 1e-5)
