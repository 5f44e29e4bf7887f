# SPDX-License-Identifier: Apache-2.0
"""Tests `DeformableConv2D`: its values, and its common ground with `Conv2D`.

The common behaviour of all layers is tested in contract_test.py.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import (
    CONVOLUTIONS,
    MODULATIONS,
    by_the_op,
    conv2d_branch,
    displace,
    displaced,
    new,
)
from operands import random

from tf_deform.layers import DeformableConv2D


def by_branch_and_op(layer: DeformableConv2D, x: np.ndarray) -> np.ndarray:
    """Returns a layer's expected output, channels last, no activation."""
    return by_the_op(layer, x, *conv2d_branch(layer, x))


def test_displace_moves_samples_by_more_than_a_pixel():
    """Tests the helper `displace`, on which the other tests rely."""
    layer = displaced("conv2d", offset_groups=2)
    offset, mask = conv2d_branch(layer, random(2, 8, 9, 6))
    dy, dx = offset[..., 0::2], offset[..., 1::2]
    assert 1 < np.mean(dy) < 2 and -3 < np.mean(dx) < -2
    assert np.std(dy) > 0.3 and np.std(dx) > 0.3
    assert np.std(mask) > 0.1


# A drop-in replacement for Conv2D.

CONV2D_CONFIGS = [
    {},
    {"padding": "same"},
    {"padding": "SAME"},
    {"strides": 2},
    {"strides": (3, 2), "padding": "same"},
    {"strides": 2, "padding": "same", "kernel_size": 2},
    {"dilation_rate": 2},
    {"dilation_rate": (1, 3), "padding": "same", "kernel_size": (2, 3)},
    {"groups": 3, "filters": 9},
    {"groups": 6, "filters": 6, "padding": "same"},
    {"activation": "relu", "padding": "same"},
    {"activation": "softmax"},
    {"use_bias": False},
    {"kernel_size": 1},
    {"kernel_size": [2, 4], "strides": [2, 1]},
]


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("config", CONV2D_CONFIGS, ids=str)
def test_a_new_layer_equals_conv2d(config, data_format, modulation):
    """Tests zero offsets; "sigmoid" halves what the kernel gives."""
    # With as many filters as columns in the output, Keras 3.15 adds the bias of
    # a channels_first Conv2D along the width; 11 columns avoid this bug.
    config = {"filters": 11, "kernel_size": 3, **config}
    config["data_format"] = data_format
    x = random(2, 11, 10, 6)
    if data_format == "channels_first":
        x = np.transpose(x, (0, 3, 1, 2))
    plain = keras.layers.Conv2D(**config, bias_initializer="normal")
    expected = plain(x)
    layer = DeformableConv2D(**config, modulation=modulation)
    assert layer.compute_output_shape(x.shape) == expected.shape
    layer.build(x.shape)
    layer.kernel.assign(plain.kernel * (2 if modulation == "sigmoid" else 1))
    if layer.use_bias:
        layer.bias.assign(plain.bias)
    else:
        assert layer.bias is None
    assert_close(layer(x), expected, 1e-5)


# The offset branch.


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize(
    "config",
    CONVOLUTIONS
    + [
        {"padding": "same", "dilation_rate": 2, "offset_dilation_rate": rate}
        for rate in (1, None)
    ],
    ids=str,
)
def test_own_branch_is_one_convolution(config, modulation):
    x = random(2, 8, 9, 6)
    layer = displaced("conv2d", **config, modulation=modulation)
    assert_close(layer(x), by_branch_and_op(layer, x), 1e-5)


@pytest.mark.parametrize(
    ("padding", "branch_padding"),
    [
        (2, ((1, 1), (1, 1))),
        (((1, 2), (3, 4)), ((0, 1), (2, 3))),
        ("valid", ((-1, -1), (-1, -1))),  # cuts the border off
        ((1, 0), ((0, 0), (-1, -1))),
    ],
)
def test_taps_of_branch_and_layer_have_one_centre(padding, branch_padding):
    """Tests a 3x3 branch of rate 1, in the middle of a 3x3 layer of rate 2."""
    x = random(2, 8, 9, 6)
    rates = {"dilation_rate": 2, "offset_dilation_rate": 1, "strides": 2}
    layer = displaced("conv2d", padding=padding, modulation=None, **rates)
    padded = x
    for axis, (before, after) in enumerate(branch_padding, start=1):
        size = x.shape[axis]
        middle = np.arange(max(-before, 0), size - max(-after, 0))
        padded = np.take(padded, middle, axis)
        widths = [(0, 0)] * 4
        widths[axis] = max(before, 0), max(after, 0)
        padded = np.pad(padded, widths)
    offset = tf.nn.conv2d(padded, layer.offset_kernel, 2, "VALID")
    expected = by_the_op(layer, x, offset + layer.offset_bias)
    assert_close(layer(x), expected, 1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("modulation", "parts"), [(None, 2), ("sigmoid", 3)])
