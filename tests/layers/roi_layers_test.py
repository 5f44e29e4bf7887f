# SPDX-License-Identifier: Apache-2.0
"""Tests the values and the training of the layers that pool regions.

The common behaviour of all layers is tested in contract_test.py.
"""

import ctypes

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import (
    DENSE,
    KINDS,
    POOL_BRANCHES,
    POOLS,
    TRANS_CHANNELS,
    built,
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
    pool_factors,
    symbols,
    value_and_gradients,
)
from operands import random

import tf_deform
from tf_deform import _loader

every_pool = pytest.mark.parametrize("kind", POOLS)
every_branch = pytest.mark.parametrize(
    ("kind", "config"), POOL_BRANCHES, ids=str
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


@every_branch
def test_displace_moves_bins_by_more_than_a_pixel(kind, config):
    """Tests the helper `displace`, on which the other tests rely."""
    layer, call = built(kind, "own", **config)
    moves = pool_branch(layer, **call) * getattr(layer, KINDS[kind].factor)
    dy, dx = moves[..., 0::2], moves[..., 1::2]
    assert 0.2 < np.mean(dy) < 0.4 and -0.6 < np.mean(dx) < -0.3
    assert np.std(dy) > 0.1 and np.std(dx) > 0.1
    plain = by_hand(layer, call["inputs"], call["rois"])
    output = layer(**call)
    assert np.mean(np.abs(output - plain)) > 0.1
    assert np.count_nonzero(output) > 0.5 * plain.size


# The branch.


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)]
)
@every_branch
def test_own_branch(kind, config, dtype, tolerance):
    """Computes displacements from the weights, and the result, by hand."""
    layer = displaced(kind, dtype=dtype, **config)
    call = {k: v.astype(dtype) for k, v in own_call(kind).items()}
    displacements = pool_branch(layer, **call)
    expected = by_hand(layer, call["inputs"], call["rois"], displacements)
    expected *= pool_factors(layer, call["inputs"], call["rois"])
    assert_close(layer(**call), expected, tolerance)


@every_branch
def test_a_new_layer_pools_plainly(kind, config):
    """Tests a new layer, whose branches give zeros: half with a sigmoid."""
    layer, call = new(kind, **config), own_call(kind)
    plain = by_hand(layer, *plain_call(kind).values())
    plain *= 0.5 if "modulation" in config else 1
    assert_close(layer(**call), plain, 1e-5)
    for variable in layer.weights:
        if "hidden_kernel" in variable.name:
            assert np.std(variable) > 0.1
        else:
            assert not np.any(variable)


@pytest.mark.parametrize(
    ("kind", "config", "call"),
    [(kind, config, own_call) for kind, config in POOL_BRANCHES]
    + [(kind, {}, given_call) for kind in POOLS],
)
def test_displacements_of_zero_are_none(kind, config, call):
    """Compares bits with those of plain pooling."""
    call = widen(kind, call(kind))
    if KINDS[kind].given in call:
        call[KINDS[kind].given] *= 0
    layer = new(kind, **WIDE[kind], **config)
    output = layer(**call)
    plain = by_the_op(layer, call["inputs"], call["rois"])
    assert_equal(output, plain * 0.5 if "modulation" in config else plain)


@pytest.mark.parametrize("kind", DENSE)
def test_shapes_of_a_dense_branch(kind):
    layer = displaced(kind)
    assert layer.offset_kernel.shape == (3 * 4 * 6, 3 * 4 * 2)
    assert layer.offset_bias.shape == (3 * 4 * 2,)
    layer = displaced(kind, units=[8, 5])
    assert layer.units == (8, 5)
    assert [(v.name, tuple(v.shape)) for v in layer.weights] == [
        ("offset_hidden_kernel_0", (3 * 4 * 6, 8)),
        ("offset_hidden_bias_0", (8,)),
        ("offset_hidden_kernel_1", (8, 5)),
        ("offset_hidden_bias_1", (5,)),
        ("offset_kernel", (5, 3 * 4 * 2)),
        ("offset_bias", (3 * 4 * 2,)),
    ]


