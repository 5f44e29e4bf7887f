# SPDX-License-Identifier: Apache-2.0
"""What all ops have in common: reading rows, and adding them up."""

import tensorflow as tf

from tf_deform._implementation import is_for_other_runtime


def unrounded(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor, with what is computed from it kept in its type.

    TensorFlow's automatic mixed precision rewrites a graph so that additions,
    products and much else after a convolution are computed in 16 bits, which
    is too little for positions. It ends at an op that it does not know, which
    this is: one that can be differentiated, vectorized and compiled like any
    other. Other runtimes would only have more to do.
    """
    if (
        tensor.dtype != tf.float32
        or tf.executing_eagerly()
        or is_for_other_runtime()
    ):
        return tensor
    return tf.math.divide_no_nan(tensor, tf.ones((), tensor.dtype))


def weighted_sum(
    rows: tf.Tensor, index: tf.Tensor, weights: tf.Tensor
) -> tf.Tensor:
    """For each sample, the sum of the rows that it reads.

    Args:
        rows: `(number of rows, channels)`.
        index: `(samples, reads)`, int64: which rows.
        weights: `(samples, reads)`, of the type of `rows`.

    Returns:
        `(samples, channels)`.
    """
    # Unlike that of `tf.gather`, the gradient is a dense tensor at once: sums
    # over several calls then need no list of all that each of them read.
    read = tf.gather_nd(rows, tf.expand_dims(index, -1))
    # A product of matrices, as the product of two tensors would be as large as
    # `read` once more.
    return tf.squeeze(tf.matmul(tf.expand_dims(weights, 1), read), 1)
