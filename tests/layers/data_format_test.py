# SPDX-License-Identifier: Apache-2.0
"""Tests that all layers give the same in channels first, up to a transpose.

Shapes of outputs are tested in both formats.
"""

import copy
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import (
    CALLS,
    CONVOLUTIONS,
    EVERY_CALL,
    KINDS,
    MODULATIONS,
    POOLS,
    SOURCES,
    built,
    channels_first,
    displaced,
    fit,
    model_of,
    new,
    output_shape,
    own_call,
    signature_of,
    tensors,
    value_and_gradients,
)
from operands import random

from tf_deform.layers import DeformableROIAlign

EVERY_LAYER = EVERY_CALL + [
    ("conv2d", "own", {**config, "modulation": modulation})
    for config in CONVOLUTIONS
    for modulation in MODULATIONS
]


@pytest.fixture(autouse=True)
def keras_setting():
    yield
    keras.config.set_image_data_format("channels_last")


def first_of(shape: tuple) -> tuple:
    """Returns the shape in channels first, if it is one of maps."""
    return (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape


@pytest.mark.parametrize(("kind", "source", "config"), EVERY_LAYER, ids=str)
def test_the_same_with_the_same_weights(kind, source, config):
    """Compares outputs and gradients, also of a graph that knows no sizes."""
    last, call = built(kind, source, data_format="channels_last", **config)
    first, first_call = built(
        kind, source, data_format="channels_first", **config
    )
    first.set_weights(last.get_weights())
    target = random(*last(**call).shape)
    first_target = np.moveaxis(target, 3, 1)
    expected, *gradients = value_and_gradients(last, call, last.weights, target)
    expected = np.moveaxis(expected, 3, 1)
    for gradient in (*gradients[0].values(), *gradients[1]):
        assert gradient is gradients[0].get("rois", 0) or np.any(gradient)
    gradients[0] = channels_first(gradients[0])
    output, *actual = value_and_gradients(
        first, first_call, first.weights, first_target
    )
    assert_equal(output, expected)
    assert_close(actual, gradients, 1e-6, name="gradients")
    specs = signature_of(first, first_call, "nothing known")
    has_gradients = (kind, source, config) in EVERY_CALL

    @tf.function(input_signature=specs)
    def run(*values):
        operands = dict(zip(call, values, strict=True))
        if not has_gradients:
            return first(**operands), *gradients
        return value_and_gradients(first, operands, first.weights, first_target)

    output, *actual = run(*first_call.values())
    assert_close(output, expected, 1e-6 if kind == "conv2d" else 0)
    assert_close(actual, gradients, 1e-6, name="gradients of the graph")


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


def _shapes() -> list[tuple]:
    """Lists layers, shapes of calls, and of outputs as far as it is known."""
    rows = [
        ("conv2d", config, {"inputs": (*sizes, 6)}, (*expected, 4))
        for sizes, config, expected in [
            ((2, 8, 9), {}, (2, 6, 7)),
            ((None, 8, 9), {}, (None, 6, 7)),
            ((None, None, 9), {"padding": "same"}, (None, None, 9)),
            ((None, None, None), {"strides": 2}, (None, None, None)),
            ((2, 8, 9), {"strides": 2, "padding": "same"}, (2, 4, 5)),
            ((2, 8, 9), {"strides": 2, "dilation_rate": 2}, (2, 2, 3)),
            ((2, 8, 9), {"padding": 1}, (2, 8, 9)),
            ((2, 8, None), {"padding": (2, 1)}, (2, 10, None)),
            ((2, 8, 9), {"padding": ((0, 1), (3, 2))}, (2, 7, 12)),
        ]
    ]
    for maps, rois, count in [
        ((None, None, None), (None, 5), None),
        ((None, None, None), (7, 5), 7),
        ((2, 8, None), (None, None), None),
        ((0, None, 9), (0, 5), 0),
        ((None, 0, 9), (3, None), 3),
    ]:
        for kind in POOLS:
            call = {"inputs": (*maps, KINDS[kind].channels), "rois": rois}
            rows.append((kind, {}, call, (count, 3, 4, 6)))
        call = {**call, "inputs": (*maps, 36)}
        call["trans_inputs"] = (None, None, None, 3)
        rows.append(("psroi", {}, call, (count, 3, 4, 6)))
    for kind, source in [*SOURCES, ("pool", "plain"), ("align", "plain")]:
        call = {k: v.shape for k, v in CALLS[source](kind).items()}
        _, *size, channels = expected = output_shape(kind)
        rows.append((kind, {}, call, expected))
        # Nothing tells the number of images or regions.
        unknown = {k: (None, *v[1:]) for k, v in call.items()}
        rows.append((kind, {}, unknown, (None, *size, channels)))
        for name in unknown.keys() & {"inputs", "trans_inputs"}:
            unknown = {**unknown, name: (None, None, None, call[name][3])}
        if (kind, source) == ("conv2d", "own"):
            size = (None, None)
        rows.append((kind, {}, unknown, (None, *size, channels)))
    return rows


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("kind", "config", "call", "expected"), _shapes())
def test_shapes(kind, config, call, expected, data_format):
    """Tests shapes before a layer is built, and of its outputs."""
    layer = new(kind, data_format=data_format, **config)
    if data_format == "channels_first":
        call = {name: first_of(shape) for name, shape in call.items()}
        expected = first_of(expected)
    for form in (tuple, tf.TensorShape):
        shapes = {f"{name}_shape": form(shape) for name, shape in call.items()}
        assert layer.compute_output_shape(**shapes) == expected
    assert layer(**tensors(call)).shape == expected
    if not any(None in shape for shape in call.values()):
        zeros = {name: np.zeros(shape) for name, shape in call.items()}
        assert layer(**zeros).shape == expected


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
