# SPDX-License-Identifier: Apache-2.0
"""The gradients of the native gradient ops, by differentiating twice."""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def second_gradients(
    op: tf.Operation,
    output_gradients: Sequence[tf.Tensor | None],
    function: Callable[..., tf.Tensor],
    sources: Sequence[int],
) -> list[tf.Tensor | None]:
    """Gradients of a gradient op's operands, the last of them `grad_output`.

    Args:
        op: The gradient op, which has an attribute `wanted`.
        output_gradients: One for each of its outputs.
        function: From the other operands to the output that `grad_output` is
            the gradient of, in ops that can be differentiated twice.
        sources: Of which operands the op's outputs are the gradients.
    """
    # Each operand is a tensor of its own: a derivative is one by a tensor, and
    # somebody's single tensor may stand in several places.
    operands = [tf.identity(tensor) for tensor in op.inputs]
    *arguments, grad_output = operands
    # The outputs of gradients that are not wanted hold nothing.
    firsts, seconds = [], []
    for source, wanted, gradient in zip(
        sources, op.get_attr("wanted"), output_gradients, strict=True
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
