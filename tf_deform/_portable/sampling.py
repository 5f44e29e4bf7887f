# SPDX-License-Identifier: Apache-2.0
"""Reads rows of images and adds them up, for all portable ops."""

import tensorflow as tf

from tf_deform._implementation import is_for_other_runtime


def unrounded(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the tensor so that results computed from it keep its type.

    TensorFlow's automatic mixed precision rewrites a graph so that additions,
    products and most other ops after a convolution are computed in 16 bits,
    which are too few for positions. The rewriting ends at an op that it does
    not know. This function adds such an op, which can be differentiated,
    vectorized and compiled like any other. It adds none for other runtimes,
    where the op would only cost time.
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
    """Returns, for each sample, the sum of the rows that it reads.

    Args:
        rows: `(number of rows, channels)`.
        index: `(samples, reads)`, int64: the rows to read.
        weights: `(samples, reads)`, of the type of `rows`.

    Returns:
        `(samples, channels)`.
    """
    # Unlike the gradient of `tf.gather`, the gradient of `tf.gather_nd` is a
    # dense tensor at once, so sums over several calls need no list of all their
    # reads.
    read = tf.gather_nd(rows, tf.expand_dims(index, -1))
    # Multiplies matrices, as the product of two tensors would take as much
    # memory as `read` once more.
    return tf.squeeze(tf.matmul(tf.expand_dims(weights, 1), read), 1)
