# SPDX-License-Identifier: Apache-2.0
"""Tests where in the image a layer's cells are said to lie, by gradients.

The image's pixels that one cell depends on have the cell's place as their
middle.
"""

import numpy as np
import pytest
import tensorflow as tf
from surgery_models import MAKERS, SIZE, filled

from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D
from tf_deform.visualization import _walk

layers = keras.layers


def middle(model, layer, size, cell):
    """Returns the middle of the pixels that a layer's cell depends on."""
    probe = keras.Model(model.input, layer.output)
    # Pooling by the maximum reads one pixel: several images show the others.
    rng = np.random.default_rng(0)
    channels = model.input.shape[-1]
    images = tf.constant(rng.normal(size=(4, *size, channels)), "float32")
    with tf.GradientTape() as tape:
        tape.watch(images)
        outputs = probe(images, training=False)[:, cell[0], cell[1]]
    gradient = np.array(tape.gradient(outputs, images))
    rows, columns = (
        np.flatnonzero(abs(gradient).sum(axes))
        for axes in ((0, 2, 3), (0, 1, 3))
    )
    assert rows[0] > 0 and columns[0] > 0, "the image is too small for the test"
    assert rows[-1] < size[0] - 1 and columns[-1] < size[1] - 1
    return [(rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2]


def check(model, size, names=None, tolerance=1e-9):
    images = tf.zeros((1, *size, model.input.shape[-1]))
    calls = _walk.walk(model, images, names or ".")
    for call in calls:
        cell = np.array(call.size) // 2
        expected = middle(model, call.layer, size, cell)
        found = call.outputs.place(cell)
        np.testing.assert_allclose(
            found, expected, atol=tolerance, err_msg=call.name
        )
    return calls


def before(kind, x):
    """Adds layers that change the size of a map."""
    return {
        "pad": lambda x: layers.ZeroPadding2D(((2, 1), (0, 3)))(x),
        "crop": lambda x: layers.Cropping2D(((2, 1), (0, 3)))(x),
        "max": lambda x: layers.MaxPooling2D(3, 2, "same")(x),
        "average": lambda x: layers.AveragePooling2D((2, 3), (1, 2))(x),
        "one": lambda x: layers.Conv2D(2, 1, (3, 2))(x),
        "valid": lambda x: layers.Conv2D(2, (2, 5), (2, 1))(x),
        "dilated": lambda x: layers.Conv2D(2, 3, dilation_rate=(3, 2))(x),
        "depthwise": lambda x: layers.DepthwiseConv2D(3, 2, "same")(x),
        "separable": lambda x: layers.SeparableConv2D(2, 3, (2, 2))(x),
        "given": lambda x: DeformableConv2D(2, 3, 2, ((3, 0), (1, 1)))(x),
        "side": lambda x: DeformableConv2D(2, 3, 1, ((2, 0), (0, 2)))(x),
    }[kind](x)


KINDS = ["pad", "crop", "max", "average", "one", "valid", "dilated"]
KINDS += ["depthwise", "separable", "given", "side"]


@pytest.mark.parametrize("size", [(60, 61), (61, 60)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind, size):
    image = keras.Input((*size, 2))
    x = layers.Conv2D(3, 3, 2, padding="same")(image)
    x = before(kind, layers.BatchNormalization()(x))
    x = before("pad", x)
    model = keras.Model(image, layers.Conv2D(2, 3, name="last")(x))
    assert len(check(model, size)) >= 2


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_enlarged_maps(interpolation):
    """Tests that cells of an enlarged map share the places of the pixels."""
    image = keras.Input((24, 24, 2))
    x = layers.AveragePooling2D(2)(image)
    x = layers.UpSampling2D(4, interpolation=interpolation)(x)
    x = layers.Conv2D(1, 1, name="last")(x)
    model = keras.Model(image, x)
    (call,) = _walk.walk(model, tf.zeros((1, 24, 24, 2)), "last")
    np.testing.assert_allclose(call.outputs.step, 0.5, atol=1e-6)
    np.testing.assert_allclose(call.outputs.start, -0.25, atol=1e-5)


def test_transposed_convolution():
    image = keras.Input((24, 24, 2))
    # A kernel of ones has its weight in its middle.
    x = layers.Conv2DTranspose(
        2, 4, 2, padding="same", kernel_initializer="ones"
    )(image)
    model = keras.Model(image, layers.Conv2D(1, 3, name="last")(x))
    (call,) = _walk.walk(model, tf.zeros((1, 24, 24, 2)), "last")
    np.testing.assert_allclose(call.outputs.step, 0.5, atol=1e-6)
    np.testing.assert_allclose(call.outputs.start, 0.25, atol=1e-6)


def test_resnet():
    """Tests padding layers, pooling, and strides by 1x1 convolutions."""
    model = keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(448, 416, 3)
    )
    names = "^(conv1_conv|conv._block1_2_conv|conv3_block3_2_conv)$"
    calls = check(model, (448, 416), names, 1e-6)
    assert len(calls) == 6
    steps = [call.outputs.step[0] for call in calls]
    np.testing.assert_allclose(steps, [2, 4, 8, 8, 16, 32])
    previous = [call.previous for call in calls]
    assert previous == [(), (0,), (1,), (2,), (3,), (4,)]


@pytest.mark.parametrize("make", MAKERS)
def test_models_of_every_kind(make):
    """Tests nested, subclassed and shared layers, and pyramids."""
    calls = _walk.walk(filled(make), tf.zeros((2, *SIZE)), ".")
    for call in calls:
        assert call.locations.shape[0] == 2
        middle = call.outputs.place((np.array(call.size) - 1) / 2)
        # With "same" and a stride, TensorFlow pads at the end alone.
        away = abs(middle - (15.5, 19.5))
        assert (away < call.outputs.step).all(), call.name
    names = [call.name for call in calls]
    assert len(set(names)) == len(names)
    if make.__name__ == "make_shared":
        assert names[2] == f"{names[1]} (2)"
    if make.__name__ == "make_pyramid":
        by_name = dict(zip(names, calls))
        heads = [by_name[f"shared_head{x}"] for x in ("", " (2)")]
        # The second comes after the first, and is not made of it.
        assert {names[i] for call in heads for i in call.previous} <= {
            "lateral",
            "lateral_of_c4",
        }


def joined(image, join):
    """Adds parallel convolutions, and one that reads both."""
    x = layers.Conv2D(2, 3, 2, padding="same", name="stem")(image)
    one = layers.Conv2D(2, 3, padding="same", name="one")(x)
    two = layers.Conv2D(2, (1, 5), padding="same", name="two")(x)
    plain = layers.ReLU()(x)
    return layers.Conv2D(2, 3, name="last")(join(one, two, plain))


@pytest.mark.parametrize("kind", ["Concatenate", "Add", "Maximum"])
def test_all_parallel_branches_are_followed(kind):
    image = keras.Input((32, 40, 3))
    x = joined(image, lambda *x: getattr(layers, kind)()(list(x)))
    calls = _walk.walk(keras.Model(image, x), tf.zeros((1, 32, 40, 3)), ".")
    assert [call.name.split("/")[-1] for call in calls] == [
        *("stem", "one", "two", "last")
    ]
    # The stem comes before both, so that a way straight to it adds nothing.
    assert [call.previous for call in calls] == [(), (0,), (0,), (1, 2)]


class Residual(layers.Layer):
    """Adds what its convolution makes, by an op that is no layer."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Conv2D(2, 3, padding="same", name="inner")

    def build(self, shape):
        self.inner.build(shape)
        self.built = True

    def call(self, x):
        return x + self.inner(x)

    def compute_output_shape(self, shape):
        return shape


def test_what_ops_join_is_followed():
    image = keras.Input((32, 40, 3))
    x = layers.Conv2D(2, 3, 2, padding="same", name="stem")(image)
    x = layers.Conv2D(2, 3, name="last")(Residual()(x))
    calls = _walk.walk(keras.Model(image, x), tf.zeros((1, 32, 40, 3)), ".")
    assert [call.previous for call in calls] == [(), (0,), (1,)]
