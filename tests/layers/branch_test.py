# SPDX-License-Identifier: Apache-2.0
"""Tests the parts of which `DeformableConv2D` makes its branch.

They are its convolution, which is trained also when dilated, and images without
pixels. Every configuration is trained in training_grid_test.py; NaN is tested
in nan_test.py.
"""

import functools
import itertools

import exported
import keras
import numpy as np
import operands
import pytest
import reference
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import displace, new, value_and_gradients

import tf_deform
from tf_deform.layers import DeformableConv2D
from tf_deform.layers._branch import convolve

random = functools.partial(operands.random, dtype="float64")


def operations(*functions: object) -> set[str]:
    """Returns the types of all operations in graphs and their functions."""
    types = set()
    for function in functions:
        graph = function.graph.as_graph_def()
        types |= {node.op for node in graph.node}
        for inner in graph.library.function:
            types |= {node.op for node in inner.node_def}
    return types


CONTROL_FLOW = {"If", "StatelessIf", "Switch", "Merge", "Case"}

# The convolution.


def plain(x, kernel, strides, padding, dilations):
    """Sums products with slices of the image, tap by tap."""
    size = x.shape[1:3], kernel.shape[:2], strides, dilations
    pads = np.array(reference.explicit_padding(padding, *size))
    (top, bottom), (left, right) = np.maximum(-pads, 0)
    x = np.pad(x, [(0, 0), *np.maximum(pads, 0), (0, 0)])
    x = x[:, top : x.shape[1] - bottom, left : x.shape[2] - right]
    size = reference.output_size("valid", x.shape[1:3], *size[1:])
    output = 0
    for tap in np.ndindex(kernel.shape[:2]):
        rows, columns = (
            rate * index + stride * np.arange(n)
            for index, rate, stride, n in zip(
                tap, dilations, strides, size, strict=True
            )
        )
        output = output + x[:, rows][:, :, columns] @ kernel[tap]
    return output


PADDINGS = ["same", ((0, 0), (0, 0)), ((3, 1), (0, 4)), ((4, -1), (-2, 3))]


@pytest.mark.parametrize("padding", PADDINGS, ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1), (2, 4)], ids=str)
def test_convolution(strides, padding):
    """Tests rates that divide the strides, are multiples, or neither."""
    for size, dilations, height in itertools.product(
        [(3, 3), (2, 1), (1, 4)],
        [(1, 1), (2, 2), (3, 2), (1, 3), (4, 6)],
        [11, 12],
    ):
        kernel = random(*size, 2, 3)
        x = random(2, height, 25, 2, seed=height)
        expected = plain(x, kernel, strides, padding, dilations)
        arguments = dict(strides=strides, padding=padding, dilations=dilations)
        actual = convolve(tf.constant(x), tf.constant(kernel), **arguments)
        case = f"{size}, {dilations}, {height}"
        assert actual.shape == expected.shape, case
        np.testing.assert_allclose(actual, expected, 0, 1e-12, err_msg=case)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize(
    ("strides", "dilations"),
    [((1, 1), (1, 1)), ((2, 2), (2, 2)), ((2, 1), (3, 2))],
)
@pytest.mark.parametrize("padding", PADDINGS[::3], ids=str)
def test_convolution_of_unknown_sizes(padding, strides, dilations, jit_compile):
    kernel = random(3, 3, 2, 3)
    arguments = dict(strides=strides, padding=padding, dilations=dilations)
    run = tf.function(
        lambda x: convolve(x, tf.constant(kernel), **arguments),
        input_signature=[tf.TensorSpec((None, None, None, 2), tf.float64)],
        jit_compile=jit_compile,
    )
    assert run.get_concrete_function().output_shapes[-1] == 3
    for size in [(9, 14), (12, 11)]:
        x = random(2, *size, 2)
        expected = plain(x, kernel, strides, padding, dilations)
        np.testing.assert_allclose(run(x), expected, 0, 1e-12)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize(
    ("strides", "dilations", "padding"),
    [
        ((1, 1), (2, 2), "same"),
        ((2, 2), (2, 2), "same"),
        ((2, 1), (3, 2), ((0, 1), (3, 2))),
        ((1, 1), (1, 1), ((0, 1), (3, 2))),
        ((1, 2), (2, 3), ((-1, 0), (2, -1))),
    ],
)
def test_second_derivatives(strides, dilations, padding, in_graph):
    """Compares with differences and with forward mode."""
    x, kernel = tf.constant(random(1, 9, 8, 2)), tf.constant(random(3, 3, 2, 2))
    arguments = dict(strides=strides, padding=padding, dilations=dilations)

    def value(x, kernel):
        return tf.reduce_sum(tf.sin(convolve(x, kernel, **arguments)))

    def penalty(x, kernel):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            result = value(x, kernel)
        return tf.add_n(
            [tf.reduce_sum(g**2) for g in tape.gradient(result, [x, kernel])]
        )

    if in_graph:
        value, penalty = tf.function(value), tf.function(penalty)
    for function in (value, penalty):
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            result = function(x, kernel)
        gradients = tape.gradient(result, [x, kernel])
        ways = [tf.constant(random(*v.shape, seed=3)) for v in (x, kernel)]
        step = 1e-5
        expected = (
            function(x + step * ways[0], kernel + step * ways[1])
            - function(x - step * ways[0], kernel - step * ways[1])
        ) / (2 * step)
        actual = sum(
            tf.reduce_sum(g * way)
            for g, way in zip(gradients, ways, strict=True)
        )
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        with tf.autodiff.ForwardAccumulator([x, kernel], ways) as accumulator:
            result = function(x, kernel)
        np.testing.assert_allclose(accumulator.jvp(result), expected, rtol=1e-6)


