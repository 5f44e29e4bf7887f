# SPDX-License-Identifier: Apache-2.0
"""Tests that NaN in a branch appears in the outputs that the branch moves.

The ops' rule, that a NaN displacement lies outside of the map, holds only for
displacements that are given.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from exported import CLOSE, FORMATS, run, write
from layer_cases import (
    BRANCHES,
    KINDS,
    MODES,
    POOL_BRANCHES,
    POOLS,
    built,
    by_the_op,
    displace,
    given_call,
    in_mode,
    model_of,
    new,
    output_shape,
    own_call,
    regions,
    value_and_gradients,
)
from operands import random

from tf_deform import _loader
from tf_deform._portable.fields import hand_on_nan

NAN = np.float32(np.nan)
NATIVE = [("native", mode) for mode in MODES]
modes_and_implementations = pytest.mark.parametrize(
    ("implementation", "mode"), [*NATIVE, ("portable", "unknown sizes")]
)


def change_bias(layer: keras.layers.Layer, place: object, value: float) -> None:
    """Sets some numbers of the branch's bias."""
    bias = layer.offset_bias.numpy()
    bias[place] = value
    layer.offset_bias.assign(bias)


def field_of(kind: str, place: int = 5) -> tuple:
    """Returns the place of a number of the bias, and the outputs that use it.

    Of the convolution any place can be chosen.
    """
    nan = np.zeros(output_shape(kind), bool)
    if kind == "conv2d":  # One field of all pixels: each pixel reads it.
        nan[:] = True
    elif kind == "psroi":  # [class][(dy, dx)][part_h][part_w]
        place = np.ravel_multi_index((1, 1, 0, 3), (3, 2, 2, 5))
        rows = np.arange(3) * 2 // 3 == 0
        columns = np.arange(4) * 5 // 4 == 3
        assert rows.any() and columns.any()
        nan[:, rows[:, np.newaxis] & columns, 2:4] = True
    else:  # [ph][pw][(dy, dx)]
        place = np.ravel_multi_index((2, 1, 0), (3, 4, 2))
        nan[:, 2, 1] = True
    return place, nan


# The convolution's first field, a middle one, and its last, a modulation.
@pytest.mark.parametrize(
    ("kind", "place"),
    [*[("conv2d", place) for place in (0, 5, 26)], *[(k, 0) for k in POOLS]],
)
@pytest.mark.parametrize(
    ("implementation", "mode"),
    NATIVE + [("portable", mode) for mode in MODES if mode != "XLA"],
)
def test_nan_is_handed_on_to_what_it_is_for(kind, place, mode, implementation):
    layer, call = built(kind, "own", implementation=implementation)
    place, nan = field_of(kind, place)
    expected = layer(**call).numpy()
    expected[nan] = NAN
    change_bias(layer, place, NAN)
    same = mode != "XLA" and implementation == "native"
    output = in_mode(layer, call, mode)(call)
    assert_close(output, expected, 0 if same else 1e-5)


@pytest.mark.parametrize("kind", POOLS)
def test_nan_of_a_class_and_part_for_each_of_many(kind):
    """Sets each field to NaN alone, and compares with what it moves."""
    layer, call = built(kind, "own")
    function = in_mode(layer, call, "graph")
    clean, bias = function(call).numpy(), layer.offset_bias.numpy()
    for field in range(0, len(bias), 7):
        change_bias(layer, field, bias[field] + 0.37)
        depends = function(call).numpy() != clean
        change_bias(layer, field, NAN)
        nan = np.isnan(function(call))
        change_bias(layer, field, bias[field])
        # A bin beyond the map stays 0 when it moves, but no bin lies there in
        # every region. None of the four bins reads one of the five parts.
        assert_equal(nan.all(0), depends.any(0), case=f"field {field}")
        assert_equal(nan.any(0), depends.any(0), case=f"field {field}")


