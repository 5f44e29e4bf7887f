# SPDX-License-Identifier: Apache-2.0
"""Registers gradients and statistics of ops with TensorFlow."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.framework import ops  # Statistics have no public name.

# Floating-point operations of a bilinear sample of one channel: a
# multiplication and an addition for each of four pixels.
SAMPLE = 8


def _once(register: Callable[[Any], Any]) -> Callable[[Callable], Callable]:
    def decorate(function: Callable) -> Callable:
        # TensorFlow refuses a second registration. A module that is reloaded
        # keeps the first registration, which is the same.
        with contextlib.suppress(KeyError):
            register(function)
        return function

    return decorate


def gradient(op: str) -> Callable[[Callable], Callable]:
    """Registers the function as the gradient of the op `op`."""
    return _once(tf.RegisterGradient(op))


def flops(op: str, count: Callable[[tf.Operation], int]) -> None:
    """Registers the number of floating-point operations of the op `op`.

    TensorFlow's profiler sums up these numbers. It leaves out ops of unknown
    shapes.
    """

    def statistics(graph: tf.Graph, node: Any) -> ops.OpStats:
        operation = graph.get_operation_by_name(node.name)
        return ops.OpStats("flops", count(operation))

    _once(ops.RegisterStatistics(op, "flops"))(statistics)


def size(tensor: tf.Tensor) -> int:
    """Returns the number of elements; ValueError if it is not known."""
    if not tensor.shape.is_fully_defined():
        raise ValueError(
            f"Expected a known shape. Received: {tensor.name}.shape="
            f"{tensor.shape}"
        )
    return math.prod(tensor.shape)
