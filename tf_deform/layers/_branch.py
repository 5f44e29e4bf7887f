# SPDX-License-Identifier: Apache-2.0
"""Convolves, for the branch of the convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from tf_deform._implementation import is_for_other_runtime
from tf_deform._portable.shapes import Size, at_least, sizes
from tf_deform.ops._arguments import Pair


def convolve(
    inputs: tf.Tensor,
    kernel: tf.Tensor,
    *,
    strides: Pair,
    padding: str | Sequence[Pair],
    dilations: Pair,
) -> tf.Tensor:
    """Convolves as `tf.nn.conv2d`, but with gradients everywhere.

    `tf.nn.conv2d` has three gaps that this function fills. It has no gradient
    on a CPU when it is dilated, so pixels are split into smaller images, which
    are convolved without dilation. It has no gradient when it is vectorized
    with explicit padding, so zeros are added before, which also takes less
    time. With oneDNN its result has a wrong shape where there is no image or no
    pixel, so it gets a black image then. In a graph for another runtime, where
    nothing is trained, the convolution is left as it is.

    Args:
        inputs: `(batch, height, width, channels)`.
        kernel: `(kernel_h, kernel_w, channels, filters)`.
        strides: (height, width), in pixels.
        padding: "same", or ((top, bottom), (left, right)), in pixels; negative
            numbers cut pixels off.
        dilations: (height, width), in pixels.

    Returns:
        `(batch, out_h, out_w, filters)`, where a size that would be negative
        is 0.
    """
    batch, *size, channels = sizes(inputs, tuple(inputs.shape.as_list()))
    if padding != "same":
        added = [[max(pixels, 0) for pixels in side] for side in padding]
        rows, columns = (
            slice(max(-before, 0), -max(-after, 0) or None)
            for before, after in padding
        )
        if min(map(min, padding)) < 0:
            inputs = inputs[:, rows, columns]
    if is_for_other_runtime():
        given = "SAME" if padding == "same" else [[0, 0], *added, [0, 0]]
        known = None not in inputs.shape[1:3]
        if padding == "same" and max(dilations) > 1 and not known:
            # Pads here where sizes are unknown: Keras' export leaves "same" to
            # ONNX Runtime, which refuses it with dilations.
            reaches = [
                rate * (taps - 1)
                for rate, taps in zip(dilations, kernel.shape[:2])
            ]
            if max(strides) == 1:
                sides = [[n // 2, n - n // 2] for n in reaches]
                given = [[0, 0], *sides, [0, 0]]
            else:
                inputs, given = _pad_same(inputs, reaches, strides), "VALID"
        return tf.nn.conv2d(inputs, kernel, strides, given, dilations=dilations)

    dilations = [
        1 if taps == 1 else rate
        for taps, rate in zip(kernel.shape[:2], dilations)
    ]
    as_it_is = padding == "same" and max(dilations) == 1
    paddings, wanted = [(0, _if_none(batch, 1))], [batch]
    padded, steps, parts, inner_strides, outer_strides = [-1], [], [], [], []
    for axis, (pixels, taps, stride, rate) in enumerate(
        zip(size, kernel.shape, strides, dilations)
    ):
        reach = rate * (taps - 1)
        if padding == "same":
            out = (pixels + stride - 1) // stride
            spare = at_least((out - 1) * stride + reach + 1 - pixels, 0)
            before, after, cut = spare // 2, spare - spare // 2, 0
        else:
            before, after = added[axis]
            cut = before + after - sum(padding[axis])
            out = (pixels + before + after - cut - reach - 1) // stride + 1
        if as_it_is:
            before = after = 0
        after += _if_none(out, reach + 1)
        # Leaves out pixels between the pixels that any tap reads. If dilation
        # remains, the pixels are split into parts that are convolved
        # everywhere; with strides, some of their results are not needed.
        step = math.gcd(stride, rate)
        part = rate // step
        rest = at_least(pixels - cut, 0) + before + after
        more = -((rest + step - 1) // step) % part * step
        padded.append(rest + more)
        paddings.append((before, after + more))
        wanted.append(at_least(out, 0))
        steps.append(step)
        parts.append(part)
        inner_strides.append(1 if part > 1 else stride // step)
        outer_strides.append(stride // step if part > 1 else 1)

    outputs = inputs
    if any(not isinstance(n, int) or n for side in paddings for n in side):
        outputs = tf.pad(outputs, (*paddings, (0, 0)))
        if None in outputs.shape.as_list():
            # Converters need to know at least the number of channels.
            outputs = tf.reshape(outputs, padded + [channels])
    if max(steps) > 1:
        outputs = outputs[:, :: steps[0], :: steps[1]]
    if max(parts) > 1:
        outputs = tf.space_to_batch(outputs, parts, ((0, 0), (0, 0)))
    outputs = tf.nn.conv2d(
        outputs, kernel, inner_strides, "SAME" if as_it_is else "VALID"
    )
    if max(parts) > 1:
        outputs = tf.batch_to_space(outputs, parts, ((0, 0), (0, 0)))
    if max(outer_strides) > 1:
        outputs = outputs[:, :: outer_strides[0], :: outer_strides[1]]
    wanted.append(kernel.shape[-1])
    if outputs.shape.as_list() != wanted:
        outputs = tf.slice(outputs, (0, 0, 0, 0), wanted)
    return outputs


def _pad_same(
    inputs: tf.Tensor, reaches: Sequence[int], strides: Pair
) -> tf.Tensor:
    """Pads as "same", for kernels that span `reaches` + 1 pixels."""
    _, *size, channels = sizes(inputs, tuple(inputs.shape.as_list()))
    paddings, padded = [(0, 0)], [-1]
    for pixels, reach, stride in zip(size, reaches, strides):
        out = (pixels + stride - 1) // stride
        spare = at_least((out - 1) * stride + reach + 1 - pixels, 0)
        paddings.append((spare // 2, spare - spare // 2))
        padded.append(pixels + spare)
    # Converters need to know at least the number of channels.
    return tf.reshape(tf.pad(inputs, (*paddings, (0, 0))), (*padded, channels))


def _if_none(size: Size, value: int) -> Size:
    """Returns `value` where `size` is not positive, and otherwise 0."""
    if isinstance(size, int):
        return 0 if size > 0 else value
    return tf.where(size > 0, 0, value)
