# SPDX-License-Identifier: Apache-2.0
"""Tests dtype policies wherever Keras casts, and coordinates that stay exact.

`make test` takes rows of each grid that hold every pair of settings.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from compare import assert_close, assert_equal
from layer_cases import (
    FLOAT_POLICIES,
    KINDS,
    POOLS,
    Call,
    built,
    displace,
    given_call,
    in_its_type,
    model_of,
    new,
    own_call,
    tensors,
)
from operands import coordinate_type
from pairwise import grid

# Outer policies; None is the layer's.
PLACES = {
    "alone": "float32",
    "mixed model": "mixed_float16",
    "mixed subclassed model": "mixed_float16",
    "float32 model": "float32",
    "policy of all": None,
}


class Outer(keras.Model):
    """Hands its dictionary of inputs to a layer as they are."""

    def __init__(self, layer):
        super().__init__(autocast=False)
        self.layer = layer

    def call(self, call):
        return self.layer(**call)


def at_a_place(place: str, policy: str, kind: str, call: Call, **config):
    """Returns a new layer and its caller: an outer model, or the layer itself.

    The outer model is called with a dictionary like `call`.
    """
    keras.config.set_dtype_policy(PLACES[place] or policy)
    layer = new(kind, dtype=policy if PLACES[place] else None, **config)
    assert layer.dtype_policy.name == policy
    if place == "alone":
        return layer, lambda call: layer(**call)
    if place == "mixed subclassed model":
        return layer, Outer(layer)
    # An outer model cannot handle float64: it casts to its inputs' type.
    dtype = "float64" if policy == "float64" else "float32"
    return layer, model_of(layer, call, **dict.fromkeys(call, dtype))


LAYERS = {
    "conv2d": {},
    "conv2d, no modulation": {"modulation": None},
    "psroi": {},
    "pool, units": {"units": (8,)},
    "align": {},
    "align, modulation": {"units": (8, 4), "modulation": "sigmoid"},
}


@pytest.mark.parametrize("name", LAYERS)
@grid(
    {
        "policy": FLOAT_POLICIES,
        "x_dtype": ["float32", "float64"],
        "place": list(PLACES),
    }
)
def test_dtype_policies(name, policy, x_dtype, place):
    """Tests that the layer's result is the same wherever Keras casts."""
    kind = name.partition(",")[0]
    call = {k: v.astype(x_dtype) for k, v in own_call(kind).items()}
    layer, function = at_a_place(place, policy, kind, call, **LAYERS[name])
    function(call)
    displace(layer)
    actual = function(call)
    coordinates = coordinate_type(policy)
    assert {v.dtype for v in layer.weights} == {coordinates}
    expected, tolerance = in_its_type(layer, call)
    assert_close(actual, expected, tolerance, dtype=layer.compute_dtype)


