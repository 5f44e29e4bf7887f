# SPDX-License-Identifier: Apache-2.0
"""Measures how wide a convolution looks."""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_deform._keras import keras
from tf_deform.ops._arguments import received
from tf_deform.visualization import _walk


def effective_dilation(
    model: keras.Model, layer: Any, images: Any, boxes: Any
) -> np.ndarray:
    """Returns the mean distance of a convolution's adjacent taps in boxes.

    Taps are adjacent if they are neighbours in a row or a column of the kernel.
    The mean is that of all cells whose centre lies in a box. A plain layer with
    `dilation_rate` d has d everywhere.

    Source: Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, section 4.1 and Table 2.

    Args:
        model: A built model with one input.
        layer: One of its convolutions with several taps, or a regular
            expression of its path. Of a layer that is called more than once,
            the first call counts.
        images: What the model is called with, `(batch, height, width,
            channels)`, or channels first if that is Keras' format of images.
        boxes: `(boxes, 5)`: batch_index, x1, y1, x2, y2, in pixels of the
            images.

    Returns:
        `(boxes,)`, in pixels of the layer's input; NaN where a box has no
        cell's centre.

    Raises:
        TypeError: An argument has another type.
        ValueError: Shapes do not fit, the model does not call the layer, or the
            layer has one tap.
    """
    images = _walk.to_images(images)
    found = np.asarray(boxes)
    if found.ndim != 2 or found.shape[1] != 5 or found.dtype.kind not in "uif":
        raise ValueError(
            "Expected `boxes` to have the shape (boxes, 5): batch_index, x1, "
            f"y1, x2, y2. {received(boxes)}"
        )
    index = found[:, 0].astype(int)
    if ((index != found[:, 0]) | (index < 0) | (index >= len(images))).any():
        raise ValueError(
            f"Expected `boxes` to name images 0 to {len(images) - 1}. "
            f"Received: {found[:, 0]}"
        )
    calls = _walk.walk(model, images, layer)
    if any(call.layer is not calls[0].layer for call in calls):
        raise ValueError(
            "Expected `layer` to name one layer. Received: "
            f"{layer!r}, which names {[call.name for call in calls]}"
        )
    call = calls[0]
    distances = _distances(call)
    y, x = (
        call.outputs.start[axis] + call.outputs.step[axis] * np.arange(count)
        for axis, count in enumerate(call.size)
    )
    result = np.full(len(found), np.nan)
    for number, (image, (x1, y1, x2, y2)) in enumerate(
        zip(index, found[:, 1:])
    ):
        rows = (y >= y1) & (y <= y2)
        columns = (x >= x1) & (x <= x2)
        if rows.any() and columns.any():
            result[number] = distances[image][np.ix_(rows, columns)].mean()
    return result


def _distances(call: _walk.Call) -> np.ndarray:
    """Returns the mean distance of adjacent taps, `(batch, out_h, out_w)`."""
    *shape, _, _ = call.locations.shape
    rows, columns = call.layer.kernel_size
    if rows * columns == 1:
        raise ValueError(
            "Expected a layer with several taps. Received: "
            f"{call.name!r}, with one"
        )
    taps = call.locations.reshape(*shape, rows, columns, 2)
    found = [
        np.linalg.norm(np.diff(taps, axis=axis), axis=-1).reshape(*shape, -1)
        for axis in (-3, -2)
    ]
    return np.concatenate(found, -1).mean((-2, -1))
