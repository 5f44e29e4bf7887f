# SPDX-License-Identifier: Apache-2.0
"""The layers that pool regions, in channels first: as in channels last."""

import copy
import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from roi_layers_test import (
    EVERY_BRANCH,
    KINDS,
    assert_close,
    displaced,
    fit,
    given_operands,
    model_of,
    new,
    operands,
    plain_operands,
    random,
    regions,
)

from tf_deform import export
from tf_deform.layers import DeformableROIAlign

CALLS = {"own": operands, "given": given_operands, "plain": plain_operands}
EVERY_CALL = [
    *[(kind, "own", config) for kind, config in EVERY_BRANCH],
    *[(kind, "given", {}) for kind in KINDS],
    ("psroi", "plain", {}),
]


@pytest.fixture(autouse=True)
def keras_setting():
    yield
    keras.config.set_image_data_format("channels_last")


def channels_first(values: dict) -> dict:
    """Maps laid out in channels first, whatever there is besides as it is."""
    return {
        name: np.moveaxis(value, 3, 1) if np.ndim(value) == 4 else value
        for name, value in values.items()
    }


def pair_of_layers(kind: str, source: str, **config) -> tuple:
    """One in each format, with the same weights, and their calls."""
    call = CALLS[source](kind)
    if source == "own":
        last = displaced(kind, data_format="channels_last", **config)
    else:
        last = new(kind, data_format="channels_last", **config)
        last(**call)
    first = new(kind, data_format="channels_first", **config)
    first(**channels_first(call))
    first.set_weights(last.get_weights())
    return last, call, first, channels_first(call)


@pytest.mark.parametrize(("kind", "source", "config"), EVERY_CALL, ids=str)
def test_the_same_with_the_same_weights(kind, source, config):
    """Also in a graph that does not know its sizes."""
    last, call, first, first_call = pair_of_layers(kind, source, **config)
    expected = np.moveaxis(last(**call), 3, 1)
    assert expected.shape == (7, 6, 3, 4)
    np.testing.assert_array_equal(first(**first_call), expected)
    channels = None if source == "own" else 36 if kind == "psroi" else 6
    function = tf.function(
        lambda *values: first(**dict(zip(call, values, strict=True))),
        input_signature=[
            tf.TensorSpec((None, channels, None, None))
            if name == "inputs"
            else tf.TensorSpec(None)
            for name in call
        ],
    )
    np.testing.assert_array_equal(function(*first_call.values()), expected)


