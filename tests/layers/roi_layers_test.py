# SPDX-License-Identifier: Apache-2.0
"""Tests the values and the training of the layers that pool regions.

The common behaviour of all layers is tested in contract_test.py.
"""

import ctypes
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import (
    CALLS,
    DENSE,
    KINDS,
    POOL_BRANCHES,
    POOLS,
    TRANS_CHANNELS,
    by_hand,
    by_the_op,
    displace,
    displaced,
    fit,
    given_call,
    loss_of,
    model_of,
    new,
    own_call,
    plain_call,
    pool_branch,
    symbols,
)
from operands import random

from tf_deform import _loader
from tf_deform.layers import (
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

# Kernels take several narrow classes at once, and then sum in another order.
# The bits equal those of plain pooling only with one class, or with wide
# classes.
WIDE = {"psroi": {"output_dim": 48}, "pool": {}, "align": {}}


def widen(kind: str, call: dict) -> dict:
    """Widens the call to 16 channels for each of 3 classes, for `WIDE`."""
    if kind != "psroi":
        return call
    return {**call, "inputs": random(2, 11, 12, 3 * 2 * 48)}


@pytest.mark.parametrize(("kind", "config"), POOL_BRANCHES, ids=str)
def test_displace_moves_bins_by_more_than_a_pixel(kind, config):
    """Tests the helper `displace`, on which the other tests rely."""
    layer, call = displaced(kind, **config), own_call(kind)
    moves = pool_branch(layer, **call) * getattr(layer, KINDS[kind].factor)
    dy, dx = moves[..., 0::2], moves[..., 1::2]
    assert 0.2 < np.mean(dy) < 0.4 and -0.6 < np.mean(dx) < -0.3
    assert np.std(dy) > 0.1 and np.std(dx) > 0.1
    plain = by_hand(layer, call["inputs"], call["rois"])
    output = layer(**call)
    assert np.mean(np.abs(output - plain)) > 0.1
    assert np.count_nonzero(output) > 0.5 * plain.size


# Arguments.


def test_signatures_are_those_of_the_design():
    def of(function):
        parameters = inspect.signature(function).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.name not in ("self", "kwargs")
        }

    required = inspect.Parameter.empty
    assert of(DeformablePSROIPooling.__init__) == {
        "output_dim": required,
        "pooled_size": required,
        "spatial_scale": required,
        "group_size": None,
        "part_size": None,
        "sample_per_part": 4,
        "trans_std": 0.1,
        "num_classes": 1,
        "data_format": None,
        "implementation": "native",
    }
    assert of(DeformableROIPooling.__init__) == {
        "pooled_size": required,
        "spatial_scale": required,
        "sample_per_part": 4,
        "trans_std": 0.1,
        "units": (),
        "data_format": None,
        "implementation": "native",
    }
    assert of(DeformableROIAlign.__init__) == {
        "pooled_size": required,
        "spatial_scale": required,
        "sampling_ratio": 0,
        "gamma": 0.1,
        "units": (),
        "data_format": None,
        "implementation": "native",
    }
    given = {"inputs": required, "rois": required, "offset": None}
    assert of(DeformableROIPooling.call) == given
    assert of(DeformableROIAlign.call) == given
    assert of(DeformablePSROIPooling.call) == {
        "inputs": required,
        "rois": required,
        "trans": None,
        "trans_inputs": None,
    }


def test_one_size_is_both():
    layer = DeformablePSROIPooling(2, 3, 1.0, group_size=2, part_size=4)
    assert layer.pooled_size == (3, 3)
    assert layer.group_size == (2, 2) and layer.part_size == (4, 4)
    layer = DeformablePSROIPooling(2, [3, 2], 1.0)
    assert layer.group_size == layer.part_size == (3, 2)
    for each in (DeformableROIPooling, DeformableROIAlign):
        assert each(3, 1).pooled_size == (3, 3)
        assert each([3, 2], 1, units=[4, 5]).units == (4, 5)


# The branch.


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)]
)
@pytest.mark.parametrize(("kind", "config"), POOL_BRANCHES, ids=str)
def test_own_branch(kind, config, dtype, tolerance):
    """Computes displacements from the weights, and the result, by hand."""
    layer = displaced(kind, dtype=dtype, **config)
    call = {k: v.astype(dtype) for k, v in own_call(kind).items()}
    displacements = pool_branch(layer, **call)
    expected = by_hand(layer, call["inputs"], call["rois"], displacements)
    assert_close(layer(**call), expected, tolerance)
    expected = by_the_op(
        layer, call["inputs"], call["rois"], displacements.astype(dtype)
    )
    assert_close(layer(**call), expected, tolerance)


