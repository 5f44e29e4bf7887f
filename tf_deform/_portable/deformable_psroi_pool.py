# SPDX-License-Identifier: Apache-2.0
"""Implements deformable position-sensitive ROI pooling in stock TensorFlow."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tf_deform._portable.roi_pooling import Axis, constant, pool
from tf_deform._portable.shapes import (
    Shape,
    check_attribute,
    check_displacements,
    check_factor,
    check_inputs,
    check_rank,
    check_rois,
    either,
    fail,
    sizes,
    with_shape,
)


def _check(
    inputs: tf.Tensor,
    rois: tf.Tensor,
    trans: Sequence[tf.Tensor],
    output_dim: int,
    group_size: Sequence[int],
    part_size: Sequence[int],
) -> tuple[Shape, Shape, Shape]:
    """Checks the operands; returns the shapes of inputs, rois and trans."""
    inputs_shape = check_inputs(
        inputs, "batch, height, width, output_dim * group_h * group_w"
    )
    rois_shape = check_rois(rois)
    channels = output_dim * group_size[0] * group_size[1]
    if inputs_shape[3] not in (None, channels):
        fail(
            f"Expected `inputs` to have {channels} channels (output_dim * "
            f"group_h * group_w = {output_dim} * {group_size[0]} * "
            f"{group_size[1]}). Received: inputs.shape={inputs_shape}"
        )
    if not trans:
        return inputs_shape, rois_shape, (None,) * 4
    shape = check_rank(
        trans[0], "trans", "num_rois, part_h, part_w, num_classes * 2"
    )
    check_displacements(shape, "trans", rois_shape[0], part_size, "part_size")
    if shape[3] is not None:
        if shape[3] == 0 or shape[3] % 2:
            fail(
                "Expected the last dimension of `trans` to be 2 * num_classes, "
                f"(dy, dx) of each class. Received: trans.shape={shape}"
            )
        if output_dim % (shape[3] // 2):
            fail(
                "Expected output_dim to be a multiple of the classes of "
                "`trans` (half of its last dimension). Received: "
                f"output_dim={output_dim}, trans.shape={shape}"
            )
    return inputs_shape, rois_shape, shape


def _half_away(values: tf.Tensor) -> tf.Tensor:
    """Rounds to the nearest integers, halves away from zero."""
    whole = tf.where(values < 0, tf.math.ceil(values), tf.floor(values))
    rest = values - whole
    up = tf.cast(rest >= 0.5, values.dtype)
    return whole + up - tf.cast(rest <= -0.5, values.dtype)


def deformable_psroi_pool(
    inputs: tf.Tensor,
    rois: tf.Tensor,
    trans: Sequence[tf.Tensor],
    *,
    output_dim: int,
    spatial_scale: Sequence[float],
    pooled_size: Sequence[int],
    group_size: Sequence[int],
    part_size: Sequence[int],
    sample_per_part: int,
    trans_std: Sequence[float],
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes `tf_deform.ops.deformable_psroi_pool`, called as the op is."""
    inputs = with_shape(inputs, None, None, None, None)
    rois = with_shape(rois, None, 5)
    trans = [with_shape(tensor, None, *part_size, None) for tensor in trans]
    check_factor(spatial_scale, False, "spatial_scale")
    check_factor(trans_std, True, "trans_std")
    check_attribute([output_dim], 1, "output_dim")
    check_attribute(pooled_size, 1, "pooled_size")
    check_attribute(group_size, 1, "group_size")
    check_attribute(part_size, 1, "part_size")
    check_attribute([sample_per_part], 1, "sample_per_part")
    shapes = _check(inputs, rois, trans, output_dim, group_size, part_size)
    real = rois.dtype
    scale, std = constant(spatial_scale, real), constant(trans_std, real)
    num_rois = sizes(rois, shapes[1])[0]
    displacements = None
    if trans:
        given = sizes(trans[0], shapes[2])
        num_rois = either(num_rois, given[0])
        displacements = tf.reshape(
            trans[0],
            (num_rois, part_size[0] * part_size[1], given[3] // 2, 2),
        )

    def locate(first: tf.Tensor, last: tf.Tensor, axis: int) -> Axis:
        start = _half_away(first) * scale - 0.5
        end = (_half_away(last) + 1) * scale - 0.5
        size = tf.maximum(end - start, tf.constant(0.1, real))
        bin_size = size / pooled_size[axis]
        return Axis(
            start,
            size,
            bin_size,
            bin_size / sample_per_part,
            tf.ones_like(size) * sample_per_part,
        )

    # Computes the cells and parts of the bins in integers.
    def scaled(to: Sequence[int]) -> np.ndarray:
        row, col = np.indices(pooled_size).reshape(2, -1)
        row = row * to[0] // pooled_size[0]
        return row * to[1] + col * to[1] // pooled_size[1]

    output, count = pool(
        inputs,
        rois,
        displacements,
        image_size=sizes(inputs, shapes[0])[:3],
        num_rois=num_rois,
        channels=output_dim,
        pooled_size=pooled_size,
        cells=group_size[0] * group_size[1],
        cell_of_bin=scaled(group_size),
        part_of_bin=scaled(part_size),
        locate=locate,
        displace=lambda values, size: values * std * size,
        samples=sample_per_part,
        phase=0,
        margin=0.5,
        mean_of_all=False,
    )
    return tf.cast(output, inputs.dtype), tf.cast(count, tf.float32)
