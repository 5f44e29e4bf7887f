# SPDX-License-Identifier: Apache-2.0
"""Reads the fields that a layer's branch predicts: displacements, factors."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from tf_deform._portable.shapes import Size

# What numbers of the branch, behind its displacements, become factors.
FACTORS = ("sigmoid", "2sigmoid")


def split_fields(
    fields: tf.Tensor, displacements: Size, modulation: str
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Splits the fields of a convolution.

    Args:
        fields: `(batch, out_h, out_w, channels)`.
        displacements: The number of channels that are displacements.
        modulation: "none", "sigmoid" or "2sigmoid".

    Returns:
        An offset, and a mask in a list, which is empty for "none".
    """
    if modulation not in FACTORS:
        return fields, []
    mask = tf.sigmoid(fields[..., displacements:])
    if modulation == "2sigmoid":
        mask *= 2
    return fields[..., :displacements], [mask]


def hand_on_nan(
    outputs: tf.Tensor, fields: tf.Tensor, axis: int | Sequence[int] = -1
) -> tf.Tensor:
    """Makes outputs NaN where a branch predicted NaN for them.

    To an op, a displacement that is NaN lies outside of the image, as infinity
    does. Without this function, NaN of a branch would not show in the outputs.

    Args:
        outputs: `(batch, height, width, channels)`, computed by an op from
            `fields`.
        fields: The branch's predictions, of the same rank, before any operation
            that could hide a NaN.
        axis: Axes of `fields` over which one NaN counts for all; the other axes
            have to have the size of the axis of `outputs`, or 1.

    Returns:
        `outputs`, with NaN added.
    """
    # Counts NaN, and adds the root of minus the count, which is NaN or -0.
    # Other ways fail: a constant NaN would alarm users who search a graph for
    # NaN, zero times a field would be NaN for infinity as well, and LiteRT does
    # not load the 8-bit operation that a choice between fields and zero
    # becomes.
    count = tf.reduce_sum(
        tf.cast(tf.math.is_nan(fields), fields.dtype), axis, keepdims=True
    )
    return outputs + tf.cast(tf.sqrt(-count), outputs.dtype)
