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
from exported import FORMATS, run, write
from layer_cases import (
    BRANCHES,
    KINDS,
    POOL_BRANCHES,
    POOLS,
    by_the_op,
    channels_first,
    displaced,
    given_call,
    model_of,
    new,
    output_shape,
    own_call,
)
from operands import random

from tf_deform import _build_info
from tf_deform.layers._branch import hand_on_nan

NAN = np.float32(np.nan)
MODES = ["eager", "graph", "unknown sizes", "XLA"]


def one_field_is_nan(kind: str, **config) -> tuple:
    """Returns a layer with a NaN in its bias, and the outputs that use it."""
    layer = displaced(kind, **config)
    nan = np.zeros(output_shape(kind), bool)
    if kind == "conv2d":  # One field of all pixels: each pixel reads it.
        place = 5
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
    bias = layer.offset_bias.numpy()
    bias[place] = NAN
    layer.offset_bias.assign(bias)
    return layer, nan


def run_as(layer: keras.layers.Layer, call: dict, mode: str) -> np.ndarray:
    """Runs the layer eagerly or in a graph of some kind."""
    if mode == "eager":
        return layer(**call).numpy()
    if mode == "XLA" and not _build_info.XLA:
        pytest.skip("built without the bridge to XLA")
    signature = None
    if mode == "unknown sizes":
        signature = [
            tf.TensorSpec((None,) * (np.ndim(v) - 1) + np.shape(v)[-1:])
            for v in call.values()
        ]
    function = tf.function(
        lambda *values: layer(**dict(zip(call, values, strict=True))),
        input_signature=signature,
        jit_compile=mode == "XLA",
    )
    return function(*call.values()).numpy()


