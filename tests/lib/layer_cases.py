# SPDX-License-Identifier: Apache-2.0
"""Lists the four layers, calls of them, and the expected results.

A new layer's branch is zero, and then hardly any fault of displacements shows.
So the tests start with `displaced`, which gives the branch random values that
move samples by more than a pixel.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import reference
import roi_reference
import tensorflow as tf
from operands import coordinate_type, random
from tolerances import FORWARD, POOLING

from tf_deform import _keras, _loader, ops
from tf_deform._keras import keras
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

Layer = keras.layers.Layer
Call = dict[str, Any]


class Kind(NamedTuple):
    """Describes a layer, and the calls with which the tests exercise it.

    Attributes:
        layer: The class.
        channels: Channels of `inputs`, with this config.
        given: The argument for displacements.
        displacements: Their shape for an image, or for a region.
        factor: The argument that scales them, if there is one.
        config: Arguments of its constructor, unless a test sets others.
    """

    layer: type
    channels: int
    given: str
    displacements: tuple[int, ...]
    factor: str | None
    config: dict


def _pooling(layer: type, *args: Any, **config: Any) -> Kind:
    config |= {"pooled_size": (3, 4), "spatial_scale": 0.25}
    return Kind(layer, *args, config)


KINDS = {
    "conv2d": Kind(
        DeformableConv2D,
        6,
        "offset",
        (6, 7, 18),
        None,
        {"filters": 4, "kernel_size": 3, "modulation": "sigmoid"},
    ),
    "psroi": _pooling(
        *(DeformablePSROIPooling, 36, "trans", (2, 5, 6), "trans_std"),
        output_dim=6,
        group_size=(3, 2),
        part_size=(2, 5),
        sample_per_part=3,
        trans_std=0.5,
        num_classes=3,
    ),
    "pool": _pooling(
        *(DeformableROIPooling, 6, "offset", (3, 4, 2), "trans_std"),
        sample_per_part=3,
        trans_std=0.5,
    ),
    "align": _pooling(
        *(DeformableROIAlign, 6, "offset", (3, 4, 2), "gamma"),
        sampling_ratio=3,
        gamma=0.5,
    ),
}
CONVOLUTIONS = [
    {},
    {"padding": "same"},
    {"strides": 2, "padding": "same"},
    {"strides": (2, 3), "dilation_rate": (2, 1), "padding": "same"},
    {"strides": 2, "dilation_rate": 2},
    {"padding": 1},
    {"padding": (2, 1)},
    {"padding": ((0, 1), (3, 2)), "strides": (1, 2)},
    {"groups": 2, "offset_groups": 3},
    {"groups": 3, "offset_groups": 2, "filters": 6, "kernel_size": (2, 3)},
    {"boundary": "clamp", "padding": "same"},
    {"use_bias": False},
    {"filters": 7},  # as many as the output's columns
]
MODULATIONS = [None, "sigmoid", "2sigmoid"]
POOLS = ["psroi", "pool", "align"]
DENSE = ["pool", "align"]  # Their branch consists of dense layers.
TRANS_CHANNELS = 7
POOL_BRANCHES = [
    ("psroi", {}),
    ("psroi", {"num_classes": 1}),
    ("psroi", {"part_size": None}),
    *[
        (kind, {"units": units})
        for kind in DENSE
        for units in [(), (8,), (8, 4)]
    ],
    *[
        ("align", {"units": units, "modulation": "sigmoid"})
        for units in [(), (8, 4)]
    ],
]
BRANCHES = [
    ("conv2d", {}),
    ("conv2d", {"modulation": None, "use_bias": False}),
    ("conv2d", {"modulation": "2sigmoid", "groups": 2, "offset_groups": 3}),
    *POOL_BRANCHES,
]
# One kind of each layer; the kind with hidden layers for layers that may have
# some.
ONE_OF_EACH = [
    ("conv2d", {}),
    ("psroi", {}),
    ("pool", {"units": (8,)}),
    ("align", {"units": (8,)}),
]
FLOAT_POLICIES = ["float32", "float64", "mixed_float16", "mixed_bfloat16"]


def new(kind: str, **config: Any) -> Layer:
    """Returns a layer that is not built."""
    return KINDS[kind].layer(**{**KINDS[kind].config, **config})


# Calls: arguments by name.


def regions(count: int = 7) -> np.ndarray:
    """Returns ROIs of 4 to 6 map pixels inside the 11x12 maps of two images."""
    rng = np.random.default_rng(5)
    rois = np.zeros((count, 5), np.float32)
    rois[:, 0] = np.arange(count) % 2
    rois[:, 1:3] = rng.uniform(4, 22, (count, 2))
    rois[:, 3:] = rois[:, 1:3] + rng.uniform(16, 24, (count, 2))
    return rois


def own_call(kind: str, count: int = 7, seed: int = 0) -> Call:
    """Returns a call that lets the layer's own branch run."""
    if kind == "conv2d":
        return {"inputs": random(2, 8, 9, 6, seed=seed)}
    result = {
        "inputs": random(2, 11, 12, KINDS[kind].channels, seed=seed),
        "rois": regions(count),
    }
    if kind == "psroi":
        maps = random(2, 11, 12, TRANS_CHANNELS, seed=seed + 1)
        result["trans_inputs"] = maps
    return result