def test_shapes_of_a_modulating_branch():
    layer = displaced("align", units=[8, 5], modulation="sigmoid")
    assert [(v.name, tuple(v.shape)) for v in layer.weights[6:]] == [
        ("offset_modulator_hidden_kernel_0", (3 * 4 * 6, 8)),
        ("offset_modulator_hidden_bias_0", (8,)),
        ("offset_modulator_kernel", (8, 3 * 4)),
        ("offset_modulator_bias", (3 * 4,)),
    ]
    assert layer.offset_modulator_kernel is layer.weights[8]
    # One that is given displacements has no branch at all.
    layer = new("align", modulation="sigmoid")
    call = given_call("align")
    assert_equal(layer(**call), by_the_op(layer, *call.values()))
    assert layer.weights == []


def test_order_of_factors():
    """Sets one number of the bias."""
    layer = new("align", modulation="sigmoid")
    call = own_call("align")
    half = layer(**call).numpy()
    assert np.all(np.any(half, (0, 3)))
    for row, column in np.ndindex(3, 4):
        bias = np.zeros((3, 4), np.float32)
        bias[row, column] = np.log(3)
        layer.offset_modulator_bias.assign(bias.reshape(-1))
        expected = half.copy()
        expected[:, row, column] *= 1.5
        assert_close(layer(**call), expected, 1e-6)


def test_shapes_of_a_position_sensitive_branch():
    layer = displaced("psroi")
    assert layer.offset_kernel.shape == (1, 1, TRANS_CHANNELS, 3 * 2 * 2 * 5)
    assert layer.offset_bias.shape == (3 * 2 * 2 * 5,)
    layer = new("psroi", group_size=None, part_size=None)
    assert layer.group_size == layer.part_size == (3, 4)