@pytest.mark.parametrize("policy", FLOAT_POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_type_of_a_symbolic_output(kind, policy):
    layer = new(kind, dtype=policy)
    call = tensors({k: v.shape for k, v in own_call(kind).items()})
    assert layer(**call).dtype == layer.compute_dtype


# One sample. The map has 128 columns whose pixels are `x - origin`, times a
# factor, so that the output tells the sample's place.
_REGION = {"pooled_size": 1, "spatial_scale": 1 / 64}
ONE_SAMPLE = {
    "conv2d": {
        "filters": 1,
        "kernel_size": 1,
        "kernel_initializer": "ones",
        "modulation": None,
    },
    "psroi": {
        **_REGION,
        "output_dim": 1,
        "group_size": 1,
        "part_size": 1,
        "sample_per_part": 1,
        "trans_std": 1.0,
        "num_classes": 1,
    },
    "pool": {**_REGION, "sample_per_part": 1, "trans_std": 1.0},
    "align": {**_REGION, "sampling_ratio": 1, "gamma": 1.0},
}
# The column of the sample that is not displaced, in the regions below.
PLAIN = {"conv2d": 0.0, "psroi": 31.5, "pool": 31.5, "align": 63.5}


def ramp(origin: float, dtype: str) -> np.ndarray:
    columns = np.arange(128) - origin
    return np.tile(columns, (1, 4, 1))[..., np.newaxis].astype(dtype)


def regions_of_64_columns(kind: str, dtype: str) -> np.ndarray:
    return np.array([[0, 2048, 64, 6144 - (kind != "align"), 128]], dtype)


# The ROI's first corner does not fit in 16 bits: at 1 / 64 map pixel per image
# pixel, its sample is at 31.5 + 1 / 64 for pooling, at 39.5 + 1 / 64 for
# ROIAlign. The term 1 / 64 is missing where 2049 became 2048.
CORNER = np.float32([[0, 2049, 64, 3072, 127]])
GRID = {
    "policy": ["float32", "mixed_float16", "mixed_bfloat16"],
    "x_dtype": ["float32", "float64"],
    "place": list(PLACES),
}


@pytest.mark.parametrize("kind", POOLS)
@grid(GRID)
def test_rois_remain_float32(kind, policy, x_dtype, place):
    """Tests the layer and its branch: neither may read 2049 as 2048."""
    origin = 39.5 if kind == "align" else 31.5
    call = {"inputs": ramp(origin, x_dtype), "rois": CORNER.astype(x_dtype)}
    if kind == "align":  # (2049 + 3073) / 2 / 64 - 0.5
        call["rois"][0, 3] = 3073
    if kind == "psroi":
        call["trans_inputs"] = call["inputs"]
    layer, function = at_a_place(place, policy, kind, call, **ONE_SAMPLE[kind])
    assert_equal(function(call), [[[[1 / 64]]]])
    # 1 / 64 makes a displacement of 1 / 16 ROI (of nearly 16 pixels).
    kernel = np.zeros(layer.offset_kernel.shape)
    kernel[..., 1] = 4.0
    layer.offset_kernel.assign(kernel)
    width = 1024 / 64 if kind == "align" else (3073 - 2049) / 64
    assert_equal(function(call), [[[[1 / 64 + 1 / 16 * width]]]])


@pytest.mark.parametrize("kind", KINDS)
@grid(GRID)
def test_given_displacements_remain_float32(kind, policy, x_dtype, place):
    """Tests 0.10001 of 64 pixels, which 16 bits miss by 0.002 pixels or more.

    A convolution's modulator of 2**17 does not fit in float16 either.
    """
    call = {"inputs": ramp(PLAIN[kind] + 6.375, x_dtype)}
    expected = 0.10001 * 64 - 6.375
    for rounded in ("float16", "bfloat16"):
        other = float(tf.cast(0.10001, rounded)) * 64 - 6.375
        assert abs(other / expected - 1) > 0.05
    if kind == "conv2d":
        offset = np.zeros((1, 4, 128, 2), x_dtype)
        offset[0, 0, 0, 1] = 0.10001 * 64
        call["inputs"] *= 2**-10
        call["offset"] = offset
        call["modulator"] = np.ones((1, 4, 128, 1), x_dtype)
        call["modulator"][0, 0, 0] = 2**17
        expected *= 2**7
    else:
        call["rois"] = regions_of_64_columns(kind, x_dtype)
        displacement = np.array([0, 0.10001], x_dtype).reshape(1, 1, 1, 2)
        call[KINDS[kind].given] = displacement
    layer, function = at_a_place(place, policy, kind, call, **ONE_SAMPLE[kind])
    actual = function(call)
    assert actual.dtype == layer.compute_dtype
    np.testing.assert_allclose(
        np.float32(actual[0, 0, 0, 0]), expected, rtol=5e-3
    )


@pytest.mark.parametrize("place", ["alone", "policy of all", "float32 model"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_stays_float64(kind, place):
    """Tests values, ROIs and displacements, given or from the branch."""
    dx, origin = 0.1 + 1e-11, PLAIN[kind] + 6.4
    if kind == "conv2d":
        offset = np.zeros((1, 4, 128, 2))
        offset[0, 0, 0, 1] = 64 * dx
        call = {"offset": offset}
    else:
        rois = regions_of_64_columns(kind, "float64")
        if kind == "align":  # not rounded: corners are exact as well
            rois[0, 1:4:2] += 64e-9
            origin += 1e-9
        call = {"rois": rois, KINDS[kind].given: np.array([[[[0, dx]]]])}
    call = {"inputs": ramp(origin, "float64"), **call}
    expected = dx * 64 - 6.4
    config = ONE_SAMPLE[kind]
    _, function = at_a_place(place, "float64", kind, call, **config)
    actual = function(call)
    assert actual.dtype == "float64"
    np.testing.assert_allclose(actual[0, 0, 0, 0], expected, rtol=1e-4)

    del call[KINDS[kind].given]
    if kind == "psroi":
        call["trans_inputs"] = call["inputs"]
    layer, function = at_a_place(place, "float64", kind, call, **config)
    function(call)
    layer.offset_bias.assign([0, 64 * dx if kind == "conv2d" else dx])
    actual = function(call)
    np.testing.assert_allclose(actual[0, 0, 0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_displacements_of_another_type(kind):
    """Tests that displacements are cast like ROIs, for all input types."""
    layer, call = new(kind), given_call(kind)
    names = [KINDS[kind].given, *(["modulator"] if kind == "conv2d" else [])]
    for name in names:
        # Numbers that are exact in 16 bits.
        call[name] = np.round(call[name] * 64).clip(-127, 127) / 64
    expected = layer(**call)
    for dtype in ("float16", "bfloat16", "float64"):
        other = {**call, **{k: tf.cast(call[k], dtype) for k in names}}
        for name in names:
            assert_equal(other[name], call[name])
        assert_equal(layer(**other), expected)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("kind", POOLS)
def test_rois_may_be_integers(kind, dtype):
    layer, call = built(kind, "own")
    call["rois"] = np.round(call["rois"])
    expected = layer(**call)
    call["rois"] = call["rois"].astype(dtype)
    assert_equal(layer(**call), expected)
    assert_equal(model_of(layer, call, rois=dtype)(call), expected)
