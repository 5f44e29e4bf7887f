# SPDX-License-Identifier: Apache-2.0
"""Tests of the Keras layers that pool regions of interest.

A new layer's branch is zero, and then almost anything that is wrong with
displacements goes unseen. So the tests start with `displaced`, which gives the
branch random values that move bins by more than a pixel.
"""

import copy
import ctypes
import inspect
import json
import math
import pickle
import re
from typing import NamedTuple

import keras
import numpy as np
import pytest
import roi_reference
import tensorflow as tf

from tf_deform import _build_info, _loader
from tf_deform.layers import (
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)
from tf_deform.ops import deformable_psroi_pool, deformable_roi_align


class Kind(NamedTuple):
    layer: type
    config: dict  # What the tests construct it with, if they do not mind.
    channels: int  # Of `inputs`, with this config.
    given: str  # The argument that takes displacements.
    displacements: tuple[int, ...]  # Its shape for one ROI.
    factor: str  # The argument that scales them.


KINDS = {
    "psroi": Kind(
        DeformablePSROIPooling,
        {
            "output_dim": 6,
            "pooled_size": (3, 4),
            "spatial_scale": 0.25,
            "group_size": (3, 2),
            "part_size": (2, 5),
            "sample_per_part": 3,
            "trans_std": 0.5,
            "num_classes": 3,
        },
        36,
        "trans",
        (2, 5, 6),
        "trans_std",
    ),
    "pool": Kind(
        DeformableROIPooling,
        {
            "pooled_size": (3, 4),
            "spatial_scale": 0.25,
            "sample_per_part": 3,
            "trans_std": 0.5,
        },
        6,
        "offset",
        (3, 4, 2),
        "trans_std",
    ),
    "align": Kind(
        DeformableROIAlign,
        {
            "pooled_size": (3, 4),
            "spatial_scale": 0.25,
            "sampling_ratio": 3,
            "gamma": 0.5,
        },
        6,
        "offset",
        (3, 4, 2),
        "gamma",
    ),
}
DENSE = ["pool", "align"]  # Those whose branch is made of dense layers.
TRANS_CHANNELS = 7
EVERY_BRANCH = [
    ("psroi", {}),
    ("psroi", {"num_classes": 1}),
    ("psroi", {"part_size": None}),
    *[
        (kind, {"units": units})
        for kind in DENSE
        for units in [(), (8,), (8, 4)]
    ],
]
FLOAT_POLICIES = ["float32", "float64", "mixed_float16", "mixed_bfloat16"]


def new(kind: str, **config: object) -> keras.layers.Layer:
    return KINDS[kind].layer(**{**KINDS[kind].config, **config})


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def regions(count: int = 7) -> np.ndarray:
    """ROIs of 4 to 6 map pixels inside of the 11x12 maps of two images."""
    rng = np.random.default_rng(5)
    rois = np.zeros((count, 5), np.float32)
    rois[:, 0] = np.arange(count) % 2
    rois[:, 1:3] = rng.uniform(4, 22, (count, 2))
    rois[:, 3:] = rois[:, 1:3] + rng.uniform(16, 24, (count, 2))
    return rois


def operands(kind: str, count: int = 7, seed: int = 0) -> dict:
    """What the layer is called with for its own branch to run."""
    result = {
        "inputs": random(2, 11, 12, KINDS[kind].channels, seed=seed),
        "rois": regions(count),
    }
    if kind == "psroi":
        result["trans_inputs"] = random(
            2, 11, 12, TRANS_CHANNELS, seed=seed + 1
        )
    return result


def given_operands(kind: str, count: int = 7) -> dict:
    """What the layer is called with to take displacements as they are."""
    result = operands(kind, count)
    result.pop("trans_inputs", None)
    size = (count, *KINDS[kind].displacements)
    result[KINDS[kind].given] = 0.8 * random(*size, seed=3)
    return result


def plain_operands(kind: str) -> dict:
    return {name: operands(kind)[name] for name in ("inputs", "rois")}


# Kernels take several narrow classes at once, and then sum in another order:
# bits are those of plain pooling with one class, or with wide ones.
WIDE = {"psroi": {"output_dim": 48}, "pool": {}, "align": {}}


def widen(kind: str, call: dict) -> dict:
    """The same call with 16 channels for each of 3 classes, for `WIDE`."""
    if kind != "psroi":
        return call
    return {**call, "inputs": random(2, 11, 12, 3 * 2 * 48)}


def symbols(call: dict, **dtypes: str) -> dict:
    """Inputs of a model that is called with `call`."""
    return {
        name: keras.Input(value.shape[1:], dtype=dtypes.get(name), name=name)
        for name, value in call.items()
    }


def model_of(layer: keras.layers.Layer, call: dict, **dtypes) -> keras.Model:
    inputs = symbols(call, **dtypes)
    return keras.Model(inputs, layer(**inputs))


def fit(model: keras.Model, call: dict, target, steps: int = 1) -> None:
    """Trains with one batch: ROIs are not as many as images."""
    data = tf.data.Dataset.from_tensors((call, target)).repeat(steps)
    model.fit(data, shuffle=False, verbose=0)


def loss_of(model: keras.Model, call: dict, target) -> float:
    data = tf.data.Dataset.from_tensors((call, target))
    return model.evaluate(data, verbose=0)


def displace(layer: keras.layers.Layer, seed: int = 0) -> None:
    """Sets the branch: bins move by about (0.3, -0.45) +- 0.2 ROIs."""
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        fan_in = math.prod(variable.shape[:-1])
        scale = 0.3 if variable.name == "offset_bias" else fan_in**-0.5
        variable.assign(rng.normal(0, scale, variable.shape))
    bias = layer.offset_bias.numpy()
    if isinstance(layer, DeformablePSROIPooling):  # [class][(dy, dx)][part]
        fields = bias.reshape(layer.num_classes, 2, -1)
        fields += np.array([0.6, -0.9])[:, np.newaxis]
    else:  # [bin][(dy, dx)]
        bias.reshape(-1, 2)[:] += [0.6, -0.9]
    layer.offset_bias.assign(bias)


def displaced(kind: str, seed: int = 0, **config: object) -> keras.layers.Layer:
    """Returns a built layer whose displacements are far from zero."""
    layer = new(kind, **config)
    layer(**operands(kind))
    displace(layer, seed)
    return layer


def attributes(layer: keras.layers.Layer) -> dict:
    """What the layer's op is told besides tensors."""
    names = ["pooled_size", "spatial_scale"]
    if isinstance(layer, DeformableROIAlign):
        names += ["sampling_ratio", "gamma"]
    else:
        names += ["sample_per_part", "trans_std"]
    if isinstance(layer, DeformablePSROIPooling):
        names += ["output_dim", "group_size", "part_size"]
    return {name: getattr(layer, name) for name in names}


def by_the_op(
    layer: keras.layers.Layer, inputs, rois, displacements=None
) -> tf.Tensor:
    """What the layer should return, given displacements."""
    options = attributes(layer)
    if isinstance(layer, DeformableROIAlign):
        return deformable_roi_align(inputs, rois, displacements, **options)
    if isinstance(layer, DeformableROIPooling):
        options |= {"output_dim": inputs.shape[-1], "group_size": 1}
    return deformable_psroi_pool(inputs, rois, displacements, **options)


def by_hand(
    layer: keras.layers.Layer, inputs, rois, displacements=None
) -> np.ndarray:
    """The same by loops in NumPy, in float64."""
    options = attributes(layer)
    if isinstance(layer, DeformableROIAlign):
        pool = roi_reference.deformable_roi_align
    else:
        pool = roi_reference.deformable_psroi_pool
    if isinstance(layer, DeformableROIPooling):
        options |= {"output_dim": inputs.shape[-1], "group_size": 1}
    return pool(inputs, rois, displacements, **options)


