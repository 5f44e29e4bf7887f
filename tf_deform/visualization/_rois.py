# SPDX-License-Identifier: Apache-2.0
"""Computes where the layers that pool regions move the parts of a region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform.layers import DeformablePSROIPooling, DeformableROIAlign
from tf_deform.layers._roi_layer import ROILayer
from tf_deform.ops._arguments import received


def parts(
    layer: Any,
    inputs: Any,
    roi: Sequence[float],
    displacements: Any = None,
    trans_inputs: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the regular and the moved bins of a region.

    Returns:
        Two times `(bins, 4)`: x1, y1, x2, y2 in pixels of the image, 0 being
        the centre of the first pixel. A layer with several classes of
        displacements shows the first.
    """
    if not isinstance(layer, ROILayer):
        raise TypeError(
            "Expected `layer` to be one that pools regions, of "
            f"tf_deform.layers. {received(layer)}"
        )
    rois = np.asarray(roi, "float64")
    if rois.shape != (5,):
        raise ValueError(
            "Expected `roi` to be (batch_index, x1, y1, x2, y2). "
            f"{received(roi)}"
        )
    rois = tf.constant(rois[None], "float32")
    if not layer.built:
        raise ValueError(
            "Expected `layer` to have been called, or built. Received: layer "
            f"{layer.name!r}, which has not been"
        )
    shifts = _shifts(layer, inputs, rois, displacements, trans_inputs)
    scale = layer.spatial_scale
    corners = np.asarray(rois[0, 1:], "float64").reshape(2, 2)
    if isinstance(layer, DeformableROIAlign):
        # Corners lie half a pixel of the map before what they name.
        start, end = corners * scale - 0.5
        size, factor = end - start, layer.gamma
    else:
        rounded = np.floor(np.abs(corners) + 0.5) * np.sign(corners)
        start = rounded[0] * scale - 0.5
        end = (rounded[1] + 1) * scale - 0.5
        size, factor = np.maximum(end - start, 0.1), layer.trans_std
    rows, columns = layer.pooled_size
    y, x = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    cells = np.stack((x, y), -1).reshape(-1, 2)
    step = size / (columns, rows)
    first = start + cells * step
    bins = np.concatenate((first, first + step), -1)
    moved = bins + np.tile(shifts[:, ::-1] * factor * size, 2)
    # Map pixel i covers the image from i / scale to (i + 1) / scale.
    return tuple((each + 0.5) / scale - 0.5 for each in (bins, moved))


def _shifts(
    layer: Any,
    inputs: Any,
    rois: tf.Tensor,
    displacements: Any,
    trans_inputs: Any,
) -> np.ndarray:
    """Returns `(bins, 2)`, (dy, dx) in fractions of the region."""
    dtype = layer.compute_dtype
    if displacements is not None:
        given = tf.convert_to_tensor(displacements)
        found = layer._to_channels_last(given, _name_of(layer))
    elif isinstance(layer, DeformablePSROIPooling):
        if trans_inputs is None:
            return np.zeros((np.prod(layer.pooled_size), 2))
        maps = tf.cast(tf.convert_to_tensor(trans_inputs), dtype)
        maps = layer._to_channels_last(maps, "trans_inputs")
        found = layer._run_branch(maps, rois)
    elif layer.offset_kernel is None:
        raise ValueError(
            "Expected `displacements`, with which layer "
            f"{layer.name!r} was built. Received: None"
        )
    else:
        maps = tf.cast(tf.convert_to_tensor(inputs), dtype)
        found = layer._run_branch(layer._to_channels_last(maps, "inputs"), rois)
    found = np.asarray(found, "float64")[0, ..., :2]
    for axis, (bins, count) in enumerate(zip(layer.pooled_size, found.shape)):
        # A bin moves with the part that it lies in.
        found = np.take(found, np.arange(bins) * count // bins, axis)
    return found.reshape(-1, 2)


def _name_of(layer: Any) -> str:
    psroi = isinstance(layer, DeformablePSROIPooling)
    return "trans" if psroi else "offset"