# Images without pixels, and no image.

EMPTY = [(0, 8, 9), (2, 0, 9), (2, 8, 0), (0, 0, 0), (0, 0, 9)]
EMPTY_CONFIGS = [
    {"padding": "same"},
    {},
    {"padding": "same", "dilation_rate": 2, "strides": 2},
    {"padding": ((2, 0), (1, 3)), "dilation_rate": (3, 2)},
    {"padding": ((4, 3), (5, 4)), "dilation_rate": 2},  # the output has some
    {"dilation_rate": 2, "offset_dilation_rate": 1, "strides": (1, 2)},
]


@pytest.mark.parametrize(
    "how", ["eager", "unknown", "width", "batch", "known", "xla"]
)
@pytest.mark.parametrize("config", EMPTY_CONFIGS, ids=str)
def test_empty(config, how, implementation="native"):
    """Tests that shapes equal the op's, and gradients are zero.

    Only biases have other gradients. The graph is the same for all sizes.
    """
    layer = new("conv2d", implementation=implementation, **config)
    layer.build((None, None, None, 2))
    displace(layer)

    def step(x):
        return value_and_gradients(layer, {"inputs": x}, layer.weights)

    @functools.cache
    def graph(*known):
        specs = [tf.TensorSpec((*known, 2))]
        run = tf.function(step, specs, jit_compile=how == "xla")
        found = operations(run.get_concrete_function())
        assert "Conv2D" in found and not found & CONTROL_FLOW
        return run

    # XLA, and a graph of another shape, are compiled anew each time.
    for size in EMPTY if how in ("eager", "unknown") else EMPTY[:2]:
        run, x = step, tf.zeros((*size, 2))
        if how != "eager":
            unknown = {"unknown": 3, "width": 2, "batch": 1}.get(how, 0)
            run = graph(*[None] * unknown, *size[unknown:])
        output, operands, weights = run(x)
        expected = np.empty(layer.compute_output_shape(x.shape))
        expected[:] = layer.bias
        assert_equal(output, expected, case=size)
        for operand, gradient in [
            (x, operands["inputs"]),
            *zip(layer.weights, weights, strict=True),
        ]:
            zeros = np.zeros(operand.shape)
            if operand is layer.bias:
                assert gradient.shape == zeros.shape
            else:
                assert_equal(gradient, zeros, case=size)


def test_empty_in_stock_ops():
    test_empty(EMPTY_CONFIGS[2], "unknown", "portable")


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize(
    "config", [{}, {"strides": 2}, {"padding": 2, "dilation_rate": 2}], ids=str
)
def test_an_empty_batch_of_a_plain_convolution(config, channels, data_format):
    # The sizes are those of the convolution's inputs, channels included.
    inputs = keras.Input((15, 20, channels))
    x = keras.layers.Conv2D(8, 3, strides=2)(inputs)
    if data_format == "channels_first":
        x = keras.ops.transpose(x, (0, 3, 1, 2))
    layer = DeformableConv2D(6, 3, data_format=data_format, **config)
    model = keras.Model(inputs, layer(x))
    function = tf.function(
        model, input_signature=[tf.TensorSpec((None, 15, 20, channels))]
    )
    empty = function(tf.zeros((0, 15, 20, channels)))
    assert tuple(empty.shape) == (0, *model.output.shape[1:])
    images = random(2, 15, 20, channels).astype("float32")
    np.testing.assert_allclose(function(images), model(images), 0, 1e-6)