@pytest.mark.parametrize(("kind", "config"), BRANCHES, ids=str)
def test_any_weight(kind, config):
    layer, call = built(kind, "own", **config)
    for weight in layer.weights:
        before = weight.numpy()
        weight.assign(np.full(weight.shape, NAN))
        assert np.all(np.isnan(layer(**call))), weight.path
        weight.assign(before)


@pytest.mark.parametrize(
    "policy",
    ["float32", "float64", "mixed_float16", "mixed_bfloat16", "bfloat16"],
)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_type_and_format(kind, data_format, policy):
    layer, call = built(kind, "own", data_format=data_format, dtype=policy)
    assert np.all(np.isfinite(tf.cast(layer(**call), tf.float32)))
    place, nan = field_of(kind)
    change_bias(layer, place, NAN)
    if data_format == "channels_first":
        nan = np.moveaxis(nan, 3, 1)
    assert_equal(np.isnan(tf.cast(layer(**call), tf.float32)), nan)


@pytest.mark.parametrize("kind", POOLS)
def test_a_nan_pixel_is_handed_on_to_regions_that_read_it(kind):
    """Tests a NaN that enters through the branch; other regions stay."""
    layer, call = built(kind, "own")
    expected = layer(**call).numpy()
    name = "trans_inputs" if kind == "psroi" else "inputs"
    call[name] = call[name].copy()
    x, y = (call["rois"][2, 1:3] + call["rois"][2, 3:]) / 8
    call[name][0, int(y), int(x)] = NAN
    nan = np.isnan(layer(**call))
    assert nan[2].any() and not nan[1::2].any()
    assert_equal(layer(**call)[1::2], expected[1::2])


def convolution(**config) -> keras.layers.Layer:
    """Returns a layer of a model of unknown sizes that displaces a little."""
    layer = new("conv2d", padding="same", **config)
    keras.Sequential([keras.Input((None, None, 2)), layer])
    displace(layer)
    return layer


def displace_by(layer: keras.layers.Layer, fields: object) -> None:
    """Makes the branch predict the same everywhere."""
    layer.offset_kernel.assign(np.zeros(layer.offset_kernel.shape))
    layer.offset_bias.assign(np.resize(fields, layer.offset_bias.shape))


@modes_and_implementations
@pytest.mark.parametrize("modulation", [None, "2sigmoid"])
def test_a_nan_pixel_is_handed_on_to_outputs_whose_branch_sees_it(
    modulation, implementation, mode
):
    """Tests that other outputs stay. The layer samples ten pixels away."""
    layer = convolution(
        implementation=implementation, modulation=modulation, use_bias=False
    )
    displace_by(layer, 10.0)
    x = random(2, 30, 31, 2)
    assert np.all(np.any(layer(x).numpy()[:, :15, :15], -1))
    x[1, 2, 3] = NAN
    call = {"inputs": x}
    y = in_mode(layer, call, mode)(call)
    where = np.zeros(y.shape, bool)
    where[1, 1:4, 2:5] = True
    assert_equal(np.isnan(y), where)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", POOLS)
def test_infinity_keeps_the_rule_of_pooling(kind, value):
    """Tests that infinity lies outside, and gives 0 instead of NaN."""
    layer, call = built(kind, "own")
    change_bias(layer, ..., value)
    if kind == "psroi" and np.isinf(value):
        # The branch pools maps of infinities, where 0 times infinity is NaN.
        trans = layer._run_branch(call["trans_inputs"], call["rois"])
        assert np.isnan(trans).any() and not np.isnan(trans).all()
        output = layer(**call).numpy()
        assert np.isnan(output).any() and not np.any(np.nan_to_num(output))
        return
    for mode in ("eager", "graph"):
        assert not np.any(in_mode(layer, call, mode)(call))
    # Opposite infinities of one place do not give NaN either.
    every_dx = np.indices((3, 2, 10))[1] if kind == "psroi" else [0, 1] * 12
    change_bias(layer, np.ravel(every_dx) == 1, -value)
    assert not np.any(layer(**call))


