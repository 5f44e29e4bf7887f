# SPDX-License-Identifier: Apache-2.0
"""Tests `DeformableConv2D`: its values, and its common ground with `Conv2D`.

The common behaviour of all layers is tested in contract_test.py.
"""

import inspect

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import displace
from operands import random

from tf_deform.layers import DeformableConv2D
from tf_deform.ops import deformable_conv2d

MODULATIONS = [None, "sigmoid", "2sigmoid"]


def displaced(
    input_shape: tuple[int | None, ...] = (None, 8, 9, 6),
    filters: int = 4,
    kernel_size: int | tuple[int, int] = 3,
    **config: object,
) -> DeformableConv2D:
    """Returns a built layer whose offsets are far from zero."""
    layer = DeformableConv2D(filters, kernel_size, **config)
    layer.build(input_shape)
    displace(layer)
    return layer


def branch(layer: DeformableConv2D, x: np.ndarray) -> tuple:
    """Computes `(offset, mask)` of a layer from its weights, by `Conv2D`.

    Channels last; `mask` is None without modulation.
    """
    pads = layer.padding
    if not isinstance(pads, str):
        pads = reference.explicit_padding(pads, None, None, None, None)
        x = np.pad(x, [(0, 0), *pads, (0, 0)])
        pads = "valid"
    dilation_rate = layer.offset_dilation_rate or layer.dilation_rate
    values = tf.nn.conv2d(
        x,
        layer.offset_kernel,
        strides=layer.strides,
        padding=pads.upper(),
        dilations=dilation_rate,
    )
    values = values + layer.offset_bias
    if layer.modulation is None:
        return values, None
    offset, mask = values[..., : -values.shape[-1] // 3], None
    mask = tf.sigmoid(values[..., -values.shape[-1] // 3 :])
    return offset, 2 * mask if layer.modulation == "2sigmoid" else mask


def by_branch_and_op(layer: DeformableConv2D, x: np.ndarray) -> np.ndarray:
    """Returns a layer's expected output, channels last, no activation."""
    offset, mask = branch(layer, x)
    output = deformable_conv2d(
        x,
        layer.kernel,
        offset,
        mask,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        offset_groups=layer.offset_groups,
        boundary=layer.boundary,
    )
    return output if layer.bias is None else output + layer.bias


def test_displace_moves_samples_by_more_than_a_pixel():
    """Tests the helper `displace`, on which the other tests rely."""
    layer = displaced(modulation="sigmoid", offset_groups=2)
    offset, mask = branch(layer, random(2, 8, 9, 6))
    dy, dx = offset[..., 0::2], offset[..., 1::2]
    assert 1 < np.mean(dy) < 2 and -3 < np.mean(dx) < -2
    assert np.std(dy) > 0.3 and np.std(dx) > 0.3
    assert np.std(mask) > 0.1


# A drop-in replacement for Conv2D.


def test_signature_is_that_of_conv2d():
    ours = inspect.signature(DeformableConv2D).parameters
    theirs = inspect.signature(keras.layers.Conv2D).parameters
    theirs = {k: v for k, v in theirs.items() if k != "kwargs"}
    extra = {
        "offset_groups": 1,
        "modulation": None,
        "boundary": "zeros",
        "offset_dilation_rate": None,
        "implementation": "native",
    }
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    assert {
        k: v.default for k, v in ours.items() if k not in {*theirs, "kwargs"}
    } == extra


def test_call_has_no_argument_named_mask():
    """Tests the argument's name.

    Keras fills arguments named `mask` from its own masks.
    """
    call = inspect.signature(DeformableConv2D.call).parameters
    assert list(call) == ["self", "inputs", "offset", "modulator"]


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


@pytest.mark.parametrize("modulation", [None, "2sigmoid"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("config", CONV2D_CONFIGS, ids=str)
def test_a_new_layer_equals_conv2d(config, data_format, modulation):
    """Tests a new layer.

    Its branch gives zero offsets, so it convolves plainly.
    """
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
    layer.kernel.assign(plain.kernel)
    if layer.use_bias:
        layer.bias.assign(plain.bias)
    else:
        assert layer.bias is None
    assert_close(layer(x), expected, 1e-5)


def test_sigmoid_halves_a_new_layer():
    x = random(2, 8, 9, 6)
    layer = DeformableConv2D(4, 3, modulation="sigmoid")
    half = layer(x)
    plain = keras.layers.Conv2D(4, 3)
    plain.build(x.shape)
    plain.kernel.assign(layer.kernel)
    assert_close(half, 0.5 * plain(x), 1e-5)


# The offset branch.

CONFIGS = [
    {},
    {"padding": "same"},
    {"strides": 2, "padding": "same"},
    {"strides": (2, 3), "dilation_rate": (2, 1), "padding": "same"},
    {"strides": 2, "dilation_rate": 2},
    {"padding": 1},
    {"padding": (2, 1)},
    {"padding": ((0, 1), (3, 2)), "strides": (1, 2)},
    {"groups": 2, "offset_groups": 3},
    {"groups": 3, "offset_groups": 2, "filters": 6, "kernel_size": (2, 3)},
    {"boundary": "clamp", "padding": "same"},
    {"use_bias": False},
    {"filters": 7},  # as many as the output's columns
]


@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_own_branch_is_one_convolution(config, modulation):
    x = random(2, 8, 9, 6)
    layer = displaced(**config, modulation=modulation)
    assert_close(layer(x), by_branch_and_op(layer, x), 1e-5)


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_offset_dilation_rate(modulation):
    """Tests a dilated convolution with a branch that is not dilated."""
    x = random(2, 8, 9, 6)
    layer = displaced(
        padding="same",
        dilation_rate=2,
        offset_dilation_rate=1,
        modulation=modulation,
    )
    assert_close(layer(x), by_branch_and_op(layer, x), 1e-5)
    layer = displaced(padding="same", dilation_rate=2, modulation=modulation)
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
    layer = displaced(
        padding=padding, dilation_rate=2, offset_dilation_rate=1, strides=2
    )
    padded = x
    for axis, (before, after) in enumerate(branch_padding, start=1):
        size = x.shape[axis]
        middle = np.arange(max(-before, 0), size - max(-after, 0))
        padded = np.take(padded, middle, axis)
        widths = [(0, 0)] * 4
        widths[axis] = max(before, 0), max(after, 0)
        padded = np.pad(padded, widths)
    offset = tf.nn.conv2d(padded, layer.offset_kernel, 2, "VALID")
    expected = deformable_conv2d(
        x,
        layer.kernel,
        offset + layer.offset_bias,
        strides=2,
        padding=padding,
        dilation_rate=2,
    )
    assert_close(layer(x), expected + layer.bias, 1e-5)


def test_shapes_of_the_branch():
    """Tests the branch: offsets, then the mask as the last third.

    The branch has a bias and no groups.
    """
    config = {"kernel_size": (2, 3), "groups": 3, "filters": 9}
    layer = displaced(**config, offset_groups=2)
    assert layer.kernel.shape == (2, 3, 2, 9)
    assert layer.offset_kernel.shape == (2, 3, 6, 2 * 2 * 3 * 2)
    assert layer.offset_bias.shape == (2 * 2 * 3 * 2,)
    layer = displaced(**config, offset_groups=2, modulation="sigmoid")
    assert layer.offset_kernel.shape == (2, 3, 6, 2 * 2 * 3 * 3)
    assert layer.offset_bias.shape == (2 * 2 * 3 * 3,)
    # `use_bias` concerns the output only.
    layer = displaced(**config, use_bias=False)
    assert layer.bias is None
    assert layer.offset_bias is not None


def test_branch_starts_at_zero_whatever_the_initializers():
    layer = DeformableConv2D(
        4,
        3,
        modulation="sigmoid",
        kernel_initializer="ones",
        bias_initializer="ones",
    )
    layer.build((None, 8, 9, 6))
    assert not np.any(layer.offset_kernel) and not np.any(layer.offset_bias)
    assert np.all(layer.kernel) and np.all(layer.bias)


@pytest.mark.parametrize("modulation", [None, "sigmoid"])
def test_count_params(modulation):
    branch_channels = 3 * 3 * (2 if modulation is None else 3)
    layer = displaced(modulation=modulation)
    assert layer.count_params() == (
        (3 * 3 * 6 * 4 + 4) + (3 * 3 * 6 * branch_channels + branch_channels)
    )


# Shapes.


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(
    ("sizes", "config", "expected"),
    [
        ((2, 8, 9), {}, (2, 6, 7)),
        ((None, 8, 9), {}, (None, 6, 7)),
        ((None, None, 9), {"padding": "same"}, (None, None, 9)),
        ((None, None, None), {"strides": 2}, (None, None, None)),
        ((2, 8, 9), {"strides": 2, "padding": "same"}, (2, 4, 5)),
        ((2, 8, 9), {"strides": 2, "dilation_rate": 2}, (2, 2, 3)),
        ((2, 8, 9), {"padding": 1}, (2, 8, 9)),
        ((2, 8, None), {"padding": (2, 1)}, (2, 10, None)),
        ((2, 8, 9), {"padding": ((0, 1), (3, 2))}, (2, 7, 12)),
    ],
)
def test_compute_output_shape(sizes, config, expected, data_format):
    layer = DeformableConv2D(4, 3, data_format=data_format, **config)

    def shape(sizes, channels):
        if data_format == "channels_last":
            return (*sizes, channels)
        return (sizes[0], channels, *sizes[1:])

    input_shape, expected = shape(sizes, 6), shape(expected, 4)
    assert tuple(layer.compute_output_shape(input_shape)) == expected
    assert layer(keras.KerasTensor(input_shape)).shape == expected
    if None not in input_shape:
        assert layer(np.zeros(input_shape)).shape == expected


@pytest.mark.parametrize("padding", ["valid", "same", ((0, 1), (3, 2))])
def test_model_of_unknown_sizes(padding):
    """Tests that one functional model serves images of every size and batch."""
    inputs = keras.Input((None, None, 6))
    layer = DeformableConv2D(4, 3, padding=padding, modulation="sigmoid")
    model = keras.Model(inputs, layer(inputs))
    displace(layer)
    assert model.output_shape == (None, None, None, 4)
    for shape in [(2, 8, 9, 6), (5, 11, 6, 6), (1, 3, 3, 6)]:
        x = random(*shape)
        assert_close(
            model.predict(x, verbose=0), by_branch_and_op(layer, x), 1e-5
        )


# Configuration and weights.


def test_config_of_what_keras_knows_by_name():
    layer = DeformableConv2D(
        6,
        3,
        activation="tanh",
        kernel_initializer=keras.initializers.HeNormal(seed=7),
        bias_initializer="ones",
        kernel_regularizer=keras.regularizers.L2(0.25),
        bias_regularizer="l1",
        activity_regularizer=keras.regularizers.L1(0.5),
        kernel_constraint=keras.constraints.MaxNorm(3.0),
        bias_constraint="non_neg",
    )
    clone = DeformableConv2D.from_config(layer.get_config())
    assert clone.kernel_initializer.get_config() == (
        keras.initializers.HeNormal(seed=7).get_config()
    )
    assert isinstance(clone.bias_initializer, keras.initializers.Ones)
    assert clone.kernel_regularizer.l2 == 0.25
    assert isinstance(clone.bias_regularizer, keras.regularizers.L1)
    assert clone.activity_regularizer.l1 == 0.5
    assert clone.kernel_constraint.max_value == 3.0
    assert isinstance(clone.bias_constraint, keras.constraints.NonNeg)
    assert clone.activation is keras.activations.tanh


@pytest.mark.parametrize("use_bias", [True, False])
def test_takes_the_weights_of_conv2d(use_bias):
    conv = keras.layers.Conv2D(4, 3, use_bias=use_bias)
    layer = DeformableConv2D(4, 3, use_bias=use_bias, modulation="sigmoid")
    for each in (conv, layer):
        each.build((None, 8, 9, 6))
    displace(layer)
    branch = layer.offset_kernel.numpy(), layer.offset_bias.numpy()
    layer.set_weights(conv.get_weights())
    assert_equal(layer.kernel, conv.kernel)
    assert_equal(layer.offset_kernel, branch[0])
    assert_equal(layer.offset_bias, branch[1])
    with pytest.raises(ValueError):
        layer.set_weights(conv.get_weights()[:1] * 3)


# Training.


def test_gradients_equal_those_of_the_op():
    """Compares all weights and the inputs, through branch and modulation."""
    x = tf.constant(random(2, 8, 9, 6))
    layer = displaced(modulation="2sigmoid", groups=2, offset_groups=3)
    operands = [x, *(v.value for v in layer.weights)]
    assert len(operands) == 5
    results = []
    for function in (layer, lambda x: by_branch_and_op(layer, x)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(function(x) ** 2)
        results.append(tape.gradient(loss, operands))
    for actual, expected in zip(*results, strict=True):
        assert np.any(expected)
        assert_close(actual, expected, 1e-5)


def test_regularizers_leave_the_branch_alone():
    layer = displaced(kernel_regularizer="l2", bias_regularizer="l1")
    kernel, bias = layer.kernel.numpy(), layer.bias.numpy()
    losses = sorted(float(loss) for loss in layer.losses)
    expected = [0.01 * np.sum(kernel**2), 0.01 * np.sum(np.abs(bias))]
    np.testing.assert_allclose(losses, sorted(expected), rtol=1e-5)
    layer = displaced(kernel_regularizer="l2")
    assert len(layer.losses) == 1


def test_constraints_leave_the_branch_alone():
    layer = DeformableConv2D(
        4,
        3,
        modulation="sigmoid",
        kernel_constraint="non_neg",
        bias_constraint="non_neg",
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
    layer = displaced(modulation="sigmoid", **config)
    if how == "enable_lora":
        layer.enable_lora(2)
    before = layer(x)
    layer.lora_kernel_b.assign(random(*layer.lora_kernel_b.shape))
    after = layer(x)
    assert np.abs(after - before).max() > 0.1
    assert_close(after, by_branch_and_op(layer, x), 1e-5)
    assert {v.name for v in layer.trainable_weights} == {
        "bias",
        "offset_kernel",
        "offset_bias",
        "lora_kernel_a",
        "lora_kernel_b",
    }


# Among other layers.


def test_time_distributed():
    x = random(2, 3, 8, 9, 6)
    layer = displaced(modulation="sigmoid")
    inputs = keras.Input((None, 8, 9, 6))
    model = keras.Model(inputs, keras.layers.TimeDistributed(layer)(inputs))
    expected = np.stack([layer(frame) for frame in np.moveaxis(x, 1, 0)], 1)
    assert_close(model.predict(x, verbose=0), expected, 1e-5)


def test_nested_sequential():
    x = random(2, 12, 11, 6)
    layers = [
        displaced(filters=5, modulation="sigmoid"),
        displaced((None, 6, 7, 5), strides=2, padding="same"),
    ]
    block = keras.Sequential(layers, name="block")
    model = keras.Sequential([keras.Input((None, None, 6)), block])
    expected = by_branch_and_op(layers[1], by_branch_and_op(layers[0], x))
    assert_close(model.predict(x, verbose=0), expected, 1e-5)
    assert len(model.trainable_weights) == 8