@pytest.mark.parametrize("padding", ["valid", ((0, 1), (0, 0))])
@pytest.mark.parametrize("dilation_rate", [1, 2])
def test_a_small_image_is_an_error(dilation_rate, padding):
    """Tests that the op raises the error, whether sizes are known or not."""
    layer = DeformableConv2D(3, 4, padding=padding, dilation_rate=dilation_rate)
    layer.build((None, None, None, 2))
    run = tf.function(
        layer, input_signature=[tf.TensorSpec((None, None, None, 2))]
    )
    errors = (ValueError, tf.errors.InvalidArgumentError)
    for call in (layer, run, tf.function(layer)):
        with pytest.raises(errors, match="padded height to be at least"):
            call(np.zeros((1, 2, 9, 2), "float32"))


def test_a_graph_of_known_sizes_has_nothing_in_vain():
    """Tests that the branch is a convolution, padded only where needed."""
    split = {"Pad", "SpaceToBatchND", "BatchToSpaceND", "Slice"}
    for padding, rate, expected in [
        ("same", 1, set()),
        (((0, 0), (0, 0)), 1, set()),
        ("same", 2, split),
        (((1, 1), (1, 1)), 1, {"Pad"}),
    ]:
        arguments = dict(padding=padding, dilations=(rate, rate))
        run = tf.function(convolve).get_concrete_function(
            tf.TensorSpec((2, 8, 9, 2)),
            tf.TensorSpec((3, 3, 2, 4)),
            strides=(1, 1),
            **arguments,
        )
        found = operations(run) - {"Placeholder", "Const", "Identity", "NoOp"}
        assert found == {"Conv2D", *expected}, arguments


@pytest.mark.parametrize("how", ["native", "portable", "keras"])
def test_no_saved_model_has_branches(how, tmp_path):
    inputs = keras.Input((None, None, 2))
    x = DeformableConv2D(3, 3, padding="same", modulation="sigmoid")(inputs)
    x = DeformableConv2D(3, 3, padding=2, dilation_rate=2, strides=2)(x)
    model = keras.Model(inputs, x)
    for layer in model.layers[1:]:
        displace(layer)
    if how == "keras":
        with tf_deform.implementation("portable"):
            model.export(tmp_path / "model", verbose=False)
    else:
        exported.write(how, model, tmp_path / "model")
    loaded = tf.saved_model.load(tmp_path / "model")
    serve = loaded.signatures["serving_default"]
    assert not operations(serve) & CONTROL_FLOW
    (name,) = serve.structured_input_signature[1]
    for size in [(2, 8, 9), (1, 5, 6), (0, 8, 9)]:
        images = random(*size, 2).astype("float32")
        (y,) = serve(**{name: tf.constant(images)}).values()
        np.testing.assert_allclose(y, model(images), 1e-4, 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"padding": "same"},
        {"padding": "valid", "modulation": "sigmoid", "offset_groups": 2},
        {"padding": ((0, 1), (3, 2)), "strides": 2},
        {"padding": "same", "dilation_rate": 2, "groups": 2},
        {"padding": 3, "dilation_rate": (3, 2), "strides": (1, 2)},
        {"padding": "same", "data_format": "channels_first"},
        {"padding": 2, "dilation_rate": 2, "implementation": "portable"},
    ],
    ids=str,
)
def test_gradients_per_example(config):
    """Tests `tf.vectorized_map` over a tape against single examples."""
    layer = DeformableConv2D(2, 3, **config)
    shape = [None, None, None, None]
    shape[1 if layer.data_format == "channels_first" else 3] = 4
    model = keras.Sequential([keras.Input(shape[1:]), layer])
    displace(layer)
    images = random(3, 4, 9, 8).astype("float32")
    if layer.data_format == "channels_last":
        images = images.transpose(0, 2, 3, 1)

    def gradient(image):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(image[None]) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    together = tf.function(
        lambda images: tf.vectorized_map(gradient, images),
        input_signature=[tf.TensorSpec(shape)],
    )(images)
    for index, image in enumerate(images):
        expected = gradient(tf.constant(image))
        assert all(np.any(value) for value in expected)
        assert_close([x[index] for x in together], expected, 1e-5, case=index)