@modes_and_implementations
def test_infinity_keeps_the_rule_of_the_convolution(implementation, mode):
    """Tests infinities, also both of them in one pixel."""
    layer = convolution(implementation=implementation, modulation=None)
    displace_by(layer, [np.inf, -np.inf, 0.5])
    call = {"inputs": random(2, 6, 7, 2)}
    y = in_mode(layer, call, mode)(call)
    assert_equal(y, np.broadcast_to(layer.bias, y.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_given_displacements_keep_the_rule_of_the_op(kind):
    layer, call = new(kind), given_call(kind)
    call.pop("modulator", None)
    given = call[KINDS[kind].given]
    given[:] = NAN
    output = layer(**call)
    rest = layer.bias if kind == "conv2d" else 0.0
    assert_equal(output, np.broadcast_to(rest, output.shape))
    given[1:] = 0
    assert_equal(layer(**call), by_the_op(layer, *call.values()))


@pytest.mark.parametrize("which", ["index", "corner", "infinite corner"])
@pytest.mark.parametrize("all_weights", [False, True])
@pytest.mark.parametrize(("kind", "config"), POOL_BRANCHES, ids=str)
def test_padding_stays_zero(kind, config, all_weights, which):
    """Tests that no weights of the branch move padding, which is no region."""
    layer, call = built(kind, "own", **config)
    for weight in layer.weights if all_weights else [layer.offset_bias]:
        weight.assign(np.full(weight.shape, NAN))
    bad = {"index": (0, -1), "corner": (3, NAN), "infinite corner": (2, np.inf)}
    column, value = bad[which]
    call["rois"][1::2, column] = value
    for mode in ("eager", "graph"):
        output = in_mode(layer, call, mode)(call)
        assert np.all(np.isnan(output[0::2]))
        assert_equal(output[1::2], np.zeros((3, 3, 4, 6)), case=mode)


@pytest.mark.parametrize("kind", POOLS)
def test_nothing_changes_where_there_is_no_nan(kind):
    """Tests that results equal to the bit, gradients included."""
    layer, call = built(kind, "own")

    def by_parts(inputs, rois, trans_inputs=None):
        maps = inputs if trans_inputs is None else trans_inputs
        return by_the_op(layer, inputs, rois, layer._run_branch(maps, rois))

    expected = value_and_gradients(by_parts, call, layer.weights)
    assert_equal(value_and_gradients(layer, call, layer.weights), expected)


def test_healthy_outputs_keep_their_bits():
    x = random(2, 6, 7, 3)
    x[0, 0, 0] = [0.0, np.inf, -np.inf]
    x[0, 0, 1, 0] = -0.0
    fields = random(2, 6, 7, 18, dtype="float64")
    fields[1, 2, 3, :2] = [np.inf, -np.inf]
    kept = hand_on_nan(tf.constant(x), tf.constant(fields)).numpy()
    assert kept.tobytes() == x.tobytes()


@pytest.mark.parametrize("source", ["own", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_a_graph_with_a_branch_looks_for_nan(kind, source):
    layer, call = built(kind, source)
    function = tf.function(lambda: layer(**call)).get_concrete_function()
    looks = [
        node.op == "IsNan" or node.attr["modulation"].s not in (b"", b"mask")
        for node in function.graph.as_graph_def().node
    ]
    assert any(looks) == (source == "own")


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_stops(kind, jit_compile):
    """Tests that `TerminateOnNaN` stops training in the first step."""
    if jit_compile and not _loader.supports_jit():
        jit_compile = "auto"
    call = own_call(kind)
    model = model_of(new(kind), call)
    layer = model.layers[-1]
    change_bias(layer, 0, NAN)
    model.compile("sgd", "mse", jit_compile=jit_compile)
    data = tf.data.Dataset.from_tensors((call, random(*output_shape(kind))))
    history = model.fit(
        data, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()]
    )
    assert np.isnan(history.history["loss"]).tolist() == [True]
    assert model.stop_training


# Exported models: other runtimes keep NaN, and infinity stays outside.


STOCK = [form for form in FORMATS if form != "native"]


# In files of these formats, "pool" differs from "psroi" and "align" in nothing
# that the other two do not have.
@pytest.mark.parametrize(
    ("form", "kinds"),
    [
        ("native", POOLS),
        *[(form, ["psroi", "align"]) for form in STOCK],
        *[pytest.param(form, POOLS, marks=pytest.mark.slow) for form in STOCK],
    ],
)
def test_exported_pooling_in_channels_first(form, kinds, tmp_path):
    """Exports all layers over the same maps, with NaN in a field of each."""
    maps = keras.Input((6, 11, 12), name="maps")
    rois = keras.Input((5,), name="rois")
    first = {"data_format": "channels_first"}
    convolution = new("conv2d", filters=6, padding="same", **first)
    pools = [new(kind, **first) for kind in kinds]
    convolved = convolution(maps)
    wide = keras.layers.Concatenate(1)([convolved, *[maps] * 5])
    outputs = [pools[0](wide, rois, trans_inputs=maps)]
    outputs += [layer(convolved, rois) for layer in pools[1:]]
    model = keras.Model({"maps": maps, "rois": rois}, outputs)
    call = {"maps": random(2, 6, 11, 12), "rois": regions()}
    for layer in (convolution, *pools):
        displace(layer)
    nan = [field_of(kind) for kind in kinds]
    for layer, (place, _) in zip(pools, nan, strict=True):
        change_bias(layer, place, NAN)
    expected = [output.numpy() for output in model(call)]
    for output, (_, where) in zip(expected, nan, strict=True):
        assert_equal(np.isnan(output), np.moveaxis(where, 3, 1))
    # Each writer compares its file with the model as well.
    write(form, model, tmp_path / "model", sample=call)
    outputs = run(form, tmp_path / "model", call)
    outputs = [outputs[f"output_{index}"] for index in range(len(kinds))]
    assert_close(outputs, expected, CLOSE)


@pytest.mark.parametrize("form", FORMATS)
def test_exported_convolutions(form, tmp_path):
    """Tests a pixel that is NaN, and a branch that is infinite."""
    layers = [
        convolution(modulation=None),
        convolution(dilation_rate=2, boundary="clamp"),
        convolution(modulation=None),
    ]
    displace_by(layers[2], np.inf)
    image = keras.Input((None, None, 2), name="image")
    model = keras.Model(image, [layer(image) for layer in layers])
    write(form, model, tmp_path / "model")
    x = random(2, 9, 8, 2)
    nan = x.copy()
    nan[1, 4, 3] = NAN
    outputs = run(form, tmp_path / "model", {"image": x})
    bias = np.broadcast_to(layers[2].bias, (2, 9, 8, 4))
    assert_equal(outputs["output_2"], bias)
    outputs = run(form, tmp_path / "model", {"image": nan})
    for index, expected in enumerate(map(np.isnan, model(nan))):
        assert expected.any() and not expected.all()
        received = np.isnan(outputs[f"output_{index}"])
        assert_equal(received, expected, case=f"output {index}")


@pytest.mark.parametrize("form", ["onnx", "litert"])
def test_exported_branch_that_is_all_nan(form, tmp_path):
    """Tests a reported difference of 0: NaN stands where NaN is expected."""
    layer = convolution()
    model = keras.Sequential([keras.Input((10, 12, 2), name="image"), layer])
    change_bias(layer, ..., NAN)
    image = random(2, 10, 12, 2)
    report = write(form, model, tmp_path / "model", sample=image)
    assert report.differences["output_0"] == 0
    received = run(form, tmp_path / "model", {"image": image})
    assert np.isnan(received["output_0"]).all()


def test_who_looks_for_nan_finds_none_in_a_healthy_graph():
    layer, call = built("conv2d", "own")
    tf.debugging.enable_check_numerics()
    try:
        assert tf.function(layer)(**call).shape == layer(**call).shape
        change_bias(layer, ..., NAN)
        with pytest.raises(tf.errors.InvalidArgumentError, match="NaN"):
            tf.function(layer)(**call)
    finally:
        tf.debugging.disable_check_numerics()