def given_call(kind: str, count: int = 7) -> Call:
    """Returns a call with displacements, which the layer uses unchanged."""
    result = own_call(kind, count)
    result.pop("trans_inputs", None)
    if kind == "conv2d":
        result["offset"] = 2 * random(2, 6, 7, 18, seed=1)
        result["modulator"] = random(2, 6, 7, 9, seed=2)
        return result
    size = (count, *KINDS[kind].displacements)
    result[KINDS[kind].given] = 0.8 * random(*size, seed=3)
    return result


def plain_call(kind: str) -> Call:
    """Returns a call without any displacement."""
    return {
        name: value
        for name, value in own_call(kind).items()
        if name in ("inputs", "rois")
    }


CALLS = {"own": own_call, "given": given_call, "plain": plain_call}
SOURCES = [
    *[(kind, source) for kind in KINDS for source in ("own", "given")],
    ("psroi", "plain"),  # without displacements; others then use a branch
]
EVERY_CALL = [
    *[(kind, "own", config) for kind, config in BRANCHES],
    *[(kind, "given", {}) for kind in KINDS],
    ("psroi", "plain", {}),
]


def output_shape(kind: str) -> tuple[int, ...]:
    """Returns the shape of the output of a call made in this file."""
    return (2, 6, 7, 4) if kind == "conv2d" else (7, 3, 4, 6)


def channels_first(values: Call) -> Call:
    """Returns the call with its maps laid out in channels first."""
    return {
        name: np.moveaxis(value, 3, 1) if np.ndim(value) == 4 else value
        for name, value in values.items()
    }


def tensors(shapes: dict) -> dict:
    """Returns a symbolic call with these shapes."""
    kind = _keras.KerasTensor
    if _keras.KERAS_2:
        return {k: kind(tf.TensorSpec(shape)) for k, shape in shapes.items()}
    return {name: kind(shape) for name, shape in shapes.items()}


def symbols(call: Call, **dtypes: str) -> dict:
    """Returns the inputs of a model that is called with `call`."""
    return {
        name: keras.Input(value.shape[1:], dtype=dtypes.get(name), name=name)
        for name, value in call.items()
    }


def model_of(layer: Layer, call: Call, **dtypes: str) -> keras.Model:
    """Returns a functional model of this layer alone."""
    inputs = symbols(call, **dtypes)
    return keras.Model(inputs, layer(**inputs))


def fit(model: keras.Model, call: Call, target: Any, steps: int = 1) -> None:
    """Trains with one batch, because there are not as many ROIs as images."""
    data = tf.data.Dataset.from_tensors((call, target)).repeat(steps)
    model.fit(data, shuffle=False, verbose=0)


