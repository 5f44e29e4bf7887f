# SPDX-License-Identifier: Apache-2.0
"""Tests that `DeformableConv2D` is called as `keras.layers.Conv2D` is.

The tests use Conv2D's names, Keras' own tests of Conv2D, subclasses that
override methods meant to be overridden, and Keras' recomputation.
"""

import contextlib
import importlib
import sys
import unittest

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import Tolerance, assert_close, assert_equal
from keras.src import layers, testing
from operands import random

from tf_deform.layers import DeformableConv2D

SHAPE = (None, 8, 9, 6)
both_formats = pytest.mark.parametrize(
    "data_format", ["channels_last", "channels_first"]
)
both_methods = pytest.mark.parametrize(
    "method", ["build", "compute_output_shape"]
)


def laid_out(shape: tuple, data_format: str) -> tuple:
    if data_format == "channels_last":
        return shape
    return (shape[0], shape[3], *shape[1:3])


class KerasCase(testing.TestCase):
    """Counts weights as if the branch's two were not there."""

    def assertLen(self, values, length, msg=None):
        names = [getattr(value, "name", "") for value in values]
        own = [name for name in names if not name.startswith("offset_")]
        super().assertLen(own, length, msg)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
def test_keras_own_tests_of_conv2d(monkeypatch):
    """Runs all; strides with dilation, which Keras refuses, are allowed."""
    monkeypatch.setattr(layers, "Conv2D", DeformableConv2D)
    # The file is loaded anew, because it takes the class when it is loaded.
    name = "keras.src.layers.convolutional.conv_test"
    monkeypatch.delitem(sys.modules, name, raising=False)
    conv_test = importlib.import_module(name)
    suite = unittest.TestSuite()
    for theirs in (conv_test.ConvBasicTest, conv_test.ConvCorrectnessTest):
        case = type("Case", (theirs, KerasCase), dict(vars(KerasCase)))
        for name in unittest.defaultTestLoader.getTestCaseNames(case):
            others = ("1d", "3d", "enable_lora_conv")
            if "2d" in name or not any(other in name for other in others):
                suite.addTest(case(name))
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun >= 20
    failed = {
        test.id().rpartition(".")[2]: text
        for test, text in result.failures + result.errors
    }
    assert failed.pop("test_bad_init_args")
    assert not failed, "\n".join(failed.values())


@both_formats
@pytest.mark.parametrize("kind", [tuple, list, tf.TensorShape])
@pytest.mark.parametrize("name", [None, "input_shape", "inputs_shape"])
def test_shapes_by_every_name_and_of_every_kind(name, kind, data_format):
    shape = kind(laid_out(SHAPE, data_format))

    def answers(cls, name):
        layer = cls(4, 3, strides=2, data_format=data_format)
        results = [
            method(shape) if name is None else method(**{name: shape})
            for method in (layer.compute_output_shape, layer.build)
        ]
        assert layer.built
        return results, layer.kernel.shape, layer.input_spec.axes

    expected = answers(keras.layers.Conv2D, None)
    assert answers(DeformableConv2D, name) == expected


@pytest.mark.parametrize("name", ["input_shape", "inputs_shape"])
def test_a_layer_built_by_name_is_saved_and_loaded(name, tmp_path):
    class Model(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.layer = DeformableConv2D(4, 3)

        def build(self, input_shape):
            self.layer.build(**{name: input_shape})

        def call(self, inputs):
            return self.layer(inputs)

    model, x = Model(), random(2, 8, 9, 6)
    model.build(SHAPE)
    assert model.layer.get_build_config() == {"input_shape": SHAPE}
    model.layer.offset_bias.assign(random(18))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(
        tmp_path / "model.keras", custom_objects={"Model": Model}
    )
    assert_equal(loaded(x), model(x))


def test_build_config_of_given_displacements():
    layer = DeformableConv2D(4, 3)
    layer.build(
        SHAPE, modulator_shape=[None, 6, 7, 9], offset_shape=(None,) * 4
    )
    config = layer.get_build_config()
    assert config == {
        "shapes_dict": {
            "inputs_shape": SHAPE,
            "offset_shape": (None,) * 4,
            "modulator_shape": (None, 6, 7, 9),
        }
    }
    other = DeformableConv2D(4, 3)
    other.build_from_config(config)
    assert other.offset_kernel is None and other.built


@both_methods
@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({}, "Received: None"),
        ({"shape": SHAPE}, "Received: shape"),
        (
            {"input_shape": SHAPE, "inputs_shape": SHAPE},
            "Received: inputs_shape, input_shape",
        ),
        ({"input_shape": SHAPE, "shape": SHAPE}, "input_shape, shape"),
        ({"offset_shape": (None, 6, 7, 18)}, "Received: None"),
    ],
)
def test_shapes_by_wrong_names(method, arguments, received):
    with pytest.raises(TypeError, match=f"`inputs_shape` or .*{received}"):
        getattr(DeformableConv2D(4, 3), method)(**arguments)