@pytest.mark.parametrize(("kind", "config"), POOL_BRANCHES, ids=str)
def test_a_new_layer_pools_plainly(kind, config):
    """Tests a new layer, whose branch gives zeros."""
    layer, call = new(kind, **config), own_call(kind)
    assert_close(
        layer(**call), by_hand(layer, call["inputs"], call["rois"]), 1e-5
    )
    wide, call = new(kind, **WIDE[kind], **config), widen(kind, call)
    plain = by_the_op(wide, call["inputs"], call["rois"])
    assert_equal(wide(**call), plain)
    assert not np.any(layer.offset_kernel) and not np.any(layer.offset_bias)
    for variable in layer.weights:
        if "hidden_kernel" in variable.name:
            assert np.std(variable) > 0.1
        else:
            assert not np.any(variable)


def test_without_displacements_position_sensitive_pooling_is_plain():
    """Tests plain pooling, for which a branch needs no input."""
    call = plain_call("psroi")
    layer = new("psroi")
    plain = by_the_op(layer, **call)
    assert_equal(layer(**call), plain)
    assert layer.weights == []
    assert_equal(displaced("psroi")(**call), plain)


def test_shapes_of_the_branch():
    layer = displaced("psroi")
    assert layer.offset_kernel.shape == (1, 1, TRANS_CHANNELS, 3 * 2 * 2 * 5)
    assert layer.offset_bias.shape == (3 * 2 * 2 * 5,)
    for kind in DENSE:
        layer = displaced(kind)
        assert layer.offset_kernel.shape == (3 * 4 * 6, 3 * 4 * 2)
        assert layer.offset_bias.shape == (3 * 4 * 2,)
        layer = displaced(kind, units=(8, 5))
        assert [(v.name, tuple(v.shape)) for v in layer.weights] == [
            ("offset_hidden_kernel_0", (3 * 4 * 6, 8)),
            ("offset_hidden_bias_0", (8,)),
            ("offset_hidden_kernel_1", (8, 5)),
            ("offset_hidden_bias_1", (5,)),
            ("offset_kernel", (5, 3 * 4 * 2)),
            ("offset_bias", (3 * 4 * 2,)),
        ]
        parameters = (72 * 8 + 8) + (8 * 5 + 5) + (5 * 24 + 24)
        assert layer.count_params() == parameters


