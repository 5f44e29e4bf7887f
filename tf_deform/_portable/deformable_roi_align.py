# SPDX-License-Identifier: Apache-2.0
"""Implements deformable ROIAlign in stock TensorFlow."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_deform._portable.roi_pooling import Axis, constant, pool
from tf_deform._portable.shapes import (
    MAX_EXTENT,
    check_attribute,
    check_channels,
    check_dimension,
    check_displacements,
    check_factor,
    check_inputs,
    check_rank,
    check_rois,
    either,
    sizes,
    with_shape,
)


def deformable_roi_align(
    inputs: tf.Tensor,
    rois: tf.Tensor,
    offset: Sequence[tf.Tensor],
    *,
    pooled_size: Sequence[int],
    spatial_scale: Sequence[float],
    sampling_ratio: int,
    gamma: Sequence[float],
) -> tf.Tensor:
    """Computes `tf_deform.ops.deformable_roi_align`, called as the op is.

    If the number of samples depends on the ROI, all bins read as many pixels as
    the bin that needs most.
    """
    inputs = with_shape(inputs, None, None, None, None)
    rois = with_shape(rois, None, 5)
    offset = [with_shape(tensor, None, *pooled_size, 2) for tensor in offset]
    check_factor(spatial_scale, False, "spatial_scale")
    check_factor(gamma, True, "gamma")
    check_attribute(pooled_size, 1, "pooled_size")
    check_attribute([sampling_ratio], -MAX_EXTENT, "sampling_ratio")
    inputs_shape = check_inputs(inputs, "batch, height, width, channels")
    rois_shape = check_rois(rois)
    check_channels(inputs_shape)
    real = rois.dtype
    scale, factor = constant(spatial_scale, real), constant(gamma, real)
    batch, height, width, channels = sizes(inputs, inputs_shape)
    num_rois = sizes(rois, rois_shape)[0]
    displacements = None
    bins = pooled_size[0] * pooled_size[1]
    if offset:
        shape = check_rank(
            offset[0], "offset", "num_rois, pooled_h, pooled_w, 2"
        )
        check_displacements(
            shape, "offset", rois_shape[0], pooled_size, "pooled_size"
        )
        check_dimension(
            shape, 3, 2, "offset", "a last dimension of", "(dy, dx)"
        )
        num_rois = either(num_rois, sizes(offset[0], shape)[0])
        displacements = tf.reshape(offset[0], (num_rois, bins, 1, 2))

    def locate(first: tf.Tensor, last: tf.Tensor, axis: int) -> Axis:
        size = (last - first) * scale
        bin_size = size / pooled_size[axis]
        if sampling_ratio > 0:
            number = tf.ones_like(size) * sampling_ratio
        else:
            pixels = (height, width)[axis]
            most = (2 * pixels + pooled_size[axis] - 1) // pooled_size[axis]
            number = tf.math.ceil(tf.maximum(bin_size, 0))
            number = tf.minimum(number, tf.cast(most, real))
        return Axis(
            first * scale - 0.5,
            size,
            bin_size,
            bin_size / tf.maximum(number, 1),
            number,
        )

    output, _ = pool(
        inputs,
        rois,
        displacements,
        image_size=(batch, height, width),
        num_rois=num_rois,
        channels=channels,
        pooled_size=pooled_size,
        cells=1,
        cell_of_bin=np.zeros(bins, np.int64),
        part_of_bin=np.arange(bins),
        locate=locate,
        displace=lambda values, size: factor * size * values,
        samples=sampling_ratio if sampling_ratio > 0 else None,
        phase=0.5,
        margin=1.0,
        mean_of_all=True,
    )
    return tf.cast(output, inputs.dtype)