def loss_of(model: keras.Model, call: Call, target: Any) -> float:
    """Returns the loss of one batch."""
    data = tf.data.Dataset.from_tensors((call, target))
    return model.evaluate(data, verbose=0)


MODES = ["eager", "graph", "unknown sizes", "XLA"]


def signature_of(layer: Layer, call: Call, mode: str) -> list[tf.TensorSpec]:
    """Returns what a graph knows of the call.

    With "nothing known", the channels of `inputs` are known if no weights of a
    branch tell them.
    """
    shapes = {name: np.shape(value) for name, value in call.items()}
    if mode == "unknown sizes":
        shapes = {k: (None,) * (len(v) - 1) + v[-1:] for k, v in shapes.items()}
    elif mode == "nothing known":
        inputs = [None] * 4
        axis = 1 if layer.data_format == "channels_first" else 3
        inputs[axis] = shapes["inputs"][axis]
        shapes = dict.fromkeys(shapes)
        if isinstance(layer, DeformableConv2D) or layer.offset_kernel is None:
            shapes["inputs"] = inputs
    return [
        tf.TensorSpec(shape, np.asarray(call[name]).dtype)
        for name, shape in shapes.items()
    ]


def in_mode(layer: Layer, call: Call, mode: str) -> Callable:
    """Returns a function of calls like `call`: the layer, or a graph of it."""
    if mode == "eager":
        return lambda call: layer(**call)
    if mode == "XLA" and not _loader.supports_jit():
        pytest.skip("built without the bridge to XLA")
    function = tf.function(
        lambda *values: layer(**dict(zip(call, values))),
        input_signature=signature_of(layer, call, mode),
        jit_compile=mode == "XLA",
    )
    return lambda call: function(*call.values())


def value_and_gradients(
    function: Callable, call: Call, weights: Any = (), output_grad: Any = None
) -> tuple:
    """Returns the output, and gradients of a weighted sum of it.

    They are the gradients of the call's operands, by name, and of weights.
    Unless `output_grad` is given, an element's weight depends on the number of
    elements before it, not after it.
    """
    call = {name: tf.convert_to_tensor(x) for name, x in call.items()}
    with tf.GradientTape() as tape:
        tape.watch(list(call.values()))
        output = function(**call)
        if output_grad is None:
            places = tf.reshape(tf.range(tf.size(output)), tf.shape(output))
            output_grad = tf.cos(tf.cast(places, output.dtype))
        loss = tf.reduce_sum(output * output_grad)
    values = [_keras.tf_variable(weight) for weight in weights]
    return output, *tape.gradient(loss, [call, values])


# Branches that are not zero.


def displace(layer: Layer, seed: int = 0) -> None:
    """Sets all weights except a convolution's kernel.

    Samples of a convolution move by about (1.4, -2.3) +- 1 pixels, bins of a
    region by about (0.3, -0.45) +- 0.2 ROIs.
    """
    rng = np.random.default_rng(seed)
    if isinstance(layer, DeformableConv2D):
        *fan_in, channels = layer.offset_kernel.shape
        scale = 0.5 / np.sqrt(np.prod(fan_in))
        taps = layer.offset_groups * int(np.prod(layer.kernel_size))
        bias = rng.normal(0, 0.5, channels)
        bias[: 2 * taps] += np.tile([1.4, -2.3], taps)  # (dy, dx), ...
        kernel = rng.normal(0, scale, layer.offset_kernel.shape)
        layer.offset_kernel.assign(kernel)
        layer.offset_bias.assign(bias)
        if layer.bias is not None:
            layer.bias.assign(rng.normal(size=layer.bias.shape))
        return
    for variable in layer.weights:
        fan_in = math.prod(variable.shape[:-1])
        is_bias = _keras.name_of(variable) == "offset_bias"
        scale = 0.3 if is_bias else fan_in**-0.5
        variable.assign(rng.normal(0, scale, variable.shape))
    bias = layer.offset_bias.numpy()
    if isinstance(layer, DeformablePSROIPooling):  # [class][(dy, dx)][part]
        fields = bias.reshape(layer.num_classes, 2, -1)
        fields += np.array([0.6, -0.9])[:, np.newaxis]
    else:  # [bin][(dy, dx)]
        bias.reshape(-1, 2)[:] += [0.6, -0.9]
    layer.offset_bias.assign(bias)


