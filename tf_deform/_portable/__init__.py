# SPDX-License-Identifier: Apache-2.0
"""The ops in stock TensorFlow, one function for each, called as the native one.

They are slower and take more memory, but run wherever TensorFlow (or what a
model is exported to) runs, and can be differentiated any number of times by
TensorFlow itself. So that every derivative is the one that the native op
promises, nothing here relies on the derivative of a clip or a rounding:
positions are split with `tf.floor`, which has no gradient, and what does not
count is replaced with `tf.where` before it enters any arithmetic.

Only ops that also exist elsewhere (ONNX, LiteRT) are used, no loops, and
nothing but sizes of kernels and attributes has to be known in a graph.
"""