def test_a_new_branch(modulation, parts, use_bias):
    """Tests zeros: offsets, then the mask as the last third.

    The branch has no groups, and a bias whether or not the layer has one.
    """
    layer = DeformableConv2D(
        9,
        (2, 3),
        groups=3,
        offset_groups=2,
        modulation=modulation,
        use_bias=use_bias,
        kernel_initializer="ones",
        bias_initializer="ones",
    )
    layer.build((None, 8, 9, 6))
    fields = 2 * 2 * 3 * parts
    expected = {
        "kernel": np.ones((2, 3, 2, 9)),
        "bias": np.ones(9),
        "offset_kernel": np.zeros((2, 3, 6, fields)),
        "offset_bias": np.zeros(fields),
    }
    if not use_bias:
        del expected["bias"]
        assert layer.bias is None
    assert_equal({v.name: v.numpy() for v in layer.weights}, expected)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_the_op_alone_reads_what_the_branch_predicts(modulation):
    """Tests that nothing stands between the branch and the op, or behind it."""
    layer = displaced("conv2d", modulation=modulation, use_bias=False)
    graph = tf.function(layer).get_concrete_function(random(2, 8, 9, 6)).graph
    (op,) = (x for x in graph.get_operations() if "Deformable" in x.type)
    assert op.get_attr("modulation").decode() == (modulation or "none")
    assert op.inputs[2].op.type == "BiasAdd" and len(op.inputs) == 3
    (output,) = graph.outputs
    assert output.op.type == "Identity" and output.op.inputs[0] is op.outputs[0]


@pytest.mark.parametrize("padding", ["valid", "same", ((0, 1), (3, 2))])
def test_model_of_unknown_sizes(padding):
    """Tests that one functional model serves images of every size and batch."""
    inputs = keras.Input((None, None, 6))
    layer = new("conv2d", padding=padding)
    model = keras.Model(inputs, layer(inputs))
    displace(layer)
    assert model.output_shape == (None, None, None, 4)
    for shape in [(2, 8, 9, 6), (5, 11, 6, 6), (1, 3, 3, 6)]:
        x = random(*shape)
        y = model.predict(x, verbose=0)
        assert_close(y, by_branch_and_op(layer, x), 1e-5, case=shape)


# Weights.


@pytest.mark.parametrize("use_bias", [True, False])
def test_takes_the_weights_of_conv2d(use_bias):
    conv = keras.layers.Conv2D(4, 3, use_bias=use_bias)
    conv.build((None, 8, 9, 6))
    layer = displaced("conv2d", use_bias=use_bias)
    branch = layer.offset_kernel.numpy(), layer.offset_bias.numpy()
    layer.set_weights(conv.get_weights())
    assert_equal(layer.kernel, conv.kernel)
    assert_equal(layer.offset_kernel, branch[0])
    assert_equal(layer.offset_bias, branch[1])
    with pytest.raises(ValueError):
        layer.set_weights(conv.get_weights()[:1] * 3)


def test_regularizers_leave_the_branch_alone():
    layer = displaced("conv2d", kernel_regularizer="l2", bias_regularizer="l1")
    kernel, bias = layer.kernel.numpy(), layer.bias.numpy()
    expected = [0.01 * np.sum(kernel**2), 0.01 * np.sum(np.abs(bias))]
    np.testing.assert_allclose(
        sorted(layer.losses), sorted(expected), rtol=1e-5
    )


def test_constraints_leave_the_branch_alone():
    layer = new(
        "conv2d", kernel_constraint="non_neg", bias_constraint="non_neg"
    )
    model = keras.Sequential([keras.Input((8, 9, 6)), layer])
    displace(layer)
    model.compile("sgd", "mse")
    model.fit(random(8, 8, 9, 6), random(8, 6, 7, 4), verbose=0)
    assert np.all(layer.kernel >= 0) and np.all(layer.bias >= 0)
    assert np.any(layer.offset_kernel < 0) and np.any(layer.offset_bias < 0)


@pytest.mark.parametrize("how", ["constructor", "enable_lora"])
def test_lora(how):
    """Tests LoRA as in Conv2D: a low-rank update of the kernel."""
    x = random(2, 8, 9, 6)
    config = {"lora_rank": 2} if how == "constructor" else {}
    layer = displaced("conv2d", **config)
    if how == "enable_lora":
        layer.enable_lora(2)
    before = layer(x)
    layer.lora_kernel_b.assign(random(*layer.lora_kernel_b.shape))
    after = layer(x)
    assert np.abs(after - before).max() > 0.1
    assert_close(after, by_branch_and_op(layer, x), 1e-5)
    names = "bias offset_kernel offset_bias lora_kernel_a lora_kernel_b"
    assert {v.name for v in layer.trainable_weights} == {*names.split()}


# Among other layers.


def test_time_distributed():
    x = random(2, 3, 8, 9, 6)
    layer = displaced("conv2d")
    inputs = keras.Input((None, 8, 9, 6))
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    expected = np.stack([layer(frame) for frame in np.moveaxis(x, 1, 0)], 1)
    assert_close(model.predict(x, verbose=0), expected, 1e-5)


def test_nested_sequential():
    x = random(2, 12, 11, 6)
    layers = [new("conv2d", filters=5), new("conv2d", strides=2, padding=1)]
    block = keras.Sequential(layers, name="block")
    model = keras.Sequential([keras.Input((None, None, 6)), block])
    for layer in layers:
        displace(layer)
    expected = by_branch_and_op(layers[1], by_branch_and_op(layers[0], x))
    assert_close(model.predict(x, verbose=0), expected, 1e-5)
    assert len(model.trainable_weights) == 8


def test_a_branch_shared_by_two_layers():
    """Tests a functional model in which a plain convolution displaces both."""
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
    operands = values[..., :18], tf.sigmoid(values[..., 18:])
    for output, layer in zip(model.predict(x, verbose=0), layers, strict=True):
        assert_close(output, by_the_op(layer, x, *operands), 1e-5)
