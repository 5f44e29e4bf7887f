# SPDX-License-Identifier: Apache-2.0
"""Implements pooling of regions of interest in stock TensorFlow.

The samples of a bin form a grid, and each axis alone decides whether a sample
counts. So the sum of the bin's bilinear samples is a sum over rows and columns,

    weight(row) * weight(column) * pixel

where weight(row) is the sum of that row's bilinear weights over the samples.
Samples that lie less than a pixel apart share rows: a bin of 4x4 samples, 2
pixels wide, reads 16 pixels in this way instead of 64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_deform._portable.sampling import unrounded, weighted_sum
from tf_deform._portable.shapes import Size, to_index


class Axis(NamedTuple):
    """Describes one axis of the regions, in map pixels; all (num_rois,)."""

    start: tf.Tensor  # Of the first bin.
    size: tf.Tensor
    bin: tf.Tensor  # From one bin to the next.
    step: tf.Tensor  # From one sample to the next.
    samples: tf.Tensor  # Of a bin.


class _AxisWeights(NamedTuple):
    """Holds rows (or columns) that bins read, as (bins, reads) tensors."""

    place: tf.Tensor  # The row; -1 for none.
    weight: tf.Tensor
    count: tf.Tensor  # (bins, 1): samples that count.


def constant(parts: Sequence[float], dtype: tf.DType) -> tf.Tensor:
    """Returns the number that is the sum of these float32s."""
    total = sum(float(np.float32(part)) for part in parts)
    return tf.constant(total, dtype)


def finite(values: tf.Tensor) -> tf.Tensor:
    return tf.abs(values) <= values.dtype.max


def _place_rois(
    rois: tf.Tensor, image_size: Sequence[Size]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns regions, and a mask of the regions that lie in an image.

    A region without an image becomes the corner of the first image.
    """
    batch, *size = image_size
    image = rois[:, 0]
    exists = (image >= 0) & (image < tf.cast(batch, rois.dtype))
    exists &= image == tf.floor(image)
    for corner in range(1, 5):
        exists &= finite(rois[:, corner])
    rois = tf.where(tf.expand_dims(exists, 1), rois, tf.zeros_like(rois))
    return rois, exists & tf.cast(size[0] * size[1] > 0, tf.bool)


def _find_weights(
    place: tf.Tensor, exists: tf.Tensor, size: Size, margin: float
) -> _AxisWeights:
    """Finds the rows (or columns) that bins read, and their weights.

    Args:
        place: `(bins, samples)`: the positions of the samples.
        exists: `(bins, samples)`: the samples that exist.
        size: Number of pixels of the axis.
        margin: A sample counts up to this far outside of `[0, size - 1]`.
    """
    last = tf.cast(size - 1, place.dtype)
    counts = exists & (place >= -margin) & (place <= last + margin)
    # Outside of this range the coordinate is clamped, and has no derivative.
    moves = counts & (place >= 0) & (place < last)
    distance = tf.where(moves, place, tf.zeros_like(place))
    low = tf.floor(distance)
    distance -= low
    low = tf.where(counts & (place >= last), last, low)

    # Numbers the reads from the bin's first row to its last if that takes at
    # most two reads for each sample; otherwise numbers two reads for each
    # sample.
    first = tf.reduce_min(tf.where(counts, low, last + 1), 1, keepdims=True)
    end = tf.reduce_max(tf.where(counts, low, -1), 1, keepdims=True) + 2
    pairs = 2 * tf.range(tf.shape(place)[1])
    most = tf.cast(2 * tf.shape(place)[1], place.dtype)
    dense = end - first <= most
    slot = tf.where(dense, low - first, tf.cast(pairs, place.dtype))
    # Appends 1, as not every runtime has a maximum of no numbers.
    reads = tf.reshape(tf.where(dense, end - first, most), (-1,))
    reads = tf.reduce_max(tf.concat([reads, [1]], 0))
    read = tf.range(reads)

    # (bins, samples, reads): tells which sample reads which row.
    below = (tf.expand_dims(slot, -1) == read) & tf.expand_dims(counts, -1)
    above = (tf.expand_dims(slot, -1) + 1 == read) & tf.expand_dims(moves, -1)
    low, distance = tf.expand_dims(low, -1), tf.expand_dims(distance, -1)
    none = tf.zeros_like(distance)
    weight = tf.where(below, 1 - distance, none)
    weight += tf.where(above, distance, none)
    place = tf.where(below, low, tf.where(above, low + 1, none - 1))
    return _AxisWeights(
        tf.reduce_max(place, 1),
        tf.reduce_sum(weight, 1),
        tf.reduce_sum(tf.cast(counts, weight.dtype), 1, keepdims=True),
    )


def _repack(
    maps: tf.Tensor, image_size: Sequence[Size], channels: Size, cells: Size
) -> tf.Tensor:
    """Reorders channels from (channel, cell) to (cell, channel)."""
    if isinstance(cells, int) and cells == 1:
        return maps
    batch, height, width = image_size
    maps = tf.reshape(maps, (batch * height * width, channels, cells))
    return tf.transpose(maps, (0, 2, 1))


