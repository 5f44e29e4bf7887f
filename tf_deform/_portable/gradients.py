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
    *operands, grad_output = op.inputs
    # The outputs of gradients that are not wanted hold nothing.
    firsts, seconds = [], []
    for source, wanted, gradient in zip(
        sources, op.get_attr("wanted"), output_gradients, strict=True
    ):
        if wanted and gradient is not None:
            firsts.append(operands[source])
            seconds.append(gradient)
    skipped: Any = getattr(op, "skip_input_indices", None) or ()
    targets = [index for index in range(len(op.inputs)) if index not in skipped]
    with tf.GradientTape() as outer:
        outer.watch([op.inputs[index] for index in targets])
        with tf.GradientTape() as inner:
            inner.watch(firsts)
            output = function(*operands)
        first_gradients = inner.gradient(output, firsts, grad_output)
    found = outer.gradient(
        first_gradients, [op.inputs[index] for index in targets], seconds
    )
    results = [None] * len(op.inputs)
    for index, gradient in zip(targets, found, strict=True):
        results[index] = gradient
    return results
