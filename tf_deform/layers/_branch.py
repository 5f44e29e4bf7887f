# SPDX-License-Identifier: Apache-2.0
"""What the layers' own branches have in common."""

from collections.abc import Sequence

import tensorflow as tf


def hand_on_nan(
    outputs: tf.Tensor, fields: tf.Tensor, axis: int | Sequence[int] = -1
) -> tf.Tensor:
    """Makes outputs NaN where what a branch predicted for them is NaN.

    To an op, a displacement that is NaN lies outside of the image, as infinity
    does: a branch that has become NaN would go unseen.

    Args:
        outputs: `(batch, height, width, channels)`: what an op made of
            `fields`.
        fields: What the branch predicted, of the same rank, before anything
            that could hide a NaN.
        axis: Axes of `fields` that speak for the same outputs; the others
            have to be those of `outputs`, or 1.

    Returns:
        `outputs`, or NaN.
    """
    fields = tf.stop_gradient(fields)
    # Its NaN is what is added, and nothing else: a constant NaN would be found
    # by who looks for NaN in a graph, and infinity times zero would be one.
    nan = tf.where(tf.math.is_nan(fields), fields, tf.zeros_like(fields))
    nan = tf.reduce_sum(nan, axis, keepdims=True)
    return outputs + tf.cast(nan, outputs.dtype)
