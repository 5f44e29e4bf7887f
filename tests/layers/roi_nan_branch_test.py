# SPDX-License-Identifier: Apache-2.0
"""A branch of a pooling layer that has become NaN is seen in what it moves.

The op's rule, a displacement that is NaN lies outside of the map, holds for
displacements that are given.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from roi_layers_test import (
    EVERY_BRANCH,
    FLOAT_POLICIES,
    KINDS,
    by_the_op,
    displaced,
    given_operands,
    model_of,
    new,
    operands,
    random,
)

from tf_deform import _build_info, export

NAN = np.float32(np.nan)


def spoil(layer: keras.layers.Layer, name: str, index=()) -> None:
    """Makes one number of a weight NaN, or all of them."""
    weight = getattr(layer, name) if isinstance(name, str) else name
    values = weight.numpy()
    values[index] = NAN
    weight.assign(values)


def one_field_is_nan(kind: str) -> tuple[keras.layers.Layer, np.ndarray]:
    """A layer with a NaN in its bias, and which outputs that is for."""
    layer = displaced(kind)
    nan = np.zeros((7, 3, 4, 6), bool)
    if kind == "psroi":  # [class][(dy, dx)][part_h][part_w]
        spoil(
            layer,
            "offset_bias",
            np.ravel_multi_index((1, 1, 0, 3), (3, 2, 2, 5)),
        )
        rows = np.arange(3) * 2 // 3 == 0
        columns = np.arange(4) * 5 // 4 == 3
        assert rows.any() and columns.any()
        nan[:, rows[:, np.newaxis] & columns, 2:4] = True
    else:  # [ph][pw][(dy, dx)]
        spoil(layer, "offset_bias", np.ravel_multi_index((2, 1, 0), (3, 4, 2)))
        nan[:, 2, 1] = True
    return layer, nan


def modes(layer, call, tmp_path):
    """The layer's outputs, wherever it may run."""
    yield "eager", layer(**call)
    function = tf.function(lambda: layer(**call))
    yield "graph", function()
    signature = {
        k: tf.TensorSpec((None,) * (np.ndim(v) - 1) + np.shape(v)[-1:])
        for k, v in call.items()
    }
    function = tf.function(
        lambda *values: layer(**dict(zip(call, values, strict=True))),
        input_signature=[*signature.values()],
    )
    yield "unknown sizes", function(*call.values())
    if _build_info.XLA:
        yield "XLA", tf.function(lambda: layer(**call), jit_compile=True)()
    model = model_of(layer, call)
    yield "predict", model(call, training=False)
    for implementation in ("native", "portable"):
        path = str(tmp_path / implementation)
        export.saved_model(
            model, path, implementation, sample=call, tolerance=np.inf
        )
        loaded = tf.saved_model.load(path)
        served = loaded.serve(*call.values())
        yield f"SavedModel, {implementation}", served


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_handed_on_to_what_it_is_for(kind):
    layer, nan = one_field_is_nan(kind)
    call = operands(kind)
    expected = displaced(kind)(**call).numpy()
    expected[nan] = NAN
    for function in (layer, tf.function(lambda **call: layer(**call))):
        np.testing.assert_array_equal(function(**call), expected)
    portable = new(kind, implementation="portable")
    portable(**call)
    portable.set_weights(layer.get_weights())
    function = tf.function(lambda: portable(**call))
    for output in (portable(**call), function()):
        np.testing.assert_allclose(output, expected, atol=1e-5)
    if _build_info.XLA:
        function = tf.function(lambda: layer(**call), jit_compile=True)
        np.testing.assert_allclose(function(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_of_a_class_and_part_for_each_of_many(kind):
    """Every field alone: the outputs that depend on it, and no others."""
    layer, call = displaced(kind), operands(kind)
    clean = layer(**call).numpy()
    bias = layer.offset_bias.numpy()
    function = tf.function(lambda: layer(**call))
    for field in range(0, len(bias), 7):
        # What moves if this field alone does.
        moved = bias.copy()
        moved[field] += 0.37
        layer.offset_bias.assign(moved)
        depends = function().numpy() != clean
        spoiled = bias.copy()
        spoiled[field] = NAN
        layer.offset_bias.assign(spoiled)
        nan = np.isnan(function())
        # A bin beyond the map stays 0 when it moves: not so in every region.
        # One of five parts is read by none of four bins.
        np.testing.assert_array_equal(nan.all(0), depends.any(0))
        np.testing.assert_array_equal(nan.any(0), depends.any(0))


@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_any_weight(kind, config):
    call = operands(kind)
    for index in range(len(displaced(kind, **config).weights)):
        layer = displaced(kind, **config)
        weight = layer.weights[index]
        weight.assign(np.full(weight.shape, NAN))
        assert np.all(np.isnan(layer(**call)))


@pytest.mark.parametrize("policy", FLOAT_POLICIES)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_type_and_format(kind, data_format, policy):
    layer = new(kind, data_format=data_format, dtype=policy)
    call = operands(kind)
    nan = one_field_is_nan(kind)[1]
    if data_format == "channels_first":
        call = {
            k: np.moveaxis(v, 3, 1) if v.ndim == 4 else v
            for k, v in call.items()
        }
        nan = np.moveaxis(nan, 3, 1)
    layer(**call)
    layer.set_weights(one_field_is_nan(kind)[0].get_weights())
    output = tf.cast(layer(**call), tf.float32)
    np.testing.assert_array_equal(np.isnan(output), nan)


@pytest.mark.parametrize("kind", KINDS)
def test_where_it_runs(kind, tmp_path):
    layer, nan = one_field_is_nan(kind)
    for mode, output in modes(layer, operands(kind), tmp_path):
        if isinstance(output, dict):
            (output,) = output.values()
        np.testing.assert_array_equal(np.isnan(output), nan, mode)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_pixel_is_handed_on_to_regions_that_read_it(kind):
    """Here through the branch: other regions are as they were."""
    layer, call = displaced(kind), operands(kind)
    expected = layer(**call).numpy()
    name = "trans_inputs" if kind == "psroi" else "inputs"
    call[name] = call[name].copy()
    x, y = (call["rois"][2, 1:3] + call["rois"][2, 3:]) / 8
    call[name][0, int(y), int(x)] = NAN
    nan = np.isnan(layer(**call))
    assert nan[2].any() and not nan[1::2].any()
    np.testing.assert_array_equal(layer(**call)[1::2], expected[1::2])


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_infinity_keeps_the_rule_of_the_op(kind, value):
    """It lies outside: 0, and no NaN."""
    layer, call = displaced(kind), operands(kind)
    bias = layer.offset_bias.numpy()
    bias[:] = value
    layer.offset_bias.assign(bias)
    if kind == "psroi" and np.isinf(value):
        # Its branch pools maps of infinities, where 0 times one is NaN.
        trans = layer._run_branch(call["trans_inputs"], call["rois"])
        assert np.isnan(trans).any() and not np.isnan(trans).all()
        output = layer(**call).numpy()
        assert np.isnan(output).any() and not np.any(np.nan_to_num(output))
        return
    for function in (layer, tf.function(lambda **call: layer(**call))):
        assert not np.any(function(**call))
    # Opposite infinities of one place do not make a NaN either.
    if kind == "psroi":
        bias.reshape(3, 2, 2, 5)[:, 1] *= -1
    else:
        bias.reshape(3, 4, 2)[..., 1] *= -1
    layer.offset_bias.assign(bias)
    assert not np.any(layer(**call))


@pytest.mark.parametrize("kind", KINDS)
def test_given_displacements_keep_the_rule_of_the_op(kind):
    layer, call = new(kind), given_operands(kind)
    call[KINDS[kind].given][:] = NAN
    assert not np.any(layer(**call))
    call[KINDS[kind].given][1:] = 0
    np.testing.assert_array_equal(
        layer(**call), by_the_op(layer, *call.values())
    )


@pytest.mark.parametrize("which", ["index", "corner", "infinite corner"])
@pytest.mark.parametrize("all_weights", [False, True])
@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_padding_stays_zero(kind, config, all_weights, which):
    """Whatever the weights are: it is no region that a branch could move."""
    layer, call = displaced(kind, **config), operands(kind)
    for weight in layer.weights if all_weights else [layer.offset_bias]:
        weight.assign(np.full(weight.shape, NAN))
    bad = {"index": (0, -1), "corner": (3, NAN), "infinite corner": (2, np.inf)}
    column, value = bad[which]
    call["rois"][1::2, column] = value
    for function in (layer, tf.function(lambda **call: layer(**call))):
        output = function(**call).numpy()
        assert np.all(np.isnan(output[0::2]))
        np.testing.assert_array_equal(output[1::2], np.zeros((3, 3, 4, 6)))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_where_there_is_no_nan(kind):
    """To the bit, and also the gradient."""
    layer, call = displaced(kind), operands(kind)
    call = {k: tf.constant(v) for k, v in call.items()}
    branch_inputs = {k: v for k, v in call.items() if k != "inputs"}
    with tf.GradientTape() as tape:
        tape.watch(call["inputs"])
        output = layer(**call)
    gradient = tape.gradient(output, call["inputs"])
    if kind == "psroi":
        displacements = layer._run_branch(
            branch_inputs["trans_inputs"], call["rois"]
        )
    else:
        displacements = layer._run_branch(call["inputs"], call["rois"])
    with tf.GradientTape() as tape:
        tape.watch(call["inputs"])
        if kind != "psroi":
            displacements = layer._run_branch(call["inputs"], call["rois"])
        expected = by_the_op(layer, call["inputs"], call["rois"], displacements)
    np.testing.assert_array_equal(output, expected)
    np.testing.assert_array_equal(
        gradient, tape.gradient(expected, call["inputs"])
    )


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_stops(kind, jit_compile):
    """`TerminateOnNaN` sees it, in the first step."""
    if jit_compile and not _build_info.XLA:
        jit_compile = "auto"
    call = operands(kind)
    model = model_of(new(kind), call)
    layer = model.layers[-1]
    spoil(layer, "offset_kernel", (..., 0))
    model.compile("sgd", "mse", jit_compile=jit_compile)
    data = tf.data.Dataset.from_tensors((call, random(7, 3, 4, 6)))
    history = model.fit(
        data, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()]
    )
    assert np.isnan(history.history["loss"]).tolist() == [True]


@pytest.mark.parametrize("kind", ["psroi", "align"])
def test_in_onnx_runtime(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, nan = one_field_is_nan(kind)
    call = operands(kind)
    export.onnx(
        model_of(layer, call),
        tmp_path / "model.onnx",
        sample=call,
        tolerance=np.inf,
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, call)
    np.testing.assert_array_equal(np.isnan(output), nan)


@pytest.mark.parametrize("kind", ["psroi", "align"])
def test_in_litert(kind, tmp_path):
    pytest.importorskip("ai_edge_litert")
    from ai_edge_litert.interpreter import Interpreter

    layer, nan = one_field_is_nan(kind)
    call = operands(kind)
    path = tmp_path / "model.tflite"
    export.litert(model_of(layer, call), path, sample=call, tolerance=np.inf)
    (output,) = Interpreter(str(path)).get_signature_runner()(**call).values()
    np.testing.assert_array_equal(np.isnan(output), nan)
