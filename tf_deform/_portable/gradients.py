# SPDX-License-Identifier: Apache-2.0
"""Computes gradients of native gradient ops, by differentiating twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def second_gradients(
    op: tf.Operation,
    output_gradients: Sequence[tf.Tensor | None],
    function: Callable[..., tf.Tensor],
    sources: Sequence[int],
) -> list[tf.Tensor | None]:
    """Returns gradients of a gradient op's operands, `grad_output` as the last.

    Args:
        op: The gradient op, which has an attribute `wanted`.
        output_gradients: One gradient for each of the op's outputs.
        function: Computes the output whose gradient is `grad_output` from the
            other operands, in ops that can be differentiated twice.
        sources: The operands whose gradients are the op's outputs.
    """
    # Makes each operand a tensor of its own: TensorFlow differentiates by a
    # tensor, and a caller may pass the same tensor for several operands.
    operands = [tf.identity(tensor) for tensor in op.inputs]
    *arguments, grad_output = operands
    # Gradients that are not wanted have empty outputs.
    firsts, seconds = [], []
    for source, wanted, gradient in zip(
        sources, op.get_attr("wanted"), output_gradients
    ):
        if wanted and gradient is not None:
            firsts.append(operands[source])
            seconds.append(gradient)
    if not firsts:
        return [None] * len(operands)
    skipped: Any = getattr(op, "skip_input_indices", None) or ()
    targets = [
        None if index in skipped else operand
        for index, operand in enumerate(operands)
    ]
    watched = [target for target in targets if target is not None]
    differentiate = _eagerly if tf.executing_eagerly() else _in_graph
    found = iter(
        differentiate(
            lambda: function(*arguments), grad_output, firsts, seconds, watched
        )
    )
    return [None if target is None else next(found) for target in targets]


def _eagerly(
    function: Callable[[], tf.Tensor],
    grad_output: tf.Tensor,
    firsts: list[tf.Tensor],
    seconds: list[tf.Tensor],
    targets: list[tf.Tensor],
) -> list[tf.Tensor | None]:
    with tf.GradientTape() as outer:
        outer.watch(targets)
        with tf.GradientTape() as inner:
            inner.watch(firsts)
            output = function()
        first_gradients = inner.gradient(output, firsts, grad_output)
    return outer.gradient(first_gradients, targets, seconds)


def _in_graph(
    function: Callable[[], tf.Tensor],
    grad_output: tf.Tensor,
    firsts: list[tf.Tensor],
    seconds: list[tf.Tensor],
    targets: list[tf.Tensor],
) -> list[tf.Tensor | None]:
    # A tape would record nothing where TensorFlow transposes the backward pass
    # of a function (forward mode).
    first_gradients = tf.gradients(function(), firsts, grad_output)
    return tf.gradients(first_gradients, targets, seconds)
