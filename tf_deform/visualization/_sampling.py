# SPDX-License-Identifier: Apache-2.0
"""Computes where a convolution reads its input, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D
from tf_deform.ops._arguments import Pair, received


def sampling_locations(
    layer: keras.layers.Layer, inputs: Any, offset: Any = None
) -> np.ndarray:
    """Returns where a convolution samples its input.

    For output cell (i, j) and tap (kh, kw), in pixels of the layer's input:

        y = i * stride_h - pad_top + kh * dilation_h + dy

    and x likewise, where a plain convolution has dy = dx = 0. A location
    between pixels reads the pixels around it, and one outside of the map
    reads zeros.

    Args:
        layer: A built `DeformableConv2D` or `Conv2D`.
        inputs: What the layer is called with, `(batch, height, width,
            channels)`, or `(batch, channels, height, width)` if the layer is
            "channels_first".
        offset: The displacements that the layer is called with, if it has no
            branch of its own.

    Returns:
        `(batch, out_h, out_w, offset_groups, taps, 2)`, (y, x) in pixels,
        whatever the layer's data format is; 0 is the centre of the first pixel.
        Taps are in the order of the kernel's rows. A plain convolution has one
        offset group.

    Raises:
        TypeError: `layer` is no such layer.
        ValueError: The layer has no weights yet, or arguments do not fit.
    """
    return sample(layer, inputs, offset)[0]


def sampling_modulation(
    layer: keras.layers.Layer,
    inputs: Any,
    offset: Any = None,
    modulator: Any = None,
) -> np.ndarray:
    """Returns the factors by which a convolution multiplies its samples.

    Args:
        layer: A built `DeformableConv2D` or `Conv2D`.
        inputs, offset: As in `sampling_locations`.
        modulator: The factors that the layer is called with.

    Returns:
        `(batch, out_h, out_w, offset_groups, taps)`; 1 where the layer has no
        modulation.

    Raises:
        TypeError: `layer` is no such layer.
        ValueError: The layer has no weights yet, or arguments do not fit.
    """
    return sample(layer, inputs, offset, modulator)[1]


def sample(
    layer: Any, inputs: Any, offset: Any = None, modulator: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns locations and modulation, for one run of the branch."""
    check_convolution(layer)
    given = {"offset": offset, "modulator": modulator}
    given = {name: x for name, x in given.items() if x is not None}
    if given and not isinstance(layer, DeformableConv2D):
        raise ValueError(
            "Expected no displacements for a plain convolution. Received: "
            f"{', '.join(given)} for layer {layer.name!r}"
        )
    if getattr(layer, "offset_kernel", 0) is None and offset is None:
        raise ValueError(
            f"Expected `offset`, with which layer {layer.name!r} was built: it "
            "has no branch of its own. Received: offset=None"
        )
    first = layer.data_format == "channels_first"
    inputs = tf.cast(tf.convert_to_tensor(inputs), layer.compute_dtype)
    channels = int(layer.kernel.shape[2]) * layer.groups
    if inputs.shape.rank != 4 or inputs.shape[1 if first else 3] != channels:
        raise ValueError(
            f"Expected `inputs` to have rank 4 and {channels} channels "
            f"({layer.data_format}). Received: inputs.shape={inputs.shape}"
        )
    if given:
        layer.compute_output_shape(
            inputs.shape,
            *(None if x is None else np.shape(x) for x in (offset, modulator)),
        )

    def to_last(value: Any) -> tf.Tensor:
        value = tf.convert_to_tensor(value)
        return tf.transpose(value, (0, 2, 3, 1)) if first else value

    inputs = to_last(inputs)
    if offset is not None:
        offset = to_last(offset)
        modulator = None if modulator is None else to_last(modulator)
    elif isinstance(layer, DeformableConv2D):
        offset, modulator = _branch(layer, inputs)
    return _locate(layer, inputs, offset, modulator)


def _branch(
    layer: DeformableConv2D, inputs: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor | None]:
    fields = layer._run_branch(inputs)
    if layer.modulation is None:
        return fields, None
    count = fields.shape[-1] // 3
    modulator = tf.sigmoid(fields[..., 2 * count :])
    if layer.modulation == "2sigmoid":
        modulator *= 2
    return fields[..., : 2 * count], modulator


def _locate(
    layer: Any,
    inputs: tf.Tensor,
    offset: tf.Tensor | None,
    modulator: tf.Tensor | None,
) -> tuple[np.ndarray, np.ndarray]:
    window = (layer.kernel_size, layer.strides, layer.dilation_rate)
    size = inputs.shape[1:3]
    axes = []
    for pixels, (before, after), taps, stride, rate in zip(
        size, paddings(layer.padding, size, *window), *window
    ):
        span = rate * (taps - 1) + 1
        cells = max((pixels + before + after - span) // stride + 1, 0)
        axes.append(
            stride * np.arange(cells)[:, None] + rate * np.arange(taps) - before
        )
    out = tuple(len(axis) for axis in axes)
    rows, columns = layer.kernel_size
    # (out_h, out_w, kernel_h, kernel_w) of each axis.
    y = np.broadcast_to(axes[0][:, None, :, None], (*out, rows, columns))
    x = np.broadcast_to(axes[1][None, :, None, :], (*out, rows, columns))
    groups = getattr(layer, "offset_groups", 1)
    shape = (inputs.shape[0], *out, groups, rows * columns)
    base = np.stack((y, x), -1).reshape(1, *out, 1, rows * columns, 2)
    moved = 0.0 if offset is None else _array(offset).reshape((*shape, 2))
    factors = 1.0 if modulator is None else _array(modulator).reshape(shape)
    locations = np.broadcast_to(base + moved, (*shape, 2))
    return np.array(locations), np.array(np.broadcast_to(factors, shape))


def _array(value: Any) -> np.ndarray:
    return np.asarray(value, "float64")


def paddings(
    padding: Any,
    size: Sequence[int],
    taps: Sequence[int],
    strides: Sequence[int],
    rates: Sequence[int],
) -> list[Pair]:
    """Returns a window's padding in pixels, (before, after) per axis."""
    if padding == "valid":
        return [(0, 0), (0, 0)]
    if padding != "same":
        return list(padding)
    result = []
    for pixels, count, stride, rate in zip(size, taps, strides, rates):
        cells = -(-pixels // stride)
        spare = (cells - 1) * stride + rate * (count - 1) + 1 - pixels
        before = max(spare, 0) // 2
        result.append((before, max(spare, 0) - before))
    return result


def is_convolution(layer: Any) -> bool:
    """Tells whether a layer is a two-dimensional convolution, not transposed.

    One by channel (depthwise) is none, as its classes differ between Keras'.
    """
    other = (keras.layers.DepthwiseConv2D, keras.layers.Conv2DTranspose)
    return isinstance(layer, keras.layers.Conv2D) and not isinstance(
        layer, other
    )


def check_convolution(layer: Any) -> None:
    if not is_convolution(layer):
        raise TypeError(
            "Expected `layer` to be a DeformableConv2D or a Conv2D of "
            f"{keras.__name__} {keras.__version__}. {received(layer)}"
        )
    if not layer.built:
        raise ValueError(
            "Expected `layer` to have been called, or built. Received: layer "
            f"{_keras.path_of(layer)!r}, which has no weights yet"
        )