@both_methods
@pytest.mark.parametrize("shape", [(8, 9, 6), (None, 2, 8, 9, 6), (6,)])
@both_formats
def test_shapes_of_another_rank(data_format, shape, method):
    axes = laid_out(("batch", "height", "width", "channels"), data_format)
    layer = DeformableConv2D(4, 3, data_format=data_format)
    with pytest.raises(ValueError, match=rf"rank 4 \({', '.join(axes)}\)"):
        getattr(layer, method)(shape)


# Methods that a subclass overrides.


class Standardized:
    """Standardizes weights, as a subclass of Conv2D would."""

    def convolution_op(self, inputs, kernel):
        mean, variance = tf.nn.moments(kernel, (0, 1, 2))
        kernel = (kernel - mean) / tf.sqrt(variance + 1e-5)
        return 2 * super().convolution_op(inputs, kernel)


StandardizedConv2D = type("Plain", (Standardized, keras.layers.Conv2D), {})
StandardizedDeformable = type("Own", (Standardized, DeformableConv2D), {})


@pytest.mark.parametrize("implementation", ["native", "portable"])
@pytest.mark.parametrize("activation", [None, "relu"])
@both_formats
def test_convolution_op_may_be_overridden(
    data_format, activation, implementation
):
    x = random(*laid_out((2, 8, 9, 6), data_format))
    config = dict(data_format=data_format, activation=activation)
    plain = StandardizedConv2D(4, 3, bias_initializer="normal", **config)
    layer = StandardizedDeformable(
        4, 3, implementation=implementation, **config
    )
    expected = plain(x)
    layer.build(x.shape)
    layer.set_weights(plain.get_weights())
    assert_close(layer(x), expected, 1e-5)
    # With displacements the override still changes the kernel, and is trained.
    layer.offset_bias.assign(random(18))
    with tf.GradientTape() as tape:
        y = layer(x)
    assert np.abs(y - expected).max() > 0.1
    gradients = tape.gradient(y, layer.trainable_weights)
    assert all(np.any(gradient) for gradient in gradients)


def test_convolution_op_of_given_displacements():
    class Halved(DeformableConv2D):
        def convolution_op(self, inputs, kernel, offset=None, modulator=None):
            return super().convolution_op(inputs, kernel / 2, offset, modulator)

    x, offset = random(2, 8, 9, 6), random(2, 6, 7, 18, seed=1)
    modulator = random(2, 6, 7, 9, seed=2)
    layer, halved = DeformableConv2D(4, 3), Halved(4, 3)
    expected = layer(x, offset, modulator)
    halved.build(x.shape, offset.shape, modulator.shape)
    halved.set_weights(layer.get_weights())
    assert_close(2 * halved(x, offset, modulator), expected, 1e-5)
    # Conv2D's signature has no such arguments, and Python says so.
    short = StandardizedDeformable(4, 3)
    with pytest.raises(TypeError, match="convolution_op"):
        short(x, offset)


# Recomputation.

REMAT = Tolerance(of_each=1e-5)


def test_remat_scope_and_keywords():
    """Tests keywords: Keras' own recomputation takes none in a graph."""
    arrays = [random(4, 6, 5, 2), random(4, 6, 5, 18), random(4, 6, 5, 9)]
    targets = random(4, 6, 5, 3, seed=1)

    def losses(scope):
        keras.utils.set_random_seed(0)
        inputs, offset, modulator = (
            keras.Input((None, None, array.shape[-1])) for array in arrays
        )
        with scope:
            layer = DeformableConv2D(
                3, 3, padding="same", activation="tanh", name="deform"
            )
            own = DeformableConv2D(3, 3, padding="same")
            outputs = layer(inputs, modulator=modulator, offset=offset)
            outputs = own(inputs=outputs)
        model = keras.Model([inputs, offset, modulator], outputs)
        model.compile("sgd", "mse")
        return model.fit(arrays, targets, epochs=3, verbose=0).history["loss"]

    expected = losses(contextlib.nullcontext())
    assert expected[-1] < expected[0]
    for scope in [
        {"mode": "full"},
        {"mode": "activations"},
        {"mode": "larger_than", "output_size_threshold": 1},
        {"mode": "list_of_layers", "layer_names": ["deform"]},
    ]:
        actual = losses(keras.RematScope(**scope))
        assert_close(actual, expected, REMAT, case=scope)