def branch(
    layer: keras.layers.Layer, inputs, rois, trans_inputs=None
) -> np.ndarray:
    """Computes the displacements of a layer from its weights, in NumPy."""
    weights = {v.name: v.numpy().astype(np.float64) for v in layer.weights}
    kernel, bias = weights["offset_kernel"], weights["offset_bias"]
    if isinstance(layer, DeformablePSROIPooling):
        maps = np.einsum("bhwc,cf->bhwf", trans_inputs, kernel[0, 0]) + bias
        return roi_reference.deformable_psroi_pool(
            # Places of samples are computed in the type of the inputs.
            maps.astype(trans_inputs.dtype),
            rois,
            output_dim=2 * layer.num_classes,
            spatial_scale=layer.spatial_scale,
            pooled_size=layer.part_size,
            sample_per_part=layer.sample_per_part,
        )
    x = by_hand(layer, inputs, rois)
    x = x.reshape(len(rois), math.prod(x.shape[1:]))
    for index in range(len(layer.units)):
        x = x @ weights[f"offset_hidden_kernel_{index}"]
        x = np.maximum(x + weights[f"offset_hidden_bias_{index}"], 0)
    return (x @ kernel + bias).reshape(len(rois), *layer.pooled_size, 2)


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    """Compares shapes, and errors with the largest value expected."""
    actual = np.asarray(actual).astype(np.float64)
    expected = np.asarray(expected).astype(np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(
        actual, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_displace_moves_bins_by_more_than_a_pixel(kind, config):
    """The helper that the other tests lean on."""
    layer, call = displaced(kind, **config), operands(kind)
    moves = branch(layer, **call) * getattr(layer, KINDS[kind].factor)
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


def test_numbers_of_numpy_are_numbers():
    layer = DeformablePSROIPooling(
        np.int64(6),
        (np.int32(3), 2),
        np.float32(0.25),
        sample_per_part=np.int8(2),
        trans_std=np.float64(0.5),
        num_classes=np.uint8(3),
    )
    json.dumps(layer.get_config())
    layer = DeformableROIAlign(np.int64(3), np.float64(1), units=[np.int64(4)])
    json.dumps(layer.get_config())


SIZES = [
    (0, "0"),
    (-1, "-1"),
    ((3, 0), "0"),
    ((-2, 3), "-2"),
    (2.0, "2.0"),
    ((3, 1.5), "1.5"),
    ("3", "'3'"),
    ((3, "3"), "'3'"),
    (True, "True"),
    ((3, False), "False"),
    ((1, 2, 3), r"\(1, 2, 3\)"),
    ([3], r"\[3\]"),
    ((), r"\(\)"),
    ({3, 4}, "{3, 4}"),
    (2**64, str(2**64)),
]
COUNTS = [
    (0, "0"),
    (-4, "-4"),
    (2.0, "2.0"),
    ("4", "'4'"),
    (True, "True"),
    (None, "None"),
    ((2, 2), r"\(2, 2\)"),
]
FACTORS = [
    (-0.5, r"-0\.5"),
    (float("nan"), "nan"),
    (float("inf"), "inf"),
    (-float("inf"), "-inf"),
    ("0.5", "'0.5'"),
    (True, "True"),
    (None, "None"),
    ((0.5, 0.5), r"\(0\.5, 0\.5\)"),
    (1j, "1j"),
]
UNITS = [
    (8, "8"),
    ("8", "'8'"),
    (None, "None"),
    ({8}, r"\{8\}"),
    ((8, 0), "0"),
    ((-8,), "-8"),
    ((8.0,), "8.0"),
    (("8",), "'8'"),
    ((True,), "True"),
    ([None], "None"),
    ([(8, 4)], r"\(8, 4\)"),
]
BAD_ARGUMENTS = [
    (kind, name, value, received)
    for kind, name, rows in [
        *[(kind, "pooled_size", [*SIZES, (None, "None")]) for kind in KINDS],
        *[(kind, "spatial_scale", [*FACTORS, (0, "0")]) for kind in KINDS],
        ("psroi", "group_size", SIZES),
        ("psroi", "part_size", SIZES),
        ("psroi", "output_dim", COUNTS),
        ("psroi", "num_classes", COUNTS),
        ("psroi", "sample_per_part", COUNTS),
        ("pool", "sample_per_part", COUNTS),
        ("psroi", "trans_std", FACTORS),
        ("pool", "trans_std", FACTORS),
        ("align", "gamma", FACTORS),
        ("align", "sampling_ratio", COUNTS[2:]),
        ("pool", "units", UNITS),
        ("align", "units", UNITS),
    ]
    for value, received in rows
]


@pytest.mark.parametrize(
    ("kind", "name", "value", "received"), BAD_ARGUMENTS, ids=str
)
def test_bad_arguments(kind, name, value, received):
    with pytest.raises((ValueError, TypeError)) as info:
        new(kind, **{name: value})
    pattern = f"Expected `{name}` .*Received: .*{received}"
    assert re.search(pattern, str(info.value))


@pytest.mark.parametrize("num_classes", [4, 5, 12])
def test_classes_that_do_not_divide(num_classes):
    with pytest.raises(
        ValueError, match="Expected `output_dim` .*multiple"
    ) as e:
        new("psroi", num_classes=num_classes)
    assert f"Received: output_dim=6, num_classes={num_classes}" in str(e.value)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_arguments(kind):
    with pytest.raises((ValueError, TypeError), match="boundary"):
        new(kind, boundary="zeros")


# The branch.


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)]
)
@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_own_branch(kind, config, dtype, tolerance):
    """Displacements from the weights and the result, both by hand."""
    layer = displaced(kind, dtype=dtype, **config)
    call = {k: v.astype(dtype) for k, v in operands(kind).items()}
    displacements = branch(layer, **call)
    expected = by_hand(layer, call["inputs"], call["rois"], displacements)
    assert_close(layer(**call), expected, tolerance)
    expected = by_the_op(
        layer, call["inputs"], call["rois"], displacements.astype(dtype)
    )
    assert_close(layer(**call), expected, tolerance)


@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_a_new_layer_pools_plainly(kind, config):
    """Before it is trained the branch gives zeros."""
    layer, call = new(kind, **config), operands(kind)
    assert_close(layer(**call), by_hand(layer, call["inputs"], call["rois"]))
    wide, call = new(kind, **WIDE[kind], **config), widen(kind, call)
    plain = by_the_op(wide, call["inputs"], call["rois"])
    np.testing.assert_array_equal(wide(**call), plain)
    assert not np.any(layer.offset_kernel) and not np.any(layer.offset_bias)
    for variable in layer.weights:
        if "hidden_kernel" in variable.name:
            assert np.std(variable) > 0.1
        else:
            assert not np.any(variable)