@pytest.mark.parametrize(
    ("mode", "implementation"),
    [*[(mode, "native") for mode in MODES]]
    + [(mode, "portable") for mode in MODES if mode != "XLA"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_handed_on_to_what_it_is_for(kind, mode, implementation):
    layer, nan = one_field_is_nan(kind, implementation=implementation)
    call = own_call(kind)
    expected = displaced(kind, implementation=implementation)(**call).numpy()
    expected[nan] = NAN
    same = mode != "XLA" and implementation == "native"
    assert_close(run_as(layer, call, mode), expected, 0 if same else 1e-5)


@pytest.mark.parametrize("kind", POOLS)
def test_nan_of_a_class_and_part_for_each_of_many(kind):
    """Sets each field to NaN alone.

    Only outputs that depend on the field become NaN.
    """
    layer, call = displaced(kind), own_call(kind)
    clean = layer(**call).numpy()
    bias = layer.offset_bias.numpy()
    function = tf.function(lambda: layer(**call))
    for field in range(0, len(bias), 7):
        # Outputs that change if only this field changes depend on the field.
        moved = bias.copy()
        moved[field] += 0.37
        layer.offset_bias.assign(moved)
        depends = function().numpy() != clean
        spoiled = bias.copy()
        spoiled[field] = NAN
        layer.offset_bias.assign(spoiled)
        nan = np.isnan(function())
        # A bin beyond the map stays 0 when it moves, but no bin lies there in
        # every region. None of the four bins reads one of the five parts.
        assert_equal(nan.all(0), depends.any(0), case=f"field {field}")
        assert_equal(nan.any(0), depends.any(0), case=f"field {field}")


@pytest.mark.parametrize(
    ("implementation", "mode"),
    [*[("native", mode) for mode in MODES], ("portable", "unknown sizes")],
)
@pytest.mark.parametrize("field", [0, 26])
def test_first_and_last_field_of_a_convolution(field, implementation, mode):
    """Tests fields of the displacements, and of the modulation."""
    layer = displaced("conv2d", implementation=implementation)
    bias = layer.offset_bias.numpy()
    bias[field] = NAN
    layer.offset_bias.assign(bias)
    assert np.all(np.isnan(run_as(layer, own_call("conv2d"), mode)))


@pytest.mark.parametrize(("kind", "config"), BRANCHES, ids=str)
def test_any_weight(kind, config):
    call = own_call(kind)
    for index in range(len(displaced(kind, **config).weights)):
        layer = displaced(kind, **config)
        weight = layer.weights[index]
        weight.assign(np.full(weight.shape, NAN))
        assert np.all(np.isnan(layer(**call))), weight.path


@pytest.mark.parametrize(
    "policy",
    ["float32", "float64", "mixed_float16", "mixed_bfloat16"] + ["bfloat16"],
)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_type_and_format(kind, data_format, policy):
    config = {"data_format": data_format, "dtype": policy}
    layer, nan = one_field_is_nan(kind, **config)
    call = own_call(kind)
    if data_format == "channels_first":
        call, nan = channels_first(call), np.moveaxis(nan, 3, 1)
    output = tf.cast(layer(**call), tf.float32)
    assert_equal(np.isnan(output), nan)
    output = tf.cast(displaced(kind, **config)(**call), tf.float32)
    assert np.all(np.isfinite(output))


@pytest.mark.parametrize("kind", POOLS)
def test_a_nan_pixel_is_handed_on_to_regions_that_read_it(kind):
    """Tests a NaN that enters through the branch.

    Other regions stay unchanged.
    """
    layer, call = displaced(kind), own_call(kind)
    expected = layer(**call).numpy()
    name = "trans_inputs" if kind == "psroi" else "inputs"
    call[name] = call[name].copy()
    x, y = (call["rois"][2, 1:3] + call["rois"][2, 3:]) / 8
    call[name][0, int(y), int(x)] = NAN
    nan = np.isnan(layer(**call))
    assert nan[2].any() and not nan[1::2].any()
    assert_equal(layer(**call)[1::2], expected[1::2])


def nan_model(implementation: str = "native", **config) -> keras.Model:
    """Returns a convolution of unknown sizes that displaces a little."""
    layer = new(
        "conv2d", padding="same", implementation=implementation, **config
    )
    model = keras.Sequential([keras.Input((None, None, 2)), layer])
    for seed, weight in enumerate(layer.weights):
        scale = 0.5 / np.sqrt(np.prod(weight.shape[:-1]))
        if weight is layer.offset_bias:
            scale = 1.3
        weight.assign(scale * random(*weight.shape, seed=seed))
    return model


@pytest.mark.parametrize(
    ("implementation", "mode"),
    [*[("native", mode) for mode in MODES], ("portable", "unknown sizes")],
)
@pytest.mark.parametrize("modulation", [None, "2sigmoid"])
def test_a_nan_pixel_is_handed_on_to_outputs_whose_branch_sees_it(
    modulation, implementation, mode
):
    """Tests that other outputs stay. The layer samples ten pixels away."""
    config = dict(modulation=modulation, use_bias=False)
    (layer,) = nan_model(implementation, **config).layers
    layer.offset_kernel.assign(np.zeros(layer.offset_kernel.shape))
    layer.offset_bias.assign(np.full(layer.offset_bias.shape, 10.0))
    x = random(2, 30, 31, 2)
    assert np.all(np.any(layer(x).numpy()[:, :15, :15], -1))
    x[1, 2, 3] = NAN
    y = run_as(layer, {"inputs": x}, mode)
    where = np.zeros(y.shape, bool)
    where[1, 1:4, 2:5] = True
    assert_equal(np.isnan(y), where)


@pytest.mark.parametrize("value", [np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", POOLS)
def test_infinity_keeps_the_rule_of_pooling(kind, value):
    """Tests that infinity lies outside, and gives 0 instead of NaN."""
    layer, call = displaced(kind), own_call(kind)
    bias = layer.offset_bias.numpy()
    bias[:] = value
    layer.offset_bias.assign(bias)
    if kind == "psroi" and np.isinf(value):
        # The branch pools maps of infinities, where 0 times infinity is NaN.
        trans = layer._run_branch(call["trans_inputs"], call["rois"])
        assert np.isnan(trans).any() and not np.isnan(trans).all()
        output = layer(**call).numpy()
        assert np.isnan(output).any() and not np.any(np.nan_to_num(output))
        return
    for mode in ("eager", "graph"):
        assert not np.any(run_as(layer, call, mode))
    # Opposite infinities of one place do not give NaN either.
    if kind == "psroi":
        bias.reshape(3, 2, 2, 5)[:, 1] *= -1
    else:
        bias.reshape(3, 4, 2)[..., 1] *= -1
    layer.offset_bias.assign(bias)
    assert not np.any(layer(**call))


@pytest.mark.parametrize(
    ("implementation", "mode"),
    [*[("native", mode) for mode in MODES], ("portable", "unknown sizes")],
)
def test_infinity_keeps_the_rule_of_the_convolution(implementation, mode):
    """Tests infinities, also both of them in one pixel."""
    (layer,) = nan_model(implementation, modulation=None).layers
    layer.offset_kernel.assign(np.zeros(layer.offset_kernel.shape))
    layer.offset_bias.assign(np.resize([np.inf, -np.inf, 0.5], 18))
    y = run_as(layer, {"inputs": random(2, 6, 7, 2)}, mode)
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
    layer, call = displaced(kind, **config), own_call(kind)
    for weight in layer.weights if all_weights else [layer.offset_bias]:
        weight.assign(np.full(weight.shape, NAN))
    bad = {"index": (0, -1), "corner": (3, NAN), "infinite corner": (2, np.inf)}
    column, value = bad[which]
    call["rois"][1::2, column] = value
    for mode in ("eager", "graph"):
        output = run_as(layer, call, mode)
        assert np.all(np.isnan(output[0::2]))
        assert_equal(output[1::2], np.zeros((3, 3, 4, 6)), case=mode)


@pytest.mark.parametrize("kind", POOLS)
def test_nothing_changes_where_there_is_no_nan(kind):
    """Tests that results equal to the bit, gradients included."""
    layer, call = displaced(kind), own_call(kind)
    call = {k: tf.constant(v) for k, v in call.items()}

    def by_parts(inputs, rois, trans_inputs=None):
        maps = inputs if trans_inputs is None else trans_inputs
        return by_the_op(layer, inputs, rois, layer._run_branch(maps, rois))

    results = []
    for function in (layer, by_parts):
        with tf.GradientTape() as tape:
            tape.watch(call["inputs"])
            output = function(**call)
        results.append([output, tape.gradient(output, call["inputs"])])
    assert_equal(*results)


def test_healthy_outputs_keep_their_bits():
    x = random(2, 6, 7, 3)
    x[0, 0, 0] = [0.0, np.inf, -np.inf]
    x[0, 0, 1, 0] = -0.0
    fields = random(2, 6, 7, 18, dtype="float64")
    fields[1, 2, 3, :2] = [np.inf, -np.inf]
    kept = hand_on_nan(tf.constant(x), tf.constant(fields)).numpy()
    assert kept.tobytes() == x.tobytes()


def test_given_displacements_have_nothing_of_this_in_their_graph():
    def operations(layer, call):
        function = tf.function(lambda: layer(**call))
        nodes = function.get_concrete_function().graph.as_graph_def().node
        return {node.op for node in nodes}

    for kind in KINDS:
        assert "IsNan" not in operations(new(kind), given_call(kind)), kind
        assert "IsNan" in operations(new(kind), own_call(kind)), kind


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_stops(kind, jit_compile):
    """Tests that `TerminateOnNaN` stops training in the first step."""
    if jit_compile and not _build_info.XLA:
        jit_compile = "auto"
    call = own_call(kind)
    model = model_of(new(kind), call)
    layer = model.layers[-1]
    kernel = layer.offset_kernel.numpy()
    kernel[..., 0] = NAN
    layer.offset_kernel.assign(kernel)
    model.compile("sgd", "mse", jit_compile=jit_compile)
    data = tf.data.Dataset.from_tensors((call, random(*output_shape(kind))))
    history = model.fit(
        data, epochs=3, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()]
    )
    assert np.isnan(history.history["loss"]).tolist() == [True]
    assert model.stop_training


# Exported models: other runtimes keep NaN, and infinity stays outside.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", POOLS)
def test_exported_pooling(kind, form, tmp_path):
    if kind == "pool" and form in ("onnx", "litert"):
        form = "predict"  # Same case as psroi: the layers use the same op.
    layer, nan = one_field_is_nan(kind)
    call = own_call(kind)
    model, path = model_of(layer, call), tmp_path / "model"
    if form == "predict":
        output = model(call, training=False)
    else:
        write(form, model, path, sample=call, tolerance=np.inf)
        (output,) = run(form, path, call).values()
    assert_equal(np.isnan(output), nan)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "config",
    [
        {"modulation": None},
        {"modulation": "sigmoid", "dilation_rate": 2, "boundary": "clamp"},
    ],
    ids=str,
)
def test_exported_convolution(config, form, tmp_path):
    model = nan_model(**config)
    layer = model.layers[0]
    x = random(2, 9, 8, 2)
    path = str(tmp_path / "model")
    write(form, model, path)
    x[1, 4, 3] = NAN
    expected = np.isnan(model(x))
    assert expected.any() and not expected.all()
    (name,) = [tensor.name for tensor in model.inputs]
    (y,) = run(form, path, {name: x}).values()
    assert_equal(np.isnan(y), expected)
    if "boundary" in config:
        return
    layer.offset_kernel.assign(np.zeros(layer.offset_kernel.shape))
    layer.offset_bias.assign(np.full(layer.offset_bias.shape, np.inf))
    write(form, model, path)
    (y,) = run(form, path, {name: np.zeros_like(x)}).values()
    assert_equal(y, np.broadcast_to(layer.bias, y.shape))


@pytest.mark.parametrize("form", ["onnx", "litert"])
def test_exported_branch_that_is_all_nan(form, tmp_path):
    """Tests a reported difference of 0: NaN stands where NaN is expected."""
    (layer,) = nan_model(modulation="sigmoid").layers
    model = keras.Sequential([keras.Input((10, 12, 2), name="image"), layer])
    layer.offset_bias.assign(np.full(layer.offset_bias.shape, NAN))
    image = random(2, 10, 12, 2)
    report = write(form, model, tmp_path / "model", sample=image)
    assert report.differences["output_0"] == 0
    received = run(form, tmp_path / "model", {"image": image})
    assert np.isnan(received["output_0"]).all()


_CHECK_NUMERICS = """
import numpy as np
import tensorflow as tf
import tf_deform

tf.debugging.enable_check_numerics()
layer = tf_deform.layers.DeformableConv2D(4, 3, modulation="sigmoid")
x = np.random.default_rng(0).random((2, 6, 7, 2), "float32")
print(tf.function(layer)(x).shape, layer(x).shape)
layer.offset_bias.assign(np.full(27, np.nan))
try:
    tf.function(layer)(x)
except tf.errors.InvalidArgumentError as error:
    print("NaN" in str(error))
"""


def test_who_looks_for_nan_finds_none_in_a_healthy_graph(run_python):
    received = run_python(_CHECK_NUMERICS).splitlines()
    assert received == ["(2, 4, 5, 4) (2, 4, 5, 4)", "True"]