def built(
    kind: str, source: str, seed: int = 0, **config: Any
) -> tuple[Layer, Call]:
    """Returns a built layer and its call; a branch is far from zero."""
    layer, call = new(kind, **config), CALLS[source](kind)
    if layer.data_format == "channels_first":
        call = channels_first(call)
    layer(**call)
    if layer.offset_kernel is not None:
        displace(layer, seed)
    return layer, call


def displaced(kind: str, seed: int = 0, **config: Any) -> Layer:
    """Returns a built layer whose displacements are far from zero."""
    return built(kind, "own", seed, **config)[0]


# Expected results of a layer.


_BY_HAND = types.SimpleNamespace(
    deformable_conv2d=reference.deformable_conv2d,
    deformable_psroi_pool=roi_reference.deformable_psroi_pool,
    deformable_roi_align=roi_reference.deformable_roi_align,
)


def by_the_op(
    layer: Layer, inputs: Any, *coordinates: Any, functions: Any = ops
) -> Any:
    """Returns the op's output for `(offset, modulator)` or `(rois, trans)`."""
    if isinstance(layer, DeformableConv2D):
        name, operands = "deformable_conv2d", [layer.kernel, *coordinates]
    else:
        align = isinstance(layer, DeformableROIAlign)
        name = "deformable_roi_align" if align else "deformable_psroi_pool"
        operands = coordinates
    # The layer's attributes that the op has under the same names.
    options = {
        option: getattr(layer, option)
        for option, parameter in inspect.signature(
            getattr(ops, name)
        ).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY and hasattr(layer, option)
    }
    del options["implementation"]
    options.pop("modulation", None)  # The modulator is given as it is.
    if isinstance(layer, DeformableROIPooling):
        options |= {"output_dim": inputs.shape[-1], "group_size": 1}
    output = getattr(functions, name)(inputs, *operands, **options)
    bias = getattr(layer, "bias", None)
    return output if bias is None else output + np.asarray(bias)


def by_hand(layer: Layer, inputs: Any, *coordinates: Any) -> np.ndarray:
    """Returns the same by loops in NumPy, in float64."""
    return by_the_op(layer, inputs, *coordinates, functions=_BY_HAND)