@pytest.mark.parametrize(("kind", "source", "config"), EVERY_CALL, ids=str)
def test_gradients_are_the_same(kind, source, config):
    results = []
    *pairs, target = *pair_of_layers(kind, source, **config), random(7, 3, 4, 6)
    for index in (0, 2):
        layer, call = pairs[index : index + 2]
        call = {name: tf.constant(value) for name, value in call.items()}
        weight = np.moveaxis(target, 3, 1) if index else target
        with tf.GradientTape() as tape:
            tape.watch(list(call.values()))
            loss = tf.reduce_sum(layer(**call) * weight)
        results.append(
            tape.gradient(
                loss,
                [
                    {k: v for k, v in call.items() if k != "rois"},
                    [weight.value for weight in layer.weights],
                ],
            )
        )
    (maps, weights), (first_maps, first_weights) = results
    assert len(maps) == (1 if kind != "psroi" and source == "own" else 2) or (
        source == "plain"
    )
    for name, gradient in channels_first(maps).items():
        assert np.any(gradient)
        assert_close(first_maps[name], gradient, 1e-6)
    for gradient, other in zip(weights, first_weights, strict=True):
        assert np.any(gradient)
        assert_close(other, gradient, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_keras_setting_counts_when_a_layer_is_made(kind):
    call = operands(kind)
    assert new(kind).data_format == "channels_last"
    keras.config.set_image_data_format("channels_first")
    layer = new(kind)
    assert layer.data_format == "channels_first"
    assert layer.get_config()["data_format"] == "channels_first"
    assert new(kind, data_format="channels_last").data_format == "channels_last"
    assert new(kind, data_format="Channels_Last").data_format == "channels_last"
    assert layer(**channels_first(call)).shape == (7, 6, 3, 4)
    keras.config.set_image_data_format("channels_last")
    clone = type(layer).from_config(layer.get_config())
    assert clone.data_format == "channels_first"
    assert clone(**channels_first(call)).shape == (7, 6, 3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_without_a_format_is_in_channels_last(kind, tmp_path):
    """Whatever Keras' setting is where it is loaded."""
    layer, call = displaced(kind), operands(kind)
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    del stored["config"]["data_format"]
    keras.config.set_image_data_format("channels_first")
    clone = keras.saving.deserialize_keras_object(copy.deepcopy(stored))
    assert clone.data_format == "channels_last"
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(**call), layer(**call))


def test_a_class_that_fixes_arguments_and_has_a_config_of_its_own():
    """Nothing is added to a config that this package did not write."""

    class Head(DeformableROIAlign):
        def __init__(self, units=(), name=None):
            super().__init__(3, 0.25, units=units, name=name)

        def get_config(self):
            return {"units": self.units, "name": self.name}

    clone = Head.from_config(Head((4,), name="head").get_config())
    assert clone.units == (4,) and clone.data_format == "channels_last"


@pytest.mark.parametrize("source", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, source):
    call = channels_first(CALLS[source](kind))
    layer = new(kind, data_format="channels_first")
    shapes = {f"{name}_shape": value.shape for name, value in call.items()}
    assert layer.compute_output_shape(**shapes) == (7, 6, 3, 4)
    unknown = {
        name: (None, value.shape[1], None, None)
        if name in ("inputs", "trans_inputs")
        else (None, *value.shape[1:])
        for name, value in call.items()
    }
    symbols = {k: keras.KerasTensor(v) for k, v in unknown.items()}
    assert layer(**symbols).shape == (None, 6, 3, 4)
    as_tensor_shapes = {
        f"{name}_shape": tf.TensorShape(v) for name, v in unknown.items()
    }
    assert layer.compute_output_shape(**as_tensor_shapes) == (None, 6, 3, 4)


@pytest.mark.parametrize("units", [(), (8, 4)])
def test_weights_do_not_know_the_format(units):
    """Those of the hidden layers, whose rows are pooled features."""
    shapes = [
        [
            (v.name, tuple(v.shape))
            for v in pair_of_layers("align", "own", units=units)[index].weights
        ]
        for index in (0, 2)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_and_loaded(kind, tmp_path):
    """Also where Keras' setting is another by then."""
    call = channels_first(operands(kind))
    layer = new(kind, data_format="channels_first")
    model = model_of(layer, call)
    model.compile("sgd", "mse")
    before = layer.get_weights()
    fit(model, call, random(7, 6, 3, 4), steps=3)
    assert np.any(layer.get_weights()[-1] != before[-1])
    expected = model(call)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(call), expected)
    last = new(kind, data_format="channels_last")
    other = model_of(last, operands(kind))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(
        np.moveaxis(other(operands(kind)), 3, 1), expected
    )


def detector() -> keras.Model:
    """All three layers, in channels first, over the same maps."""
    inputs = keras.Input((6, 11, 12), name="inputs")
    rois = keras.Input((5,), name="rois")
    wide = keras.layers.Concatenate(1)([inputs] * 6)
    layers = {
        kind: new(kind, data_format="channels_first", name=kind)
        for kind in KINDS
    }
    outputs = [
        layers["psroi"](wide, rois, trans_inputs=inputs),
        layers["pool"](inputs, rois),
        layers["align"](inputs, rois),
    ]
    model = keras.Model(
        [inputs, rois], keras.layers.Concatenate(1, name="all")(outputs)
    )
    rng = np.random.default_rng(0)
    for layer in layers.values():
        layer.set_weights([rng.normal(0, 0.1, v.shape) for v in layer.weights])
    return model


@pytest.mark.parametrize("target", ["native", "portable", "onnx", "litert"])
def test_exported(target, tmp_path):
    """Each writer compares what it wrote with the model, too."""
    model = detector()
    call = {"inputs": random(2, 6, 11, 12), "rois": regions(7)}
    expected = model(call).numpy()
    assert expected.shape == (7, 18, 3, 4)
    if target == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        export.onnx(model, tmp_path / "model.onnx", sample=call)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (actual,) = session.run(None, call)
    elif target == "litert":
        pytest.importorskip("ai_edge_litert")
        from ai_edge_litert.interpreter import Interpreter

        export.litert(model, tmp_path / "model.tflite", sample=call)
        runner = Interpreter(
            str(tmp_path / "model.tflite")
        ).get_signature_runner()
        (actual,) = runner(**call).values()
    else:
        export.saved_model(model, tmp_path / "saved", target, sample=call)
        serve = tf.saved_model.load(str(tmp_path / "saved"))
        result = serve.serve(call["inputs"], call["rois"])
        actual = result["all"] if isinstance(result, dict) else result
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("kind", "changes", "text"),
    [
        (
            "align",
            {"offset": (7, 3, 4, 2)},
            "`offset` to have height 3 (num_rois, 2, pooled_h, pooled_w). "
            "Received: offset.shape=(7, 3, 4, 2)",
        ),
        (
            "pool",
            {"offset": (7, 3, 3, 4)},
            "`offset` to have a second dimension of 2 (num_rois, 2, pooled_h, "
            "pooled_w). Received: offset.shape=(7, 3, 3, 4)",
        ),
        (
            "pool",
            {"offset": (6, 2, 3, 4)},
            "`offset` to have .*7.*Received: offset.shape=(6, 2, 3, 4)",
        ),
        (
            "psroi",
            {"trans": (7, 2, 5, 6)},
            "`trans` to have .*Received: trans.shape=(7, 2, 5, 6)",
        ),
        (
            "psroi",
            {"trans": (7, 5, 2, 5)},
            "the second dimension of `trans` .*trans.shape=(7, 5, 2, 5)",
        ),
        (
            "psroi",
            {"inputs": (2, 11, 12, 36)},
            "`inputs` to have 36 .*Received: inputs.shape=(2, 11, 12, 36)",
        ),
        (
            "psroi",
            {"inputs": (36, 11, 12)},
            "`inputs` to have rank 4 (batch, output_dim * group_h * group_w, "
            "height, width). Received: inputs.shape=(36, 11, 12)",
        ),
        (
            "psroi",
            {"trans_inputs": (3, 4, 11, 12)},
            "`trans_inputs` to have the batch .*Received: inputs.shape=(2, 36, "
            "11, 12), trans_inputs.shape=(3, 4, 11, 12)",
        ),
        (
            "align",
            {"inputs": (2, 6, 11)},
            "`inputs` to have rank 4 (batch, channels, height, width). "
            "Received: inputs.shape=(2, 6, 11)",
        ),
        (
            "align",
            {"offset": (7, 24)},
            "`offset` to have rank 4 (num_rois, 2, pooled_h, pooled_w). "
            "Received: offset.shape=(7, 24)",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("symbolic", [True, False], ids=["symbolic", "eager"])
def test_messages_speak_of_what_was_passed(kind, changes, text, symbolic):
    shapes = {"inputs": (2, KINDS[kind].channels, 11, 12), "rois": (7, 5)}
    make = keras.KerasTensor if symbolic else np.zeros
    call = {name: make(size) for name, size in {**shapes, **changes}.items()}
    if not symbolic:
        call = {k: v.astype(np.float32) for k, v in call.items()}
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)) as info:
        new(kind, data_format="channels_first")(**call)
    pattern = re.escape(f"Expected {text}").replace(r"\.\*", ".*")
    assert re.search(pattern, str(info.value), re.DOTALL), str(info.value)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_channels(kind):
    name = "trans_inputs" if kind == "psroi" else "inputs"
    shapes = {"inputs": (2, KINDS[kind].channels, 11, 12), "rois": (7, 5)}
    shapes[name] = (2, None, 11, 12)
    with pytest.raises(
        ValueError,
        match=rf"Expected the channels of `{name}` to be known. Received: "
        rf"{name}.shape=\(2, None, 11, 12\)",
    ):
        new(kind, data_format="channels_first")(
            **{k: keras.KerasTensor(v) for k, v in shapes.items()}
        )


@pytest.mark.parametrize(
    "value",
    [
        "NHWC",
        "",
        "channels_middle",
        b"channels_last",
        1,
        True,
        ["channels_last"],
    ]
    + [np.array("channels_last"), tf.constant("channels_last"), 1.0, {}],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_format(kind, value):
    with pytest.raises(ValueError, match="Expected `data_format` .*Received: "):
        new(kind, data_format=value)