def _ramps(channels: int) -> np.ndarray:
    """Makes maps whose pixels are `y` (even channels) or `x` (odd channels)."""
    grid = np.stack(np.mgrid[:30, :30], -1).astype(np.float32)
    return np.tile(grid, channels // 2)[np.newaxis]


# Displacements of the fields of the branch of one region of 10 (ROIAlign: 9.75)
# map pixels, and of the two channels, `y` and `x`, of a class.
@pytest.mark.parametrize(
    ("kind", "config", "fields", "reach"),
    [
        (
            "psroi",
            {"group_size": 1, "pooled_size": (4, 10)},
            (3, 2, 2, 5),  # [class][(dy, dx)][part_h][part_w]
            10,
        ),
        ("pool", {}, (3, 4, 2), 10),  # [ph][pw][(dy, dx)]
        ("align", {}, (3, 4, 2), 39 / 4),
    ],
)
def test_order_of_fields(kind, config, fields, reach):
    """Sets one number of the bias."""
    layer = new(kind, **config)
    channels = 6 if kind == "psroi" else 2
    call = {
        "inputs": _ramps(channels),
        "rois": np.float32([[0, 40, 40, 79, 79]]),
    }
    if kind == "psroi":
        call["trans_inputs"] = np.zeros((1, 30, 30, 1), np.float32)
    plain = layer(**call)
    for field in np.ndindex(fields):
        bias = np.zeros(fields, np.float32)
        bias[field] = 0.25
        layer.offset_bias.assign(bias.reshape(-1))
        moved = np.zeros(plain.shape)
        if kind == "psroi":
            k, axis, i, j = field
            rows, cols = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
            moved[0, rows, cols, 2 * k + axis] = 0.25 * 0.5 * reach
        else:
            moved[(0, *field)] = 0.25 * 0.5 * reach
        assert_close(layer(**call), plain + moved, 1e-5, case=field)


# Regions that are none.


@pytest.mark.parametrize("case", ["no ROIs", "no images", "index", "corner"])
@every_branch
def test_nothing_to_pool(kind, config, case):
    """Tests zeros and no gradient without regions, or with padding alone."""
    layer, call = built(kind, "own", **config)
    if case == "no ROIs":
        call["rois"] = call["rois"][:0]
    elif case == "corner":
        call["rois"][:, 3] = np.nan
    else:
        call["rois"][:, 0] = -1
    if case == "no images":
        call = {k: v if k == "rois" else v[:0] for k, v in call.items()}
    output, operands, weights = value_and_gradients(layer, call, layer.weights)
    assert_equal(output, np.zeros((len(call["rois"]), 3, 4, 6)))
    call.pop("rois")
    operands.pop("rois")
    zeros = {name: np.zeros(value.shape) for name, value in call.items()}
    assert_equal(operands, zeros, name="gradients")
    zeros = [np.zeros(weight.shape) for weight in layer.weights]
    assert_equal(weights, zeros, name="gradients of weights")
    call["rois"] = np.zeros((0, 5), np.float32)
    assert layer(**call).shape == (0, 3, 4, 6)


@pytest.mark.parametrize("bad", [-1.0, np.nan])
@every_branch
def test_padding_among_others_has_no_say(kind, config, bad):
    """Tests that values and gradients are as if there were no padding."""
    layer, call = built(kind, "own", **config)
    expected, *expected_gradients = value_and_gradients(
        layer, call, layer.weights
    )
    nowhere = np.float32([[0, 4, 8, 20, 24]] * 3)
    nowhere[:, 0 if bad == -1 else 2] = bad
    # Padding goes to the end, so that the weights of the sum stay the same.
    call["rois"] = np.concatenate([call["rois"], nowhere])
    output, *gradients = value_and_gradients(layer, call, layer.weights)
    # A product of more rows may round otherwise, and so move the bins.
    assert_close(output[:7], expected, 1e-6)
    assert_equal(output[7:], np.zeros((3, 3, 4, 6)))
    assert_close(gradients, expected_gradients, 1e-6, name="gradients")
    assert all(np.any(gradient) for gradient in expected_gradients[1])


# Gradients.


@every_branch
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


# Training.


@every_pool
def test_a_branch_learns_to_look_at_a_shifted_blob(kind):
    """Learns from another map on which side a blob lies, 4 pixels away."""
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
    call = own_call("align")
    inputs = symbols(call)
    x = keras.layers.Conv2D(6, 1, name="stem")(inputs["inputs"])
    layer = new("align", units=(8,), name="head")
    model = keras.Model(inputs, layer(x, inputs["rois"]))
    displace(layer)
    model.compile(
        tf_deform.training.deformable_optimizer(keras.optimizers.SGD(0.1), 0),
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
    """Counts the computed gradients of inputs and of displacements."""
    counts = (ctypes.c_int64 * 2)()
    name = "DeformableROIAlign" if kind == "align" else "DeformablePSROIPool"
    library = ctypes.CDLL(_loader.LIBRARY)
    getattr(library, f"TfDeform{name}GradientsComputed")(counts)
    return np.array(counts[:])


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize(("source", "counts"), [("own", 0), ("given", 1)])
@every_pool
def test_what_costs_no_gradient(kind, source, counts, mode):
    """Tests a frozen layer before a head that learns, and given constants.

    Of a frozen layer not even gradients of displacements are computed. Given
    displacements that are constant leave the gradient of the inputs.
    """
    layer, call = built(kind, source)
    call = {name: tf.constant(value) for name, value in call.items()}
    layer.trainable = source == "given"
    head = keras.layers.Dense(1)
    head.build((None, 3, 4, 6))

    def gradient():
        with tf.GradientTape() as tape:
            if source == "given":
                tape.watch(call["inputs"])
            output = head(layer(**call))
        sources = [*head.trainable_variables, call["inputs"]]
        return tape.gradient(output, sources)

    before = gradients_computed(kind)
    gradients = (gradient if mode == "eager" else tf.function(gradient))()
    assert np.any(gradients[0])
    assert_equal(gradients_computed(kind) - before, [counts, 0])