def conv2d_branch(layer: Layer, x: Any) -> tuple:
    """Computes `(offset, mask)` from a layer's weights, in the type of `x`.

    Channels last; `mask` is None without modulation.
    """
    x, pads = tf.convert_to_tensor(x), layer.padding
    if not isinstance(pads, str):
        pads = reference.explicit_padding(pads, None, None, None, None)
        x = tf.pad(x, [(0, 0), *pads, (0, 0)])
        pads = "valid"
    values = tf.nn.conv2d(
        x,
        tf.cast(layer.offset_kernel, x.dtype),
        strides=layer.strides,
        padding=pads.upper(),
        dilations=layer.offset_dilation_rate or layer.dilation_rate,
    )
    values += tf.cast(layer.offset_bias, x.dtype)
    values = tf.cast(values, coordinate_type(x.dtype.name))
    if layer.modulation is None:
        return values, None
    offset, mask = tf.split(values, [values.shape[-1] // 3 * 2, -1], -1)
    mask = tf.sigmoid(mask)
    return offset, 2 * mask if layer.modulation == "2sigmoid" else mask


def pool_branch(
    layer: Layer,
    inputs: Any,
    rois: Any,
    trans_inputs: Any = None,
    functions: Any = _BY_HAND,
    dtype: Any = tf.float64,
) -> np.ndarray:
    """Computes displacements of bins from a layer's weights, in a type.

    `functions` are the functions that pool, without displacements.
    """
    weights = {
        _keras.name_of(v): tf.cast(_keras.tf_variable(v), dtype)
        for v in layer.weights
    }
    kernel, bias = weights["offset_kernel"], weights["offset_bias"]
    if isinstance(layer, DeformablePSROIPooling):
        maps = tf.cast(trans_inputs, dtype)
        maps = tf.tensordot(maps, kernel[0, 0], 1) + bias
        return functions.deformable_psroi_pool(
            # Places of samples are computed in the type of the inputs.
            tf.cast(maps, trans_inputs.dtype).numpy(),
            rois,
            output_dim=2 * layer.num_classes,
            spatial_scale=layer.spatial_scale,
            pooled_size=layer.part_size,
            sample_per_part=layer.sample_per_part,
        )
    x = by_the_op(layer, inputs, rois, functions=functions)
    x = tf.reshape(tf.cast(x, dtype), (len(rois), math.prod(x.shape[1:])))
    for index in range(len(layer.units)):
        x = tf.matmul(x, weights[f"offset_hidden_kernel_{index}"])
        x = tf.nn.relu(x + weights[f"offset_hidden_bias_{index}"])
    x = tf.matmul(x, kernel) + bias
    return tf.reshape(x, (len(rois), *layer.pooled_size, 2)).numpy()


def pool_factors(
    layer: Layer,
    inputs: Any,
    rois: Any,
    functions: Any = _BY_HAND,
    dtype: Any = tf.float64,
) -> Any:
    """Computes what multiplies bins from a layer's weights; 1 without it."""
    if getattr(layer, "modulation", None) is None:
        return 1
    weights = {
        _keras.name_of(v).removeprefix("offset_modulator_"): tf.cast(
            _keras.tf_variable(v), dtype
        )
        for v in layer.weights
        if "modulator" in v.name
    }
    x = by_the_op(layer, inputs, rois, functions=functions)
    x = tf.reshape(tf.cast(x, dtype), (len(rois), math.prod(x.shape[1:])))
    for index in range(len(layer.units) - 1):
        x = tf.matmul(x, weights[f"hidden_kernel_{index}"])
        x = tf.nn.relu(x + weights[f"hidden_bias_{index}"])
    x = np.float64(tf.matmul(x, weights["kernel"]) + weights["bias"])
    return 1 / (1 + np.exp(-x.reshape(len(rois), *layer.pooled_size, 1)))


def in_its_type(layer: Layer, call: Call) -> tuple[np.ndarray, Any]:
    """Computes the branch in the layer's type, and the rest exactly.

    Returns the output and the tolerance for it. The branch is computed by stock
    ops, and by the op without displacements.
    """
    compute = tf.as_dtype(layer.compute_dtype)
    coordinates = coordinate_type(compute.name)
    inputs = tf.cast(call["inputs"], compute).numpy()
    if isinstance(layer, DeformableConv2D):
        kernel, bias = (
            tf.cast(weight, compute) for weight in (layer.kernel, layer.bias)
        )
        output = reference.deformable_conv2d(
            inputs, kernel, *conv2d_branch(layer, inputs)
        )
        return output + np.float64(bias), FORWARD[compute.name]
    rois = call["rois"].astype(coordinates)
    maps = call.get("trans_inputs")
    if maps is not None:
        maps = tf.cast(maps, compute).numpy()
    displacements = pool_branch(layer, inputs, rois, maps, ops, compute)
    displacements = np.asarray(displacements).astype(coordinates)
    output = by_hand(layer, inputs, rois, displacements)
    if getattr(layer, "modulation", None) is None:
        return output, POOLING[compute.name]
    # The bins, the factors and their products are rounded.
    output *= pool_factors(layer, inputs, rois, ops, compute)
    return output, FORWARD[compute.name]
