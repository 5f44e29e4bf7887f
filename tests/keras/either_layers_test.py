# SPDX-License-Identifier: Apache-2.0
"""Tests what all layers promise on Keras 2 and on Keras 3.

The names of tests and helpers here are those that both have. The layers' own
tests, in `tests/layers`, say more, on Keras 3.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import (
    BRANCHES,
    EVERY_CALL,
    FLOAT_POLICIES,
    KINDS,
    SOURCES,
    built,
    by_hand,
    conv2d_branch,
    displaced,
    fit,
    in_its_type,
    model_of,
    new,
    output_shape,
    own_call,
    pool_branch,
    pool_factors,
    tensors,
    value_and_gradients,
)
from operands import random
from tolerances import FORWARD

from tf_deform import _keras, _loader
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D

every_kind = pytest.mark.parametrize("kind", KINDS)
every_source = pytest.mark.parametrize("kind,source", SOURCES)


def expected(layer, call):
    """Returns the output by loops in NumPy, from the layer's weights."""
    operands = dict(call)
    inputs = operands.pop("inputs")
    if isinstance(layer, DeformableConv2D):
        if not operands:
            operands = dict(enumerate(conv2d_branch(layer, inputs)))
        return by_hand(layer, inputs, *operands.values())
    if layer.offset_kernel is not None:
        maps = call.get("trans_inputs")
        operands = {"rois": call["rois"]}
        operands["own"] = pool_branch(layer, inputs, call["rois"], maps)
    output = by_hand(layer, inputs, *operands.values())
    if "own" in operands:
        output = output * pool_factors(layer, inputs, call["rois"])
    return output


@pytest.mark.parametrize("kind,source,config", EVERY_CALL)
def test_outputs(kind, source, config):
    layer, call = built(kind, source, **config)
    assert_close(layer(**call), expected(layer, call), FORWARD["float32"])


@every_source
def test_models_of_any_size(kind, source):
    """Tests a functional model, and the same layer in channels first."""
    layer, call = built(kind, source)
    expected = layer(**call)
    shapes = {name: np.shape(value) for name, value in call.items()}
    inputs = {
        name: keras.Input((None, None, shape[3]) if len(shape) == 4 else (5,))
        for name, shape in shapes.items()
    }
    model = keras.Model(inputs, layer(**inputs))
    assert model.output_shape[0] is None
    assert_equal(np.asarray(model(call)), np.asarray(expected))
    other, call = built(kind, source, data_format="channels_first")
    other.set_weights(layer.get_weights())
    assert_close(np.moveaxis(other(**call), 1, 3), expected, 1e-5)


@every_source
def test_shapes(kind, source):
    """Tests `compute_output_shape` and symbolic calls, in both formats."""
    for data_format in ("channels_last", "channels_first"):
        layer, call = built(kind, source, data_format=data_format)
        shapes = {f"{name}_shape": np.shape(x) for name, x in call.items()}
        wanted = np.shape(layer(**call))
        shape = layer.compute_output_shape(**shapes)
        assert tuple(shape) == wanted
        plain = keras.layers.ReLU()
        assert type(shape) is type(plain.compute_output_shape(shape))
        symbols = tensors({name: np.shape(x) for name, x in call.items()})
        assert tuple(new_like(layer)(**symbols).shape) == wanted


def new_like(layer):
    return type(layer).from_config(layer.get_config())


@pytest.mark.parametrize("kind,config", BRANCHES)
def test_training(kind, config):
    """Tests that every weight of a branch that is not zero learns."""
    layer, call = built(kind, "own", **config)
    target = random(*np.shape(layer(**call)))
    model = model_of(layer, call)
    model.compile("sgd", "mse")
    before = layer.get_weights()
    fit(model, call, target)
    after = layer.get_weights()
    for weight, *values in zip(layer.weights, before, after):
        assert np.any(values[0] != values[1]), weight.name