def _ramps(channels: int) -> np.ndarray:
    """Makes maps whose pixels are `y` (even channels) or `x` (odd channels)."""
    grid = np.stack(np.mgrid[:30, :30], -1).astype(np.float32)
    return np.tile(grid, channels // 2)[np.newaxis]


def test_order_of_position_sensitive_fields():
    """Sets one number of the bias at `[class][(dy, dx)][part_h][part_w]`."""
    config = {"group_size": 1, "output_dim": 6, "pooled_size": (4, 10)}
    layer = new("psroi", **config)
    call = {
        "inputs": _ramps(6),
        "rois": np.float32([[0, 40, 40, 79, 79]]),  # 10 map pixels
        "trans_inputs": np.zeros((1, 30, 30, 1), np.float32),
    }
    plain = layer(**call)
    for field in np.ndindex(3, 2, 2, 5):
        bias = np.zeros((3, 2, 2, 5), np.float32)
        bias[field] = 0.25
        layer.offset_bias.assign(bias.reshape(-1))
        moved = np.zeros((1, 4, 10, 6))
        k, axis, row, col = field  # channels 2k (y) and 2k + 1 (x)
        rows, cols = slice(2 * row, 2 * row + 2), slice(2 * col, 2 * col + 2)
        moved[0, rows, cols, 2 * k + axis] = 0.25 * 0.5 * 10
        assert_close(layer(**call), plain + moved, 1e-5)


@pytest.mark.parametrize("kind", DENSE)
def test_order_of_dense_fields(kind):
    """Sets one number of the bias at `[ph][pw][(dy, dx)]`."""
    layer = new(kind)
    call = {"inputs": _ramps(2), "rois": np.float32([[0, 40, 40, 79, 79]])}
    plain = layer(**call)
    size = 10 if kind == "pool" else 39 / 4
    for field in np.ndindex(3, 4, 2):
        bias = np.zeros((3, 4, 2), np.float32)
        bias[field] = 0.25
        layer.offset_bias.assign(bias.reshape(-1))
        moved = np.zeros((1, 3, 4, 2))
        moved[(0, *field)] = 0.25 * 0.5 * size
        assert_close(layer(**call), plain + moved, 1e-5)


# Displacements given by the caller.


@pytest.mark.parametrize("kind", POOLS)
def test_displacements_of_zero_are_none(kind):
    call = given_call(kind)
    call[KINDS[kind].given] *= 0
    plain = by_hand(new(kind), call["inputs"], call["rois"])
    assert_close(new(kind)(**call), plain, 1e-5)
    call = widen(kind, call)
    layer = new(kind, **WIDE[kind])
    plain = by_the_op(layer, call["inputs"], call["rois"])
    assert_equal(layer(**call), plain)


# The number of ROIs is small and odd.


@pytest.mark.parametrize("how", ["eager", "known", "unknown", "rank unknown"])
@pytest.mark.parametrize(("kind", "config"), POOL_BRANCHES, ids=str)
def test_in_tf_function(kind, config, how):
    layer, call = displaced(kind, **config), own_call(kind)
    specs = {
        k: {
            "eager": None,
            "known": tf.TensorSpec(v.shape),
            "unknown": tf.TensorSpec((None,) * (v.ndim - 1) + v.shape[-1:]),
            "rank unknown": tf.TensorSpec(None),
        }[how]
        for k, v in call.items()
    }
    if how == "rank unknown" and kind != "psroi":
        specs["inputs"] = tf.TensorSpec((None, None, None, 6))

    def function(*tensors):
        return layer(**dict(zip(call, tensors, strict=True)))

    if how != "eager":
        function = tf.function(function, input_signature=[*specs.values()])
    for count in (7, 0, 1):
        call = own_call(kind, count)
        if how == "known" and count != 7:
            continue
        expected = by_the_op(
            layer,
            call["inputs"],
            call["rois"],
            pool_branch(layer, **call).astype(np.float32),
        )
        assert expected.shape == (count, 3, 4, 6)
        actual = function(*call.values())
        assert actual.shape == (count, 3, 4, 6)
        if count:
            assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("kind", POOLS)
def test_in_tf_function_of_unknown_channels(kind):
    """Tests that a branch takes the number of channels from its weights."""
    layer, call = displaced(kind), own_call(kind)
    function = tf.function(
        lambda *tensors: layer(**dict(zip(call, tensors, strict=True))),
        input_signature=[tf.TensorSpec(None)] * len(call),
    )
    assert_equal(function(*call.values()), layer(**call))


def _value_and_gradients(layer: keras.layers.Layer, call: dict) -> tuple:
    """Returns gradients of a weighted sum, by weights, then by `inputs`."""
    call = {k: tf.constant(v) for k, v in call.items()}
    with tf.GradientTape() as tape:
        tape.watch(call["inputs"])
        output = layer(**call)
        weight = tf.reshape(tf.range(tf.size(output)), output.shape)
        loss = tf.reduce_sum(output * tf.cos(tf.cast(weight, output.dtype)))
    sources = [*(v.value for v in layer.weights), call["inputs"]]
    return output.numpy(), [g.numpy() for g in tape.gradient(loss, sources)]


@pytest.mark.parametrize(("kind", "config"), POOL_BRANCHES, ids=str)
def test_no_rois(kind, config):
    layer = displaced(kind, **config)
    output, gradients = _value_and_gradients(layer, own_call(kind, 0))
    assert output.shape == (0, 3, 4, 6)
    for gradient in gradients:
        assert not np.any(gradient)
    assert [g.shape for g in gradients[:-1]] == [v.shape for v in layer.weights]


@pytest.mark.parametrize("kind", POOLS)
def test_no_images(kind):
    """Tests that without images only padding can be pooled."""
    layer, call = displaced(kind), own_call(kind)
    call = {k: v if k == "rois" else v[:0] for k, v in call.items()}
    call["rois"][:, 0] = -1
    output, gradients = _value_and_gradients(layer, call)
    assert_equal(output, np.zeros((7, 3, 4, 6)))
    for gradient in gradients:
        assert not np.any(gradient)
    call["rois"] = call["rois"][:0]
    assert layer(**call).shape == (0, 3, 4, 6)


@pytest.mark.parametrize("bad", [-1.0, np.nan])
@pytest.mark.parametrize("kind", POOLS)
def test_padding_gives_zeros_and_no_gradient(kind, bad):
    """Tests ROIs with a negative index, or with a corner that is not finite."""
    layer, call = displaced(kind), own_call(kind)
    call["rois"][:, 0 if bad == -1 else 3] = bad
    output, gradients = _value_and_gradients(layer, call)
    assert_equal(output, np.zeros((7, 3, 4, 6)))
    for gradient in gradients:
        assert not np.any(gradient)


@pytest.mark.parametrize("bad", [-1.0, np.nan])
@pytest.mark.parametrize(("kind", "config"), POOL_BRANCHES, ids=str)
def test_padding_among_others_has_no_say(kind, config, bad):
    """Tests that values and gradients are as if there were no padding."""
    layer, call = displaced(kind, **config), own_call(kind)
    expected, expected_gradients = _value_and_gradients(layer, call)
    nowhere = np.float32([[0, 4, 8, 20, 24]] * 3)
    nowhere[:, 0 if bad == -1 else 2] = bad
    # Padding goes to the end, so that the weights of the sum stay the same.
    call["rois"] = np.concatenate([call["rois"], nowhere])
    output, gradients = _value_and_gradients(layer, call)
    assert_equal(output[:7], expected)
    assert_equal(output[7:], np.zeros((3, 3, 4, 6)))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.any(theirs)
        assert_close(ours, theirs, 1e-6)


def test_export_of_a_layer_alone(tmp_path):
    layer = displaced("pool", units=(8,))
    archive = keras.export.ExportArchive()
    archive.track(layer)
    signature = [
        tf.TensorSpec((None, None, None, 6)),
        tf.TensorSpec((None, 5)),
    ]
    archive.add_endpoint("serve", layer.__call__, signature)
    archive.write_out(tmp_path / "layer", verbose=False)
    served = tf.saved_model.load(tmp_path / "layer")
    call = own_call("pool")
    assert_equal(served.serve(*call.values()), layer(**call))


# Gradients.


@pytest.mark.parametrize(("kind", "config"), POOL_BRANCHES, ids=str)
def test_gradients_equal_finite_differences(kind, config):
    """Compares all weights and inputs, through the branch and around it."""
    small = {"pooled_size": (2, 3), "dtype": "float64", **config}
    channels = 4
    if kind == "psroi":
        small |= {"output_dim": 4, "group_size": (2, 1), "num_classes": 2}
        small |= {"part_size": (1, 2)} if "part_size" not in config else {}
        small |= config
        channels = 8
    layer = new(kind, **small)
    # Small ROIs in a large map keep samples away from the edge.
    rois = np.array([[0, 42.3, 41.1, 58.2, 55.4], [1, 38.2, 46.3, 52.9, 60.7]])
    arrays = {"inputs": random(2, 26, 25, channels), "rois": rois}
    if kind == "psroi":
        arrays["trans_inputs"] = random(2, 26, 25, 3, seed=1)
    call = {
        k: tf.Variable(v.astype(np.float64), trainable=k != "rois")
        for k, v in arrays.items()
    }
    layer(**call)
    displace(layer)
    variables = [*(v.value for v in layer.weights), call["inputs"]]
    if kind == "psroi":
        variables.append(call["trans_inputs"])
    weight = random(*layer(**call).shape, seed=7).astype(np.float64)

    @tf.function
    def loss():
        return tf.reduce_sum(weight * layer(**call))

    with tf.GradientTape() as tape:
        value = loss()
    rng = np.random.default_rng(0)
    for variable, gradient in zip(
        variables, tape.gradient(value, variables), strict=True
    ):
        old, gradient = variable.numpy(), gradient.numpy().reshape(-1)
        assert np.any(gradient)
        # All numbers of a weight, and the pixels of a map that are read.
        indices = np.flatnonzero(gradient)
        if old.ndim == 4 and old.shape[0] > 1:
            assert len(indices) < old.size
        for index in rng.permutation(indices)[:30]:
            values = []
            for step in (1e-6, -1e-6):
                near = old.copy()
                near.reshape(-1)[index] += step
                variable.assign(near)
                values.append(float(loss()))
            slope = (values[0] - values[1]) / 2e-6
            scale = np.abs(gradient).max()
            assert abs(slope - gradient[index]) < 1e-6 * scale
        variable.assign(old)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("source", CALLS)
@pytest.mark.parametrize("kind", POOLS)
def test_rois_have_no_gradient(kind, source, mode):
    call = {k: tf.constant(v) for k, v in CALLS[source](kind).items()}
    layer = new(kind)
    layer(**call)
    if source == "own":
        displace(layer)

    def gradients():
        with tf.GradientTape() as tape:
            tape.watch([call["inputs"], call["rois"]])
            output = layer(**call)
        gradients = tape.gradient(output, [call["inputs"], call["rois"]])
        assert gradients[1] is None
        return gradients[0]

    assert np.any((gradients if mode == "eager" else tf.function(gradients))())


# Training.


@pytest.mark.parametrize("kind", POOLS)
def test_a_branch_learns_to_look_at_a_shifted_blob(kind):
    """Learns that a blob lies 4 pixels right or left.

    Another map tells the side.
    """
    config = {"pooled_size": 1, "spatial_scale": 1.0}
    rng = np.random.default_rng(0)
    side = np.tile([1.0, -1.0], 4)
    y, x = rng.uniform(10, 14, (2, 8))
    rois = np.stack([np.arange(8), x - 3, y - 3, x + 3, y + 3], 1)
    rows, cols = np.mgrid[:24, :24]
    dy = rows - y.reshape(8, 1, 1)
    dx = cols - (x + 4 * side).reshape(8, 1, 1)
    blob = np.exp(-(dx**2 + dy**2) / 18)
    cue = np.broadcast_to(side.reshape(8, 1, 1), blob.shape)
    maps = [blob, blob * dy / 3, blob * dx / 3]
    if kind == "psroi":
        config |= {"output_dim": 3, "group_size": 1, "part_size": 1}
        config |= {"num_classes": 1}
        call = {"inputs": maps, "rois": rois, "trans_inputs": [cue]}
    else:
        call = {"inputs": [*maps, cue], "rois": rois}
    call = {
        k: (v if k == "rois" else np.stack(v, -1)).astype(np.float32)
        for k, v in call.items()
    }
    layer = new(kind, **config)
    model = model_of(layer, call)
    # These are the displacements that centre the blob.
    reach = 0.5 * (6 if kind == "align" else 7)
    ideal = np.zeros((8, 1, 1, 2), np.float32)
    ideal[:, 0, 0, 1] = 4 * side / reach
    target = by_the_op(layer, call["inputs"], call["rois"], ideal)

    model.compile(keras.optimizers.Adam(0.05), "mse")
    before = loss_of(model, call, target)
    fit(model, call, target, steps=100)
    assert loss_of(model, call, target) < 0.05 * before
    dy, dx = reach * pool_branch(layer, **call)[:, 0, 0].T
    assert np.all(np.abs(dx - 4 * side) < 1.0)
    assert np.all(np.abs(dy) < 1.0)


def test_a_learning_rate_of_its_own():
    """Sets the rate of the branch's weights by a pattern of their names."""
    call = own_call("align")
    inputs = symbols(call)
    x = keras.layers.Conv2D(6, 1, name="stem")(inputs["inputs"])
    layer = new("align", units=(8,), name="head")
    model = keras.Model(inputs, layer(x, inputs["rois"]))
    displace(layer)
    slow = {r".*/offset_(hidden_)?(kernel|bias).*": keras.optimizers.SGD(0.0)}
    model.compile(
        keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), slow)
        ),
        "mse",
    )
    stem = model.get_layer("stem")
    before = [each.get_weights() for each in (layer, stem)]
    fit(model, call, random(7, 3, 4, 6))
    after = [each.get_weights() for each in (layer, stem)]
    for old, new_ in zip(before[0], after[0], strict=True):
        assert_equal(new_, old)
    for old, new_ in zip(before[1], after[1], strict=True):
        assert np.any(new_ != old)