def pool(
    inputs: tf.Tensor,
    rois: tf.Tensor,
    displacements: tf.Tensor | None,
    *,
    image_size: Sequence[Size],
    num_rois: Size,
    channels: Size,
    pooled_size: Sequence[int],
    cells: Size,
    cell_of_bin: np.ndarray,
    part_of_bin: np.ndarray,
    locate: Callable[[tf.Tensor, tf.Tensor, int], Axis],
    displace: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    samples: int | None,
    phase: float,
    margin: float,
    mean_of_all: bool,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns means over the samples of bins, and counts of the samples.

    Args:
        inputs: `(batch, height, width, channels * cells)`, the cell last.
        rois: `(num_rois, 5)`, of the coordinate type.
        displacements: `(num_rois, parts, classes, 2)`, or None.
        image_size: Batch, height, width.
        num_rois: Number of ROIs.
        channels: Number of the output's channels.
        pooled_size: Number of a ROI's bins along each axis.
        cells: Number of cells of position-sensitive maps.
        cell_of_bin: The cell that each bin reads.
        part_of_bin: The part whose displacements each bin has.
        locate: Returns the `Axis` of ROIs with these beginnings and ends, along
            axis 0 (y) or 1 (x).
        displace: Converts displacements, with the sizes of ROIs, to map pixels.
        samples: Samples of a bin along each axis; None: each ROI has its own
            number.
        phase: Position of a bin's first sample, in steps.
        margin: A sample counts up to this far outside of the map.
        mean_of_all: Whether samples outside count, as zeros.

    Returns:
        Means and counts, both `(num_rois, pooled_h, pooled_w, channels)`, of
        the coordinate type.
    """
    real = rois.dtype
    batch, *size = image_size
    bins = pooled_size[0] * pooled_size[1]
    classes = 1
    if displacements is not None:
        displacements = unrounded(displacements)
        classes = displacements.shape[2] or tf.shape(displacements)[2]
        if not np.array_equal(part_of_bin, np.arange(displacements.shape[1])):
            displacements = tf.gather(displacements, part_of_bin, axis=1)
    total = num_rois * bins * classes

    rois, exists = _place_rois(unrounded(tf.stop_gradient(rois)), image_size)

    shape = (num_rois, 1, 1, 1)
    axes, counts = [], []
    for axis in (0, 1):
        where = locate(rois[:, 2 - axis], rois[:, 4 - axis], axis)
        # No sample would lie inside a ROI that is too large for its type.
        fits = finite(where.size)
        where = Axis(*(tf.where(fits, x, tf.zeros_like(x)) for x in where))
        index = np.indices(pooled_size)[axis].reshape(1, bins, 1)
        start, roi_size, bin_size, step, number = (
            tf.reshape(x, shape[:3]) for x in where
        )
        place = tf.constant(index, real) * bin_size + start
        if displacements is not None:
            place += displace(displacements[..., axis], roi_size)
        most = samples
        if most is None:  # Appends 1, as there may be no ROI.
            most = tf.reduce_max(tf.concat([where.samples, [1]], 0))
            most = tf.cast(most, tf.int32)
        sample = tf.cast(tf.range(most), real)
        place = tf.expand_dims(place, -1)
        place += (sample + phase) * tf.expand_dims(step, -1)
        there = tf.reshape(exists & fits, shape)
        there &= sample < tf.expand_dims(number, -1)
        # Broadcasts to every bin, displaced or not.
        there |= tf.zeros((1, bins, classes, 1), tf.bool)
        there = tf.reshape(there, (total, most))
        place = tf.reshape(place, (total, most))
        axes.append(_find_weights(place, there, size[axis], margin))
        counts.append(
            tf.reshape(
                tf.broadcast_to(number, (num_rois, bins, classes)), (total, 1)
            )
            if mean_of_all
            else axes[axis].count
        )
    count = counts[0] * counts[1]
    share = tf.where(count > 0, 1 / tf.maximum(count, 1), tf.zeros_like(count))

    # Orders rows by image, row, column, cell, class; adds a row of zeros.
    height, width = (to_index(x) for x in size)
    depth = channels // classes
    maps = _repack(tf.cast(inputs, real), image_size, channels, cells)
    maps = tf.reshape(maps, (-1, depth))
    maps = tf.pad(maps, ((0, 1), (0, 0)))
    pixel = to_index(cells * classes)
    zeros = to_index(batch) * height * width * pixel
    image = tf.reshape(tf.cast(rois[:, 0], tf.int64), shape[:3])
    origin = image * (height * width * pixel)
    origin += tf.constant(cell_of_bin.reshape(1, bins, 1), tf.int64) * to_index(
        classes
    )
    origin += tf.range(to_index(classes), dtype=tf.int64)
    y, x = axes
    row = tf.expand_dims(tf.cast(y.place, tf.int64), 2)
    col = tf.expand_dims(tf.cast(x.place, tf.int64), 1)
    index = tf.reshape(origin, (total, 1, 1)) + (row * width + col) * pixel
    read = (row >= 0) & (col >= 0)
    index = tf.where(read, index, tf.cast(zeros, tf.int64))
    weights = tf.expand_dims(y.weight * share, 2) * tf.expand_dims(x.weight, 1)
    reads = tf.shape(y.weight)[1] * tf.shape(x.weight)[1]
    output = weighted_sum(
        maps,
        tf.reshape(index, (total, reads)),
        tf.reshape(weights, (total, reads)),
    )
    shape = (num_rois, *pooled_size, channels)
    count = tf.reshape(tf.tile(count, (1, depth)), shape)
    return tf.reshape(output, shape), count