def test_without_displacements_position_sensitive_pooling_is_plain():
    """A layer with a branch does not need to be given its input."""
    call = plain_operands("psroi")
    layer = new("psroi")
    plain = by_the_op(layer, **call)
    np.testing.assert_array_equal(layer(**call), plain)
    assert layer.weights == []
    np.testing.assert_array_equal(displaced("psroi")(**call), plain)


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
    """Maps whose pixels are `y` (even channels) or `x` (odd ones)."""
    grid = np.stack(np.mgrid[:30, :30], -1).astype(np.float32)
    return np.tile(grid, channels // 2)[np.newaxis]


def test_order_of_position_sensitive_fields():
    """`[class][(dy, dx)][part_h][part_w]`, of one number of the bias."""
    config = {"group_size": 1, "output_dim": 6, "pooled_size": (4, 10)}
    layer = new("psroi", **config)
    call = {
        "inputs": _ramps(6),
        "rois": np.float32([[0, 40, 40, 79, 79]]),  # 10 map pixels.
        "trans_inputs": np.zeros((1, 30, 30, 1), np.float32),
    }
    plain = layer(**call)
    for field in np.ndindex(3, 2, 2, 5):
        bias = np.zeros((3, 2, 2, 5), np.float32)
        bias[field] = 0.25
        layer.offset_bias.assign(bias.reshape(-1))
        moved = np.zeros((1, 4, 10, 6))
        k, axis, row, col = field  # Channels 2k (y) and 2k + 1 (x).
        rows, cols = slice(2 * row, 2 * row + 2), slice(2 * col, 2 * col + 2)
        moved[0, rows, cols, 2 * k + axis] = 0.25 * 0.5 * 10
        assert_close(layer(**call), plain + moved)


@pytest.mark.parametrize("kind", DENSE)
def test_order_of_dense_fields(kind):
    """`[ph][pw][(dy, dx)]`, of one number of the bias."""
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
        assert_close(layer(**call), plain + moved)


@pytest.mark.parametrize("kind", KINDS)
def test_variables_are_attributes_and_their_paths_say_so(kind):
    """What a regular expression of an optimizer looks for."""
    units = {} if kind == "psroi" else {"units": (8,)}
    layer = new(kind, name="head", **units)
    model = model_of(layer, operands(kind))
    for name in ["offset_kernel", "offset_bias"]:
        variable = getattr(layer, name)
        assert variable.name == name
        assert variable.path.endswith(f"head/{name}")
    names = {"offset_kernel", "offset_bias"}
    if units:
        names |= {"offset_hidden_kernel_0", "offset_hidden_bias_0"}
    assert {v.path for v in model.trainable_variables} == {
        f"head/{name}" for name in names
    }


# Displacements given by the caller.


@pytest.mark.parametrize("kind", KINDS)
def test_given_displacements(kind):
    """The branch is not built, and the values are used as they are."""
    call, layer = given_operands(kind), new(kind)
    output = layer(**call)
    assert layer.weights == [] and layer.count_params() == 0
    assert layer.offset_kernel is None and layer.offset_bias is None
    np.testing.assert_array_equal(output, by_the_op(layer, *call.values()))
    assert_close(output, by_hand(layer, *call.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_displacements_of_zero_are_none(kind):
    call = given_operands(kind)
    call[KINDS[kind].given] *= 0
    plain = by_hand(new(kind), call["inputs"], call["rois"])
    assert_close(new(kind)(**call), plain)
    call = widen(kind, call)
    layer = new(kind, **WIDE[kind])
    plain = by_the_op(layer, call["inputs"], call["rois"])
    np.testing.assert_array_equal(layer(**call), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_of_zero_switches_displacements_off(kind):
    layer = displaced(kind, **{KINDS[kind].factor: 0})
    plain = by_the_op(layer, **plain_operands(kind))
    assert_close(layer(**operands(kind)), plain)
    assert_close(layer(**given_operands(kind)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_given_displacements_the_branch_does_not_run(kind):
    """A branch full of NaN has no say."""
    layer, call = displaced(kind), given_operands(kind)
    before = layer(**call)
    for variable in layer.weights:
        variable.assign(np.full(variable.shape, np.nan))
    np.testing.assert_array_equal(layer(**call), before)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(**call))
    gradients = tape.gradient(loss, [layer.offset_kernel, layer.offset_bias])
    assert gradients == [None, None]


@pytest.mark.parametrize("classes", [1, 2, 6])
def test_given_displacements_tell_their_own_number_of_classes(classes):
    call, layer = plain_operands("psroi"), new("psroi")
    call["trans"] = 0.8 * random(7, 2, 5, 2 * classes)
    assert_close(layer(**call), by_hand(layer, *call.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_given_by_position(kind):
    call, layer = given_operands(kind), new(kind)
    np.testing.assert_array_equal(layer(*call.values()), layer(**call))
    call, layer = operands(kind), displaced(kind)
    arguments = [call["inputs"], call["rois"]]
    if kind == "psroi":
        arguments += [None, call["trans_inputs"]]
    np.testing.assert_array_equal(layer(*arguments), layer(**call))


def test_both_given():
    call = {**operands("psroi"), **given_operands("psroi")}
    match = r"Expected .*`trans`.*`trans_inputs`.* Received: both"
    with pytest.raises(ValueError, match=match):
        new("psroi")(**call)
    symbols = {k: keras.KerasTensor(v.shape) for k, v in call.items()}
    with pytest.raises(ValueError, match=match):
        new("psroi")(**symbols)
    with pytest.raises(ValueError, match=match):
        displaced("psroi")(**call)


@pytest.mark.parametrize("kind", DENSE)
def test_a_layer_without_branch_needs_displacements(kind):
    layer = new(kind, name="head")
    layer(**given_operands(kind))
    with pytest.raises(ValueError, match="Expected `offset`.*'head'.*Received"):
        layer(**operands(kind))


def test_a_layer_without_branch_has_no_use_for_trans_inputs():
    layer = new("psroi", name="head")
    layer(**plain_operands("psroi"))
    match = r"Expected no `trans_inputs`.*'head'.*Received: .*\(2, 11, 12, 7\)"
    with pytest.raises(ValueError, match=match):
        layer(**operands("psroi"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_in_a_symbolic_call(kind):
    """It says so when a model is made, not when it runs."""
    layer = new(kind)
    layer(**(given_operands if kind != "psroi" else plain_operands)(kind))
    with pytest.raises(ValueError, match="Expected .*Received"):
        layer(**symbols(operands(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_given_displacements(kind):
    layer = new(kind)
    call = {k: tf.constant(v) for k, v in given_operands(kind).items()}
    inputs, _, displacements = call.values()
    with tf.GradientTape() as tape:
        tape.watch(list(call.values()))
        output = layer(**call)
    actual = tape.gradient(output, [inputs, displacements])
    with tf.GradientTape() as tape:
        tape.watch(list(call.values()))
        output = by_the_op(layer, *call.values())
    expected = tape.gradient(output, [inputs, displacements])
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.any(theirs)
        np.testing.assert_array_equal(ours, theirs)


# Shapes.


def _rejects(match: str, kind: str, shapes: dict, **config: object) -> None:
    """A Keras symbolic call with wrong shapes is a ValueError that says so."""
    symbols = {k: keras.KerasTensor(v) for k, v in shapes.items()}
    with pytest.raises(ValueError, match=f"(?s)Expected .*{match}"):
        new(kind, **config)(**symbols)
    shapes = {f"{k}_shape": v for k, v in shapes.items()}
    with pytest.raises(ValueError, match=f"(?s)Expected .*{match}"):
        new(kind, **config).compute_output_shape(**shapes)


@pytest.mark.parametrize("mode", ["own", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_compute_output_shape(kind, mode):
    call = operands(kind) if mode == "own" else given_operands(kind)
    layer = new(kind)
    expected = (7, 3, 4, 6)
    assert layer(**call).shape == expected
    assert (
        layer.compute_output_shape(
            **{f"{k}_shape": v.shape for k, v in call.items()}
        )
        == expected
    )
    # As many ROIs as the displacements, where only they tell.
    shapes = {k: (None, *v.shape[1:]) for k, v in call.items()}
    symbols = {k: keras.KerasTensor(v) for k, v in shapes.items()}
    output = layer(**symbols)
    assert output.shape == (None, 3, 4, 6)
    assert output.dtype == "float32"
    shapes = {f"{k}_shape": v for k, v in shapes.items()}
    assert layer.compute_output_shape(**shapes) == (None, 3, 4, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("maps", "rois", "num_rois"),
    [
        ((None, None, None), (None, 5), None),
        ((None, None, None), (7, 5), 7),
        ((2, 8, None), (None, None), None),
        ((0, None, 9), (0, 5), 0),
        ((None, 0, 9), (3, None), 3),
    ],
)
def test_output_shape_of_unknown_sizes(maps, rois, num_rois, kind):
    shapes = {"inputs": (*maps, KINDS[kind].channels), "rois": rois}
    expected = (num_rois, 3, 4, 6)
    assert (
        new(kind)(**{k: keras.KerasTensor(v) for k, v in shapes.items()}).shape
        == expected
    )
    if kind == "psroi":
        shapes["trans_inputs"] = (None, None, None, 3)
        layer = new(kind)
        output = layer(**{k: keras.KerasTensor(v) for k, v in shapes.items()})
        assert output.shape == expected
        assert layer.offset_kernel.shape[2] == 3


@pytest.mark.parametrize("policy", FLOAT_POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_type_of_a_symbolic_output(kind, policy):
    layer = new(kind, dtype=policy)
    symbols = {
        k: keras.KerasTensor(v.shape, "float32")
        for k, v in operands(kind).items()
    }
    assert layer(**symbols).dtype == layer.compute_dtype


MAPS = (None, 11, 12)
BAD_ROIS = [
    ((None, 4), r"`rois`.*5.*Received: rois\.shape=\(None, 4\)"),
    ((7, 6), r"`rois`.*5.*Received: rois\.shape=\(7, 6\)"),
    ((5,), r"`rois`.*rank 2.*Received: rois\.shape=\(5,\)"),
    ((2, 7, 5), r"`rois`.*rank 2.*Received: rois\.shape=\(2, 7, 5\)"),
]


@pytest.mark.parametrize(("shape", "match"), BAD_ROIS)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_rois_in_a_symbolic_call(kind, shape, match):
    shapes = {k: v.shape for k, v in operands(kind).items()}
    _rejects(match, kind, {**shapes, "rois": shape})
    shapes.pop("trans_inputs", None)
    _rejects(match, kind, {**shapes, "rois": shape})


@pytest.mark.parametrize("shape", [(11, 12, 36), (1, 2, 11, 12, 36), (36,)])
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_rank_of_inputs_in_a_symbolic_call(kind, shape):
    received = re.escape(f"Received: inputs.shape={shape}")
    match = f"`inputs`.*rank 4.*{received}"
    shapes = {k: v.shape for k, v in operands(kind).items()}
    _rejects(match, kind, {**shapes, "inputs": shape})


@pytest.mark.parametrize("channels", [35, 37, 6, 0])
def test_wrong_channels_in_a_symbolic_call(channels):
    shapes = {"inputs": (None, 11, 12, channels), "rois": (None, 5)}
    received = rf"Received: inputs\.shape=\(None, 11, 12, {channels}\)"
    match = f"`inputs`.*36.*{received}"
    _rejects(match, "psroi", shapes)
    shapes["trans_inputs"] = (None, 11, 12, 7)
    _rejects(match, "psroi", shapes)
    # What the layer's own arguments make of 36 channels.
    shapes["inputs"] = (None, 11, 12, 36)
    _rejects("`inputs`.*54.*Received", "psroi", shapes, output_dim=9)
    _rejects("`inputs`.*72.*Received", "psroi", shapes, group_size=None)


BAD_TRANS = [
    ((7, 5, 2, 6), "`trans`.*2", {}),
    ((7, 2, 4, 6), "`trans`.*5", {}),
    ((6, 2, 5, 6), "`trans`.*7", {}),
    ((7, 2, 5, 5), "`trans`", {}),
    ((7, 2, 5, 0), "`trans`", {}),
    ((7, 2, 5, 8), "output_dim", {}),
    ((7, 2, 5), "`trans`.*rank 4", {}),
    ((7, 2, 5, 6), "`trans`.*3", {"part_size": None}),
]


@pytest.mark.parametrize(("shape", "match", "config"), BAD_TRANS)
def test_wrong_trans_in_a_symbolic_call(shape, match, config):
    shapes = {"inputs": (2, 11, 12, 36), "rois": (7, 5), "trans": shape}
    received = "Received: .*" + re.escape(f"trans.shape={shape}")
    _rejects(f"{match}.*{received}", "psroi", shapes, **config)


BAD_OFFSETS = [
    ((7, 4, 3, 2), "height 3"),
    ((7, 3, 5, 2), "width 4"),
    ((6, 3, 4, 2), "7"),
    ((7, 3, 4, 1), "2"),
    ((7, 24), "rank 4"),
]


@pytest.mark.parametrize(("shape", "match"), BAD_OFFSETS)
@pytest.mark.parametrize("kind", DENSE)
def test_wrong_offset_in_a_symbolic_call(kind, shape, match):
    """The number of ROIs is the op's to judge, which may say `trans`."""
    shapes = {"inputs": (2, 11, 12, 6), "rois": (7, 5), "offset": shape}
    name = "(offset|trans)" if match == "7" else "offset"
    received = f"Received: {name}.shape=" + re.escape(str(shape))
    _rejects(f"`{name}`.*{match}.*{received}", kind, shapes)


@pytest.mark.parametrize("kind", ["pool", "align"])
def test_wrong_channels_of_an_offset_in_a_symbolic_call(kind):
    shapes = {"inputs": (2, 11, 12, 6), "rois": (7, 5)}
    _rejects("2.*Received", kind, {**shapes, "offset": (7, 3, 4, 4)})


@pytest.mark.parametrize(
    "shape", [(11, 12, 7), (1, 2, 11, 12, 7), (7,), (2, 7)]
)
def test_wrong_rank_of_trans_inputs_in_a_symbolic_call(shape):
    shapes = {"inputs": (2, 11, 12, 36), "rois": (7, 5), "trans_inputs": shape}
    received = re.escape(f"Received: trans_inputs.shape={shape}")
    _rejects(f"`trans_inputs`.*rank 4.*{received}", "psroi", shapes)


def test_another_batch_of_trans_inputs_in_a_symbolic_call():
    shapes = {"inputs": (2, 11, 12, 36), "rois": (7, 5)}
    shapes["trans_inputs"] = (3, 11, 12, 7)
    _rejects("`trans_inputs`.*batch.*Received.*3", "psroi", shapes)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("psroi", "inputs"),
        (
            "psroi",
            "trans_inputs",
        ),
        (
            "pool",
            "inputs",
        ),
        (
            "align",
            "inputs",
        ),
    ],
)
def test_a_map_that_is_a_number(kind, name):
    shapes = {k: v.shape for k, v in operands(kind).items()}
    _rejects(f"`{name}`.*rank 4.*Received", kind, {**shapes, name: ()})


@pytest.mark.parametrize("kind", KINDS)
def test_channels_that_the_branch_needs_are_unknown(kind):
    shapes = {"inputs": (None, 11, 12, None), "rois": (None, 5)}
    match = r"Expected the channels of `inputs`.*Received.*\(None, 11, 12, None"
    if kind == "psroi":
        shapes["trans_inputs"] = shapes["inputs"]
        match = match.replace("inputs", "trans_inputs")
    with pytest.raises(ValueError, match=match):
        new(kind)(**{k: keras.KerasTensor(v) for k, v in shapes.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_in_an_eager_call(kind):
    """By then it is the kernel that judges, with the same text."""
    errors = (ValueError, tf.errors.InvalidArgumentError)
    layer, call = displaced(kind), operands(kind)
    with pytest.raises(errors, match=r"Expected `rois`.*5.*Received.*\(7, 4\)"):
        layer(**{**call, "rois": call["rois"][:, :4]})
    call = given_operands(kind)
    name = KINDS[kind].given
    match = r"Expected `(trans|offset)`.*Received: .*\(6, "
    with pytest.raises(errors, match=match):
        layer(**{**call, name: call[name][:6]})


# Few and odd ROIs.


@pytest.mark.parametrize("how", ["eager", "known", "unknown", "rank unknown"])
@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_in_tf_function(kind, config, how):
    layer, call = displaced(kind, **config), operands(kind)
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
        call = operands(kind, count)
        if how == "known" and count != 7:
            continue
        expected = by_the_op(
            layer,
            call["inputs"],
            call["rois"],
            branch(layer, **call).astype(np.float32),
        )
        assert expected.shape == (count, 3, 4, 6)
        actual = function(*call.values())
        assert actual.shape == (count, 3, 4, 6)
        if count:
            assert_close(actual, expected)


@pytest.mark.parametrize(
    "kind",
    [
        "psroi",
        "pool",
        "align",
    ],
)
def test_in_tf_function_of_unknown_channels(kind):
    """A branch knows from its weights how many there are."""
    layer, call = displaced(kind), operands(kind)
    function = tf.function(
        lambda *tensors: layer(**dict(zip(call, tensors, strict=True))),
        input_signature=[tf.TensorSpec(None)] * len(call),
    )
    np.testing.assert_array_equal(function(*call.values()), layer(**call))


@pytest.mark.parametrize("kind", KINDS)
def test_given_in_tf_function_of_unknown_shapes(kind):
    layer, call = new(kind), given_operands(kind)
    expected = layer(**call)
    signature = [
        tf.TensorSpec((None,) * (v.ndim - 1) + v.shape[-1:])
        for v in call.values()
    ]
    function = tf.function(layer, input_signature=signature)
    np.testing.assert_array_equal(function(*call.values()), expected)
    nothing = function(
        *(v[: 0 if k != "inputs" else 2] for k, v in call.items())
    )
    assert nothing.shape == (0, 3, 4, 6)


def _value_and_gradients(layer: keras.layers.Layer, call: dict) -> tuple:
    """Gradients of a weighted sum: of the weights, then of `inputs`."""
    call = {k: tf.constant(v) for k, v in call.items()}
    with tf.GradientTape() as tape:
        tape.watch(call["inputs"])
        output = layer(**call)
        weight = tf.reshape(tf.range(tf.size(output)), output.shape)
        loss = tf.reduce_sum(output * tf.cos(tf.cast(weight, output.dtype)))
    sources = [*(v.value for v in layer.weights), call["inputs"]]
    return output.numpy(), [g.numpy() for g in tape.gradient(loss, sources)]


@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_no_rois(kind, config):
    layer = displaced(kind, **config)
    output, gradients = _value_and_gradients(layer, operands(kind, 0))
    assert output.shape == (0, 3, 4, 6)
    for gradient in gradients:
        assert not np.any(gradient)
    assert [g.shape for g in gradients[:-1]] == [v.shape for v in layer.weights]


@pytest.mark.parametrize("kind", KINDS)
def test_no_images(kind):
    """There only padding can be pooled."""
    layer, call = displaced(kind), operands(kind)
    call = {k: v if k == "rois" else v[:0] for k, v in call.items()}
    call["rois"][:, 0] = -1
    output, gradients = _value_and_gradients(layer, call)
    np.testing.assert_array_equal(output, np.zeros((7, 3, 4, 6)))
    for gradient in gradients:
        assert not np.any(gradient)
    call["rois"] = call["rois"][:0]
    assert layer(**call).shape == (0, 3, 4, 6)


@pytest.mark.parametrize("bad", [-1.0, np.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_gives_zeros_and_no_gradient(kind, bad):
    """ROIs with a negative index, or with a corner that is not finite."""
    layer, call = displaced(kind), operands(kind)
    call["rois"][:, 0 if bad == -1 else 3] = bad
    output, gradients = _value_and_gradients(layer, call)
    np.testing.assert_array_equal(output, np.zeros((7, 3, 4, 6)))
    for gradient in gradients:
        assert not np.any(gradient)


@pytest.mark.parametrize("bad", [-1.0, np.nan])
@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_padding_among_others_has_no_say(kind, config, bad):
    """Values and all gradients are as if it were not there."""
    layer, call = displaced(kind, **config), operands(kind)
    expected, expected_gradients = _value_and_gradients(layer, call)
    nowhere = np.float32([[0, 4, 8, 20, 24]] * 3)
    nowhere[:, 0 if bad == -1 else 2] = bad
    # At the end: the weights of the sum stay as they are.
    call["rois"] = np.concatenate([call["rois"], nowhere])
    output, gradients = _value_and_gradients(layer, call)
    np.testing.assert_array_equal(output[:7], expected)
    np.testing.assert_array_equal(output[7:], np.zeros((3, 3, 4, 6)))
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert np.any(theirs)
        assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("kind", KINDS)
def test_rois_may_be_integers(kind, dtype):
    layer, call = displaced(kind), operands(kind)
    call["rois"] = np.round(call["rois"])
    expected = layer(**call)
    call["rois"] = call["rois"].astype(dtype)
    np.testing.assert_array_equal(layer(**call), expected)
    model = model_of(layer, call, rois=dtype)
    np.testing.assert_array_equal(model(call), expected)


# Configuration, saving, loading.

EVERYTHING = {
    "psroi": {
        "output_dim": 6,
        "pooled_size": (3, 4),
        "spatial_scale": 0.3,
        "group_size": (3, 2),
        "part_size": (2, 5),
        "sample_per_part": 3,
        "trans_std": 0.7,
        "num_classes": 2,
        "data_format": "channels_first",
        "implementation": "portable",
    },
    "pool": {
        "pooled_size": (3, 4),
        "spatial_scale": 0.3,
        "sample_per_part": 3,
        "trans_std": 0.7,
        "units": (8, 4),
        "data_format": "channels_first",
        "implementation": "portable",
    },
    "align": {
        "pooled_size": (3, 4),
        "spatial_scale": 0.3,
        "sampling_ratio": 3,
        "gamma": 0.7,
        "units": (8, 4),
        "data_format": "channels_first",
        "implementation": "portable",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_config_holds_every_argument(kind):
    everything = {
        **EVERYTHING[kind],
        "name": "everything",
        "dtype": "mixed_bfloat16",
        "trainable": False,
    }
    constructor = inspect.signature(KINDS[kind].layer).parameters
    assert {*constructor, "name", "dtype", "trainable"} == {
        *everything,
        "kwargs",
    }
    layer = KINDS[kind].layer(**everything)
    config = layer.get_config()
    assert {k: config[k] for k in everything if k != "dtype"} == {
        k: v for k, v in everything.items() if k != "dtype"
    }
    clone = KINDS[kind].layer.from_config(config)
    assert clone.get_config() == config
    assert clone.name == "everything"
    assert clone.compute_dtype == "bfloat16"
    assert not clone.trainable


@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_survives_json(kind, config):
    layer, call = displaced(kind, **config), operands(kind)
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    assert stored["registered_name"] == f"tf_deform>{type(layer).__name__}"
    clone = keras.saving.deserialize_keras_object(stored)
    assert type(clone) is type(layer)
    assert clone.get_config() == layer.get_config()
    # It is built as it was: with a branch, before any call.
    assert clone.built and len(clone.weights) == len(layer.weights)
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(**call), layer(**call))


@pytest.mark.parametrize("kind", KINDS)
def test_survives_json_without_branch(kind):
    layer, call = new(kind), given_operands(kind)
    expected = layer(**call)
    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(layer)))
    clone = keras.saving.deserialize_keras_object(stored)
    assert clone.built and clone.weights == []
    np.testing.assert_array_equal(clone(**call), expected)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_copies(kind, config, how):
    layer, call = displaced(kind, **config), operands(kind)
    if how == "pickle":
        clone = pickle.loads(pickle.dumps(layer))
    else:
        clone = copy.deepcopy(layer)
    assert clone is not layer
    expected = layer(**call)
    np.testing.assert_array_equal(clone(**call), expected)
    clone.offset_bias.assign(0 * clone.offset_bias)
    np.testing.assert_array_equal(layer(**call), expected)


def _functional_model() -> keras.Model:
    """Layers of all kinds and all sources of displacements."""
    inputs = keras.Input((None, None, 6))
    rois = keras.Input((5,))

    def features(channels):
        return keras.layers.Conv2D(channels, 3, padding="same")(inputs)

    own = {
        "psroi": new("psroi", name="own_psroi"),
        "pool": new("pool", units=(8, 4), name="own_pool"),
        "align": new("align", name="own_align"),
    }
    outputs = [
        own["psroi"](features(36), rois, trans_inputs=features(5)),
        own["pool"](inputs, rois),
        own["align"](inputs, rois),
        new("psroi", name="plain_psroi")(features(36), rois),
    ]
    moves = keras.layers.Dense(2)(outputs[1])
    outputs += [
        new("pool")(inputs, rois, moves),
        new("align")(inputs, rois, offset=moves),
        new("psroi", part_size=None)(features(36), rois, trans=moves),
    ]
    model = keras.Model([inputs, rois], outputs)
    for layer in own.values():
        displace(layer)
    return model


def _calls() -> list[np.ndarray]:
    return [random(2, 11, 12, 6), regions()]


def _assert_equal_outputs(actual: list, expected: list) -> None:
    assert len(actual) == 7
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.std(theirs) > 0.1
        np.testing.assert_array_equal(ours, theirs)


_LOAD = """
import sys
import numpy as np
import keras
import tensorflow as tf
import tf_deform

with np.load(sys.argv[1] + "/calls.npz") as file:
    calls = [file["arr_0"], file["arr_1"]]
model = keras.saving.load_model(sys.argv[1] + "/model.keras")
np.savez(sys.argv[1] + "/keras.npz", *model(calls))
model = tf.saved_model.load(sys.argv[1] + "/model")
np.savez(sys.argv[1] + "/saved_model.npz", *model.serve(calls))
"""


def test_a_fresh_process_loads_the_model(tmp_path, run_python):
    """A .keras file and a SavedModel, with `import tf_deform` and no more."""
    model = _functional_model()
    expected = model(_calls())
    np.savez(tmp_path / "calls.npz", *_calls())
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "model", verbose=False)
    run_python(_LOAD, tmp_path)
    for form in ("keras", "saved_model"):
        with np.load(tmp_path / f"{form}.npz") as file:
            _assert_equal_outputs(list(file.values()), expected)


def test_a_saved_model_serves_any_number_of_rois(tmp_path):
    model = _functional_model()
    model.export(tmp_path / "model", verbose=False)
    served = tf.saved_model.load(tmp_path / "model")
    for images, count in [(1, 0), (3, 4), (2, 1)]:
        calls = [random(images, 9 + images, 14, 6), regions(count)]
        calls[1][:, 0] %= images
        actual, expected = served.serve(calls), model(calls)
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.shape == (count, 3, 4, 6)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


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
    call = operands("pool")
    np.testing.assert_array_equal(served.serve(*call.values()), layer(**call))


def test_save_and_load_weights(tmp_path):
    model = _functional_model()
    model.save_weights(tmp_path / "model.weights.h5")
    other = _functional_model()
    for variable in other.weights:
        variable.assign(np.full(variable.shape, 0.25))
    other.load_weights(tmp_path / "model.weights.h5")
    _assert_equal_outputs(other(_calls()), model(_calls()))


@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_with_and_without_a_branch_are_not_mixed_up(
    kind, has_branch, tmp_path
):
    def model(own_branch):
        call = operands(kind) if own_branch else given_operands(kind)
        return model_of(new(kind), call)

    model(has_branch).save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="expected [02] variables"):
        model(not has_branch).load_weights(tmp_path / "model.weights.h5")


def test_clone_model():
    model = _functional_model()
    clone = keras.models.clone_model(model)
    assert [v.path for v in clone.weights] == [v.path for v in model.weights]
    clone.set_weights(model.get_weights())
    _assert_equal_outputs(clone(_calls()), model(_calls()))


def test_a_layer_in_two_models():
    """Called again it is the same layer, with the same weights."""
    layer = displaced("align", units=(8,))
    models = []
    for size in (None, 11):
        inputs, rois = keras.Input((size, 12, 6)), keras.Input((5,))
        models.append(keras.Model([inputs, rois], layer(inputs, rois)))
    for model in models:
        assert [id(v) for v in model.weights] == [id(v) for v in layer.weights]
        expected = layer(**operands("align"))
        np.testing.assert_array_equal(model(_calls()), expected)


@keras.saving.register_keras_serializable(package="roi_layers_test")
class _Head(keras.Model):
    """A subclassed model that keeps its layers in a list."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moves = keras.layers.Dense(2)
        self.pools = [
            new("psroi", output_dim=1, num_classes=1),
            new("pool", units=(8,)),
            new("align"),
        ]

    def call(self, arguments):
        inputs, rois = arguments
        x = self.pools[0](inputs, rois, trans_inputs=inputs)
        y = self.pools[1](inputs, rois)
        return x + y + self.pools[2](inputs, rois, self.moves(y))


def test_subclassed_model(tmp_path):
    model = _Head()
    model(_calls())
    for layer in model.pools[:2]:
        displace(layer)
    assert len(model.weights) == 2 + 4 + 0 + 2
    expected = model(_calls())
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(_calls()), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    other = _Head()
    other(_calls())
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other(_calls()), expected)


# Dtype policies.


def _at_a_place(place: str, policy: str, kind: str, call: dict, **config):
    """Returns a new layer and what calls it, as an outer model or alone.

    The outer model is called with a dictionary like `call`.
    """
    outer = {
        "alone": "float32",
        "mixed model": "mixed_float16",
        "mixed subclassed model": "mixed_float16",
        "float32 model": "float32",
        "policy of all": policy,
    }[place]
    keras.config.set_dtype_policy(outer)
    layer = new(kind, dtype=policy, **config)
    if place == "policy of all":
        layer = new(kind, **config)
        assert layer.dtype_policy.name == policy
    if place == "alone":
        return layer, lambda call: layer(**call)
    if place == "mixed subclassed model":

        class Outer(keras.Model):
            def __init__(self):
                super().__init__(autocast=False)
                self.layer = layer

            def call(self, call):
                return self.layer(**call)

        return layer, Outer()
    # No outer model can know of float64: it casts to its inputs' type.
    dtype = "float64" if policy == "float64" else "float32"
    return layer, model_of(layer, call, **dict.fromkeys(call, dtype))


PLACES = [
    "alone",
    "mixed model",
    "mixed subclassed model",
    "float32 model",
    "policy of all",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("x_dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [("psroi", {}), ("pool", {"units": (8,)}), ("align", {})],
    ids=str,
)
@pytest.mark.parametrize("policy", FLOAT_POLICIES)
def test_dtype_policies(policy, kind, config, x_dtype, place):
    """Keras casts differently in each place; the layer's result is one."""
    call = {k: v.astype(x_dtype) for k, v in operands(kind).items()}
    layer, function = _at_a_place(place, policy, kind, call, **config)
    function(call)
    displace(layer)
    actual = function(call)

    compute = tf.as_dtype(layer.compute_dtype)
    coordinates = "float64" if policy == "float64" else "float32"
    assert {v.dtype for v in layer.weights} == {coordinates}
    assert actual.dtype == compute
    # The same branch in the compute dtype, then exact arithmetic.
    weights = {v.name: tf.cast(v.value, compute) for v in layer.weights}
    inputs = tf.cast(call["inputs"], compute)
    rois = call["rois"].astype(coordinates)
    if kind == "psroi":
        maps = tf.tensordot(
            tf.cast(call["trans_inputs"], compute),
            weights["offset_kernel"][0, 0],
            1,
        )
        displacements = deformable_psroi_pool(
            maps + weights["offset_bias"],
            rois,
            output_dim=6,
            spatial_scale=0.25,
            pooled_size=(2, 5),
            sample_per_part=3,
        )
    else:
        x = tf.reshape(by_the_op(layer, inputs, rois), (7, -1))
        if layer.units:
            x = tf.matmul(x, weights["offset_hidden_kernel_0"])
            x = tf.nn.relu(x + weights["offset_hidden_bias_0"])
        x = tf.matmul(x, weights["offset_kernel"]) + weights["offset_bias"]
        displacements = tf.reshape(x, (7, 3, 4, 2))
    expected = by_hand(
        layer, inputs.numpy(), rois, tf.cast(displacements, coordinates)
    )
    roi_reference.assert_close(actual.numpy(), expected, compute.name, place)


# A map of 128 columns whose pixels are `x - origin`. The ROI's first corner
# does not fit in 16 bits: at 1 / 64 map pixel per image pixel, its sample is
# at 31.5 + 1 / 64 for pooling, at 39.5 + 1 / 64 for ROIAlign, without 1 / 64
# where 2049 became 2048.
CORNER = np.float32([[0, 2049, 64, 3072, 127]])
ONE_SAMPLE = {
    "psroi": {
        "output_dim": 1,
        "pooled_size": 1,
        "spatial_scale": 1 / 64,
        "group_size": 1,
        "part_size": 1,
        "sample_per_part": 1,
        "trans_std": 1.0,
        "num_classes": 1,
    },
    "pool": {
        "pooled_size": 1,
        "spatial_scale": 1 / 64,
        "sample_per_part": 1,
        "trans_std": 1.0,
    },
    "align": {
        "pooled_size": 1,
        "spatial_scale": 1 / 64,
        "sampling_ratio": 1,
        "gamma": 1.0,
    },
}


def _ramp(origin: float, dtype: str) -> np.ndarray:
    columns = np.arange(128) - origin
    return np.tile(columns, (1, 4, 1))[..., np.newaxis].astype(dtype)


@pytest.mark.parametrize("x_dtype", ["float32", "float64"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "policy", ["float32", "mixed_float16", "mixed_bfloat16"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_rois_remain_float32(kind, policy, place, x_dtype):
    """For the layer and for its branch: neither sees 2048 for 2049."""
    origin = 39.5 if kind == "align" else 31.5
    call = {
        "inputs": _ramp(origin, x_dtype),
        "rois": CORNER.astype(x_dtype),
    }
    if kind == "align":  # (2049 + 3073) / 2 / 64 - 0.5
        call["rois"][0, 3] = 3073
    if kind == "psroi":
        call["trans_inputs"] = call["inputs"]
    layer, function = _at_a_place(place, policy, kind, call, **ONE_SAMPLE[kind])
    np.testing.assert_array_equal(np.float32(function(call)), [[[[1 / 64]]]])
    # 1 / 64 makes a displacement of 1 / 16 ROI (of 16 pixels, nearly).
    kernel = np.zeros(layer.offset_kernel.shape)
    kernel[..., 1] = 4.0
    layer.offset_kernel.assign(kernel)
    width = 1024 / 64 if kind == "align" else (3073 - 2049) / 64
    expected = 1 / 64 + 1 / 16 * width
    np.testing.assert_array_equal(np.float32(function(call)), [[[[expected]]]])


@pytest.mark.parametrize("x_dtype", ["float32", "float64"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "policy", ["float32", "mixed_float16", "mixed_bfloat16"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_given_displacements_remain_float32(kind, policy, place, x_dtype):
    """0.10001 of 64 pixels: 16 bits would be off by 0.002 pixels or more."""
    plain = 63.5 if kind == "align" else 31.5
    origin = plain + 6.375
    rois = np.array([[0, 2048, 64, 6144 - (kind != "align"), 128]], x_dtype)
    displacement = np.array([0, 0.10001], x_dtype).reshape(1, 1, 1, 2)
    call = {
        "inputs": _ramp(origin, x_dtype),
        "rois": rois,
        KINDS[kind].given: displacement,
    }
    layer, function = _at_a_place(place, policy, kind, call, **ONE_SAMPLE[kind])
    actual = function(call)
    assert actual.dtype == layer.compute_dtype
    expected = 0.10001 * 64 - 6.375
    for rounded in ("float16", "bfloat16"):
        other = float(tf.cast(0.10001, rounded)) * 64 - 6.375
        assert abs(other / expected - 1) > 0.05
    np.testing.assert_allclose(np.float32(actual), [[[[expected]]]], rtol=5e-3)


@pytest.mark.parametrize("place", ["alone", "policy of all", "float32 model"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_stays_float64(kind, place):
    """ROIs, displacements, given or from the branch, and values."""
    width = 64.0
    rois = np.array([[0.0, 2048, 64, 6144 - (kind != "align"), 128]])
    plain = 63.5 if kind == "align" else 31.5
    if kind == "align":  # Not rounded: corners are exact as well.
        rois[0, 1:4:2] += 64e-9
        plain += 1e-9
    dx = 0.1 + 1e-11
    call = {
        "inputs": _ramp(plain + 6.4, "float64"),
        "rois": rois,
        KINDS[kind].given: np.array([[[[0, dx]]]]),
    }
    expected = [[[[dx * width - 6.4]]]]
    _, function = _at_a_place(place, "float64", kind, call, **ONE_SAMPLE[kind])
    actual = function(call)
    assert actual.dtype == "float64"
    np.testing.assert_allclose(actual, expected, rtol=1e-4)

    del call[KINDS[kind].given]
    if kind == "psroi":
        call["trans_inputs"] = call["inputs"]
    layer, function = _at_a_place(
        place, "float64", kind, call, **ONE_SAMPLE[kind]
    )
    function(call)
    layer.offset_bias.assign([0, dx])
    np.testing.assert_allclose(function(call), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_displacements_of_another_type(kind):
    """They are cast like ROIs, whatever the type of inputs."""
    layer, call = new(kind), given_operands(kind)
    name = KINDS[kind].given
    call[name] = np.round(call[name] * 64) / 64  # Exact in 16 bits.
    expected = layer(**call)
    for dtype in ("float16", "bfloat16", "float64"):
        other = {**call, name: tf.cast(call[name], dtype)}
        np.testing.assert_array_equal(layer(**other), expected)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_training_updates_float32_weights(kind, policy):
    keras.config.set_dtype_policy(policy)
    call = operands(kind)
    units = {} if kind == "psroi" else {"units": (8,)}
    layer = new(kind, **units)
    model = model_of(layer, call)
    displace(layer)
    before = layer.get_weights()
    model.compile("adam", "mse")
    fit(model, call, random(7, 3, 4, 6))
    for old, new_ in zip(before, layer.get_weights(), strict=True):
        assert new_.dtype == np.float32
        assert np.all(np.isfinite(new_)) and np.any(new_ != old)


# Gradients.


@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_gradients_equal_finite_differences(kind, config):
    """Of every weight, and of what goes in, through the branch and around."""
    small = {"pooled_size": (2, 3), "dtype": "float64", **config}
    channels = 4
    if kind == "psroi":
        small |= {"output_dim": 4, "group_size": (2, 1), "num_classes": 2}
        small |= {"part_size": (1, 2)} if "part_size" not in config else {}
        small |= config
        channels = 8
    layer = new(kind, **small)
    # Small ROIs in a large map: no sample comes near its edge.
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
        # All numbers of a weight; those pixels of a map that are read.
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
@pytest.mark.parametrize("source", ["own", "given", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_rois_have_no_gradient(kind, source, mode):
    call = {"own": operands, "given": given_operands, "plain": plain_operands}
    call = {k: tf.constant(v) for k, v in call[source](kind).items()}
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_branch_learns_to_look_at_a_shifted_blob(kind):
    """It lies 4 pixels right or left: on which side another map tells."""
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
    # What a layer would see that knows where to look.
    reach = 0.5 * (6 if kind == "align" else 7)
    ideal = np.zeros((8, 1, 1, 2), np.float32)
    ideal[:, 0, 0, 1] = 4 * side / reach
    target = by_the_op(layer, call["inputs"], call["rois"], ideal)

    model.compile(keras.optimizers.Adam(0.05), "mse")
    before = loss_of(model, call, target)
    fit(model, call, target, steps=100)
    assert loss_of(model, call, target) < 0.05 * before
    dy, dx = reach * branch(layer, **call)[:, 0, 0].T
    assert np.all(np.abs(dx - 4 * side) < 1.0)
    assert np.all(np.abs(dy) < 1.0)


@pytest.mark.parametrize(("kind", "config"), EVERY_BRANCH, ids=str)
def test_fit_decreases_the_loss_and_moves_every_weight(kind, config):
    call = operands(kind)
    call["inputs"] = np.cumsum(np.cumsum(call["inputs"], 1), 2) / 10
    teacher = new(kind, **config)
    teacher(**call)
    displace(teacher)
    target = teacher(**call)
    layer = new(kind, **config)
    model = model_of(layer, call)
    displace(layer, seed=1)
    before = layer.get_weights()
    model.compile(keras.optimizers.Adam(0.003), "mse")
    loss = loss_of(model, call, target)
    fit(model, call, target, steps=20)
    assert loss_of(model, call, target) < 0.95 * loss
    for old, new_ in zip(before, layer.get_weights(), strict=True):
        assert np.any(old != new_)


def test_a_learning_rate_of_its_own():
    """The branch's weights, by a pattern of their names."""
    call = operands("align")
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
        np.testing.assert_array_equal(new_, old)
    for old, new_ in zip(before[1], after[1], strict=True):
        assert np.any(new_ != old)


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_layer_stays_as_it_is(kind):
    call = operands(kind)
    inputs = symbols(call)
    units = {} if kind == "psroi" else {"units": (8,)}
    layer = new(kind, trainable=False, **units)
    outputs = keras.layers.Dense(1)(layer(**inputs))
    model = keras.Model(inputs, outputs)
    displace(layer)
    assert layer.trainable_weights == []
    assert len(layer.non_trainable_weights) == (4 if units else 2)
    before = layer.get_weights()
    model.compile("sgd", "mse")
    fit(model, call, random(7, 3, 4, 1))
    for old, new_ in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(new_, old)


def gradients_computed(kind: str) -> np.ndarray:
    """How many gradients of inputs and displacements there have been."""
    counts = (ctypes.c_int64 * 2)()
    name = "DeformableROIAlign" if kind == "align" else "DeformablePSROIPool"
    library = ctypes.CDLL(_loader.LIBRARY)
    getattr(library, f"TfDeform{name}GradientsComputed")(counts)
    return np.array(counts[:])


@pytest.mark.parametrize(
    "mode",
    [
        "graph",
        "eager",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_layer_costs_no_gradient_when_only_a_head_learns(kind, mode):
    """Not even of displacements."""
    layer, call = displaced(kind), operands(kind)
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
    np.testing.assert_array_equal(gradients_computed(kind) - before, [0, 0])


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("kind", KINDS)
def test_given_constants_cost_no_gradient(kind, mode):
    layer = new(kind)
    call = {k: tf.constant(v) for k, v in given_operands(kind).items()}

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(call["inputs"])
            output = layer(**call)
        return tape.gradient(output, call["inputs"])

    before = gradients_computed(kind)
    (gradient if mode == "eager" else tf.function(gradient))()
    np.testing.assert_array_equal(gradients_computed(kind) - before, [1, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_deterministic(kind):
    call, results = operands(kind), []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        layer = new(kind)
        model = model_of(layer, call)
        displace(layer)
        model.compile("adam", "mse")
        fit(model, call, random(7, 3, 4, 6), steps=5)
        results.append([*layer.get_weights(), *model(call)])
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_training_without_the_bridge_to_xla(kind, monkeypatch):
    """As next to an older TensorFlow: asked for XLA, Keras declines."""
    monkeypatch.setattr(_build_info, "XLA", False)
    call = operands(kind)
    layer = new(kind)
    model = model_of(layer, call)
    assert not layer.supports_jit
    model.compile("sgd", "mse")
    assert model.jit_compile is False
    with pytest.warns(UserWarning, match="jit_compile"):
        model.compile("sgd", "mse", jit_compile=True)
    assert model.jit_compile is False
    fit(model, call, random(7, 3, 4, 6))
    assert np.any(layer.offset_kernel)


# Among other layers.


@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.parametrize("source", ["own", "given", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_keras_mask_never_becomes_anything(kind, source):
    call = {"own": operands, "given": given_operands, "plain": plain_operands}
    call = call[source](kind)
    layer = new(kind)
    layer(**call)
    if source == "own":
        displace(layer)
    call["inputs"][:, 2:5, 3:] = 0.0
    masking = keras.layers.Masking()
    masked = {k: masking(v) if k != "rois" else v for k, v in call.items()}
    assert not np.all(keras.src.backend.get_keras_mask(masked["inputs"]))
    expected = layer(**call)
    output = layer(**masked)
    np.testing.assert_array_equal(output, expected)
    assert keras.src.backend.get_keras_mask(output) is None
    inputs = symbols(call)
    outputs = layer(
        **{k: masking(v) if k != "rois" else v for k, v in inputs.items()}
    )
    model = keras.Model(inputs, outputs)
    np.testing.assert_array_equal(model(call), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_activity_regularizer(kind):
    layer = displaced(kind, activity_regularizer=keras.regularizers.L1(0.5))
    output = layer(**operands(kind))
    expected = keras.layers.ActivityRegularization(l1=0.5)
    expected(output)
    np.testing.assert_allclose(layer.losses, expected.losses, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_integers_are_cast(kind):
    layer, call = displaced(kind), operands(kind)
    call["inputs"] = np.round(10 * call["inputs"]).clip(0)
    expected = layer(**call)
    call["inputs"] = call["inputs"].astype("uint8")
    np.testing.assert_array_equal(layer(**call), expected)


def test_in_tf_data():
    layer, call = displaced("pool", units=(8,)), operands("pool")
    data = tf.data.Dataset.from_tensors((call["inputs"], call["rois"]))
    (output,) = data.map(layer).as_numpy_iterator()
    assert_close(output, layer(**call))
