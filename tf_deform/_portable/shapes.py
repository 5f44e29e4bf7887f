# SPDX-License-Identifier: Apache-2.0
"""Checks attributes and shapes, with the messages of the native ops.

It finds only the mistakes that people make: C++ checks what fits in 64 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional, Union

import numpy as np
import tensorflow as tf

MAX_EXTENT = 2**31 - 1
# The smallest normal number of float32: some threads flush smaller numbers to
# 0.
LEAST_FACTOR = 2.0**-126

# A size is a number, or a tensor if it is found when the graph runs.
Size = Union[int, tf.Tensor]
# A shape has None for each size that is not known.
Shape = tuple[Optional[int], ...]


def fail(text: str) -> None:
    """Raises the error of the native op's kernel, or of its shape function."""
    if tf.executing_eagerly():
        raise tf.errors.InvalidArgumentError(None, None, text)
    raise ValueError(text)


def check_attribute(values: Sequence[int], least: int, name: str) -> None:
    for value in values:
        if not least <= value <= MAX_EXTENT:
            fail(
                f"Expected `{name}` to hold integers from {least} to "
                f"{MAX_EXTENT}. Received: {value}"
            )


def check_factor(parts: Sequence[float], zero_allowed: bool, name: str) -> None:
    # Attributes are float32, so each part is rounded to float32 here.
    value = math.fsum(float(np.float32(part)) for part in parts)
    zero = zero_allowed and value == 0
    if not (math.isfinite(value) and (value >= LEAST_FACTOR or zero)):
        fail(
            f"Expected `{name}` to be a finite number of at least 2**-126"
            f"{', or 0' if zero_allowed else ''}. Received: {value:g}"
        )


def with_shape(tensor: tf.Tensor, *expected: int | None) -> tf.Tensor:
    """Sets a shape; the graph that runs checks the sizes not known yet."""
    shape = tensor.shape
    if shape.rank is None:
        return tf.ensure_shape(tensor, expected)
    if shape.rank != len(expected):
        return tensor
    merged = [
        want if size is None else size for size, want in zip(shape, expected)
    ]
    return tensor if merged == list(shape) else tf.ensure_shape(tensor, merged)


def check_rank(tensor: tf.Tensor, name: str, axes: str) -> Shape:
    """Returns a tensor's shape with as many dimensions as `axes` names."""
    rank = len(axes.split(": ")[0].split(", "))
    shape = tuple(tensor.shape.as_list())
    if len(shape) != rank:
        fail(
            f"Expected `{name}` to have rank {rank} ({axes}). Received: "
            f"{name}.shape={shape}"
        )
    return shape


def check_dimension(
    shape: Shape,
    axis: int,
    expected: int | None,
    name: str,
    quantity: str,
    meaning: str,
) -> None:
    if None not in (shape[axis], expected) and shape[axis] != expected:
        fail(
            f"Expected `{name}` to have {quantity} {expected} ({meaning}). "
            f"Received: {name}.shape={shape}"
        )


def check_inputs(inputs: tf.Tensor, axes: str) -> Shape:
    """Returns the shape of `inputs`; height and width fit in 32 bits."""
    shape = check_rank(inputs, "inputs", axes)
    if max(size or 0 for size in shape[1:3]) > MAX_EXTENT:
        fail(
            f"Expected height and width of `inputs` to be at most {MAX_EXTENT}."
            f" Received: inputs.shape={shape}"
        )
    return shape


def check_channels(shape: Shape) -> None:
    if shape[3] == 0:
        fail(
            "Expected `inputs` to have at least 1 channel. Received: "
            f"inputs.shape={shape}"
        )


def check_rois(rois: tf.Tensor) -> Shape:
    meaning = "batch_index, x1, y1, x2, y2"
    shape = check_rank(rois, "rois", f"num_rois, 5: {meaning}")
    check_dimension(shape, 1, 5, "rois", "a last dimension of", meaning)
    return shape


def check_displacements(
    shape: Shape,
    name: str,
    num_rois: int | None,
    size: Sequence[int],
    meaning: str,
) -> None:
    for axis, expected, quantity, source in (
        (0, num_rois, "a first dimension of", "the number of ROIs"),
        (1, size[0], "height", meaning),
        (2, size[1], "width", meaning),
    ):
        check_dimension(shape, axis, expected, name, quantity, source)


def sizes(tensor: tf.Tensor, shape: Shape) -> list[Size]:
    """Returns known dimensions as numbers, others as scalar int32 tensors."""
    if None not in shape:
        return list(shape)
    dynamic = tf.shape(tensor)
    return [
        dynamic[axis] if size is None else size
        for axis, size in enumerate(shape)
    ]


def either(*candidates: Any) -> Any:
    """Returns the first candidate that is a number, or the first of all."""
    known = [size for size in candidates if isinstance(size, int)]
    return known[0] if known else candidates[0]


def at_least(value: Size, least: int) -> Size:
    if isinstance(value, int):
        return max(value, least)
    return tf.maximum(value, least)


def to_index(value: Size) -> Size:
    """Returns a size in 64 bits, to be multiplied by other sizes."""
    return value if isinstance(value, int) else tf.cast(value, tf.int64)