@every_kind
def test_a_frozen_layer(kind):
    """Tests that a frozen layer keeps its weights, and costs no gradient."""
    layer, call = built(kind, "own")
    before = layer.get_weights()
    model = model_of(layer, call)
    layer.trainable = False
    assert model.trainable_weights == []
    *_, gradients = value_and_gradients(layer, call, layer.weights)
    # The branch of a convolution is frozen, but not taken out of the gradient.
    frozen = gradients[:1] if kind == "conv2d" else gradients
    assert frozen and all(gradient is None for gradient in frozen)
    model.compile("sgd", "mse")
    fit(model, call, random(*output_shape(kind)))
    assert_equal(layer.get_weights(), before)


@every_kind
@pytest.mark.parametrize("policy", FLOAT_POLICIES)
def test_dtype_policies(kind, policy):
    """Tests types, and that positions are computed in float32 or float64."""
    keras.mixed_precision.set_global_policy(policy)
    layer, call = built(kind, "own")
    compute = "float64" if policy == "float64" else policy.split("_")[-1]
    for weight in layer.weights:
        wanted = "float64" if policy == "float64" else "float32"
        assert _keras.tf_variable(weight).dtype == wanted
    output = layer(**call)
    assert output.dtype == compute
    wanted, tolerance = in_its_type(layer, call)
    assert_close(output, wanted, tolerance)


@every_kind
def test_given_offsets_are_not_cast(kind):
    """Tests offsets that are between two pixels in 16 bits, but not in 32."""
    layer, call = built(kind, "given", dtype="mixed_bfloat16")
    given = KINDS[kind].given
    call["inputs"][:] = (-1) ** np.arange(call["inputs"].shape[2])[:, None]
    call[given][:] = 0.5 + 2.0**-10
    rounded = {**call, given: np.full_like(call[given], 0.5)}
    model = model_of(layer, call)
    for run in (lambda call: layer(**call), model):
        assert np.any(np.asarray(run(call)) != np.asarray(run(rounded)))


@every_kind
def test_config(kind):
    """Tests config by JSON, and a clone of a model."""
    layer, call = built(kind, "own")
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    clone = keras.saving.deserialize_keras_object(stored)
    assert clone.get_config() == layer.get_config()
    assert stored["registered_name"] == f"tf_deform>{type(layer).__name__}"
    model = model_of(layer, call)
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    assert_equal(np.asarray(copy(call)), np.asarray(model(call)))


def test_weights_of_a_plain_convolution():
    plain = keras.layers.Conv2D(4, 3)
    layer = DeformableConv2D(4, 3)
    x = random(2, 8, 9, 6)
    expected, _ = plain(x), layer(x)
    layer.set_weights(plain.get_weights())
    assert_close(layer(x), expected, FORWARD["float32"])


def test_low_rank_adapters():
    if _keras.KERAS_2:
        with pytest.raises(TypeError):
            DeformableConv2D(4, 3, lora_rank=2)
        return
    layer = DeformableConv2D(4, 3, lora_rank=2)
    layer(random(2, 8, 9, 6))
    names = {_keras.name_of(weight) for weight in layer.trainable_weights}
    assert {"lora_kernel_a", "offset_kernel"} <= names


@every_kind
def test_jit(kind):
    assert new(kind).supports_jit == _loader.supports_jit()


@every_kind
def test_errors(kind):
    """Tests that errors name the arguments of the layer's call."""
    layer, call = displaced(kind), own_call(kind)
    with pytest.raises(ValueError, match="Expected `inputs` to have rank 4"):
        layer(**{**call, "inputs": call["inputs"][0]})
    with pytest.raises(TypeError, match="Expected `inputs` to be passed"):
        layer()
    given = KINDS[kind].given
    call.pop("trans_inputs", None)
    call[given] = random(7, 3, 4, 5)
    with pytest.raises(
        (ValueError, tf.errors.InvalidArgumentError), match=f"`{given}`"
    ):
        layer(**call)


def test_wrapped_in_time_distributed():
    """Tests a wrapper that builds the layer itself."""
    layer = new("conv2d")
    x = random(2, 3, 8, 9, 6)
    output = keras.layers.TimeDistributed(layer)(x)
    assert_close(np.asarray(output)[:, 1], layer(x[:, 1]), 1e-5)