def gradients_computed(kind: str) -> np.ndarray:
    """Returns how many gradients have been computed.

    These are gradients of inputs and displacements.
    """
    counts = (ctypes.c_int64 * 2)()
    name = "DeformableROIAlign" if kind == "align" else "DeformablePSROIPool"
    library = ctypes.CDLL(_loader.LIBRARY)
    getattr(library, f"TfDeform{name}GradientsComputed")(counts)
    return np.array(counts[:])


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("kind", POOLS)
def test_a_frozen_layer_costs_no_gradient_when_only_a_head_learns(kind, mode):
    """Tests that not even gradients of displacements are computed."""
    layer, call = displaced(kind), own_call(kind)
    layer.trainable = False
    head = keras.layers.Dense(1)
    head.build((None, 3, 4, 6))

    def gradient():
        with tf.GradientTape() as tape:
            output = head(layer(**call))
        return tape.gradient(output, head.trainable_variables)

    before = gradients_computed(kind)
    gradients = (gradient if mode == "eager" else tf.function(gradient))()
    assert np.any(gradients[0])
    assert_equal(gradients_computed(kind) - before, [0, 0])


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("kind", POOLS)
def test_given_constants_cost_no_gradient(kind, mode):
    layer = new(kind)
    call = {k: tf.constant(v) for k, v in given_call(kind).items()}

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(call["inputs"])
            output = layer(**call)
        return tape.gradient(output, call["inputs"])

    before = gradients_computed(kind)
    (gradient if mode == "eager" else tf.function(gradient))()
    assert_equal(gradients_computed(kind) - before, [1, 0])
