# SPDX-License-Identifier: Apache-2.0
"""Implements the ops in stock TensorFlow, with the native ops' arguments.

The functions are slower and take more memory than the native ops, but run
wherever TensorFlow (or the runtime that a model is exported to) runs, and
TensorFlow itself can differentiate them any number of times. Every derivative
has to be the one that the native op promises, so nothing here relies on the
derivative of a clip or a rounding: `tf.floor`, which has no gradient, splits
positions, and `tf.where` replaces values that do not count before they enter
any arithmetic.

The functions use no loops and only ops that also exist elsewhere (ONNX,
LiteRT). In a graph, only attributes and the sizes of kernels have to be known.
"""
