# SPDX-License-Identifier: Apache-2.0
"""Tests that all layers give the same in channels first, up to a transpose."""

import copy
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from exported import CLOSE, FORMATS, run, write
from layer_cases import (
    CALLS,
    EVERY_CALL,
    KINDS,
    POOLS,
    SOURCES,
    channels_first,
    displace,
    displaced,
    fit,
    model_of,
    new,
    output_shape,
    own_call,
    regions,
)
from operands import random

from tf_deform.layers import DeformableROIAlign

CONVOLUTIONS = [
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
EVERY_LAYER = EVERY_CALL + [
    ("conv2d", "own", {**config, "modulation": modulation})
    for config in CONVOLUTIONS
    for modulation in (None, "sigmoid", "2sigmoid")
]


@pytest.fixture(autouse=True)
def keras_setting():
    yield
    keras.config.set_image_data_format("channels_last")


def first_of(shape: tuple) -> tuple:
    """Returns the shape in channels first."""
    return (shape[0], shape[3], *shape[1:3])


def pair_of_layers(kind: str, source: str, **config) -> tuple:
    """Returns a layer and its call in each format, with the same weights."""
    call = CALLS[source](kind)
    last = new(kind, data_format="channels_last", **config)
    last(**call)
    if source == "own":
        displace(last)
    first = new(kind, data_format="channels_first", **config)
    first(**channels_first(call))
    first.set_weights(last.get_weights())
    return last, call, first, channels_first(call)


@pytest.mark.parametrize(("kind", "source", "config"), EVERY_LAYER, ids=str)
def test_the_same_with_the_same_weights(kind, source, config):
    """Compares both formats, also in a graph that does not know its sizes."""
    last, call, first, first_call = pair_of_layers(kind, source, **config)
    expected = np.moveaxis(last(**call), 3, 1)
    assert_equal(first(**first_call), expected)
    channels = call["inputs"].shape[-1]
    if kind != "conv2d" and source == "own":
        channels = None  # The branch's weights tell the number of channels.
    function = tf.function(
        lambda *values: first(**dict(zip(call, values, strict=True))),
        input_signature=[
            tf.TensorSpec((None, channels, None, None))
            if name == "inputs"
            else tf.TensorSpec(None)
            for name in call
        ],
    )
    tolerance = 1e-6 if kind == "conv2d" else 0
    assert_close(function(*first_call.values()), expected, tolerance)


@pytest.mark.parametrize(("kind", "source", "config"), EVERY_CALL, ids=str)
def test_gradients_are_the_same(kind, source, config):
    last, call, first, first_call = pair_of_layers(kind, source, **config)
    target = random(*output_shape(kind))
    results = []
    for layer, values, weight in [
        (last, call, target),
        (first, first_call, np.moveaxis(target, 3, 1)),
    ]:
        values = {name: tf.constant(value) for name, value in values.items()}
        with tf.GradientTape() as tape:
            tape.watch(list(values.values()))
            loss = tf.reduce_sum(layer(**values) * weight)
        values.pop("rois", None)
        weights = [weight.value for weight in layer.weights]
        results.append(tape.gradient(loss, [values, weights]))
    (maps, weights), actual = results
    for gradient in (*maps.values(), *weights):
        assert np.any(gradient)
    assert_close(actual, [channels_first(maps), weights], 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_keras_setting_counts_when_a_layer_is_made(kind):
    call, expected = (
        channels_first(own_call(kind)),
        first_of(output_shape(kind)),
    )
    assert new(kind).data_format == "channels_last"
    keras.config.set_image_data_format("channels_first")
    layer = new(kind)
    assert layer.data_format == "channels_first"
    assert layer.get_config()["data_format"] == "channels_first"
    for name in ("channels_last", "Channels_Last"):
        assert new(kind, data_format=name).data_format == "channels_last"
    assert layer(**call).shape == expected
    keras.config.set_image_data_format("channels_last")
    clone = type(layer).from_config(layer.get_config())
    assert clone.data_format == "channels_first"
    assert clone(**call).shape == expected


@pytest.mark.parametrize("kind", POOLS)
def test_what_was_saved_without_a_format_is_in_channels_last(kind):
    """Tests that Keras' setting at the time of loading has no effect."""
    layer, call = displaced(kind), own_call(kind)
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    del stored["config"]["data_format"]
    keras.config.set_image_data_format("channels_first")
    clone = keras.saving.deserialize_keras_object(copy.deepcopy(stored))
    assert clone.data_format == "channels_last"
    clone.set_weights(layer.get_weights())
    assert_equal(clone(**call), layer(**call))


def test_a_class_that_fixes_arguments_and_has_a_config_of_its_own():
    """Tests that nothing is added to a config that another class wrote."""

    class Head(DeformableROIAlign):
        def __init__(self, units=(), name=None):
            super().__init__(3, 0.25, units=units, name=name)

        def get_config(self):
            return {"units": self.units, "name": self.name}

    clone = Head.from_config(Head((4,), name="head").get_config())
    assert clone.units == (4,) and clone.data_format == "channels_last"


@pytest.mark.parametrize(
    ("kind", "source"), [*SOURCES, ("pool", "plain"), ("align", "plain")]
)
def test_shapes(kind, source):
    """Tests shapes before a layer is built, as far as sizes are known."""
    call = channels_first(CALLS[source](kind))
    layer = new(kind, data_format="channels_first")
    shapes = {f"{name}_shape": value.shape for name, value in call.items()}
    expected = first_of(output_shape(kind))
    assert layer.compute_output_shape(**shapes) == expected
    unknown = {
        name: (None, value.shape[1], None, None)
        if name in ("inputs", "trans_inputs")
        else (None, *value.shape[1:])
        for name, value in call.items()
    }
    expected = (None, *expected[1:])
    if kind == "conv2d" and source == "own":
        expected = (None, 4, None, None)
    symbols = {k: keras.KerasTensor(v) for k, v in unknown.items()}
    assert layer(**symbols).shape == expected
    as_tensor_shapes = {
        f"{name}_shape": tf.TensorShape(v) for name, v in unknown.items()
    }
    assert layer.compute_output_shape(**as_tensor_shapes) == expected


@pytest.mark.parametrize("units", [(), (8, 4)])
def test_weights_do_not_know_the_format(units):
    """Tests hidden layers too, whose weights have rows of pooled features."""
    last, _, first, _ = pair_of_layers("align", "own", units=units)
    shapes = [
        [(v.name, tuple(v.shape)) for v in layer.weights]
        for layer in (last, first)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_and_loaded(kind, tmp_path):
    """Tests loading also where Keras' setting has changed by then."""
    call = channels_first(own_call(kind))
    layer = new(kind, data_format="channels_first")
    model = model_of(layer, call)
    model.compile("sgd", "mse")
    before = layer.get_weights()
    fit(model, call, random(*first_of(output_shape(kind))), steps=3)
    assert np.any(layer.get_weights()[-1] != before[-1])
    expected = model(call)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_equal(loaded(call), expected)
    last = new(kind, data_format="channels_last")
    other = model_of(last, own_call(kind))
    other.load_weights(tmp_path / "model.weights.h5")
    assert_equal(np.moveaxis(other(own_call(kind)), 3, 1), expected)


@pytest.mark.parametrize("target", FORMATS)
def test_exported(target, tmp_path):
    """Exports all layers in channels first over the same maps."""
    inputs = keras.Input((6, 11, 12), name="inputs")
    rois = keras.Input((5,), name="rois")
    first = dict(data_format="channels_first")
    convolved = new("conv2d", filters=6, padding="same", **first)(inputs)
    wide = keras.layers.Concatenate(1)([convolved, *[inputs] * 5])
    outputs = [
        new("psroi", **first)(wide, rois, trans_inputs=inputs),
        new("pool", **first)(inputs, rois),
        new("align", **first)(convolved, rois),
    ]
    model = keras.Model(
        [inputs, rois], keras.layers.Concatenate(1, name="all")(outputs)
    )
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(0, 0.1, weight.shape))
    call = {"inputs": random(2, 6, 11, 12), "rois": regions(7)}
    expected = model(call).numpy()
    assert expected.shape == (7, 18, 3, 4)
    # Each writer compares its file with the model as well.
    write(target, model, tmp_path / "model", sample=call)
    (actual,) = run(target, tmp_path / "model", call).values()
    assert_close(actual, expected, CLOSE)
