# SPDX-License-Identifier: Apache-2.0
"""What every op does with its arguments before it calls its kernel."""

import operator
from typing import Any

import numpy as np
import tensorflow as tf

FLOAT_TYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)

Pair = tuple[int, int]


def integer(value: Any, name: str) -> int:
    """`value` as an int that fits in 64 bits; bool is not one."""
    try:
        if isinstance(value, bool):
            raise TypeError
        result = operator.index(value)
    except TypeError:
        raise TypeError(
            f"Expected `{name}` to be made of integers. Received: {value!r} "
            f"of type {type(value).__name__}"
        ) from None
    if not -(2**63) <= result < 2**63:
        raise ValueError(
            f"Expected `{name}` to fit in 64 bits. Received: {result}"
        )
    return result


def pair(value: Any, name: str) -> Pair:
    """One integer for both axes, or (height, width)."""
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise ValueError(
                f"Expected `{name}` to be an integer or a pair (height, "
                f"width). Received: {value!r}"
            )
        return (integer(value[0], name), integer(value[1], name))
    return (integer(value, name),) * 2


def number(value: Any, name: str) -> list[float]:
    """A number as float32s that sum up to it: attributes have no doubles."""
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        value = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"Expected `{name}` to be a number. Received: {value!r} of type "
            f"{type(value).__name__}"
        ) from None
    except OverflowError:
        raise ValueError(
            f"Expected `{name}` to fit in 64 bits. Received: an integer of "
            f"{value.bit_length()} bits"
        ) from None
    with np.errstate(over="ignore"):
        high = float(np.float32(value))
    return [high, value - high] if np.isfinite(high) else [high]


def coordinate_type(dtype: tf.DType) -> tf.DType:
    """Type of offsets, masks and ROIs that go with inputs of `dtype`."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def to_tensor(
    value: Any, name: str, dtype: tf.DType | None = None
) -> tf.Tensor:
    """Python's numbers become `dtype`; what has a type keeps it."""
    hint = None if hasattr(value, "dtype") else dtype
    try:
        return tf.convert_to_tensor(value, dtype_hint=hint)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Expected `{name}` to be a dense tensor or what converts to one. "
            f"Received: a value of type {type(value).__name__} ({error})"
        ) from error


def to_coordinates(value: Any, dtype: tf.DType, name: str) -> tf.Tensor:
    tensor = to_tensor(value, name, dtype)
    if not tensor.dtype.is_floating:
        raise TypeError(
            f"Expected `{name}` to be of a floating-point type. Received: "
            f"{name}.dtype={tensor.dtype.name}"
        )
    return tf.cast(tensor, dtype)


def to_inputs(value: Any) -> tf.Tensor:
    """The op's first operand, which decides the types of the others."""
    inputs = to_tensor(value, "inputs")
    if inputs.dtype not in FLOAT_TYPES:
        raise TypeError(
            "Expected `inputs` to be float16, bfloat16, float32 or float64. "
            f"Received: inputs.dtype={inputs.dtype.name}"
        )
    return inputs


def to_rois(value: Any, dtype: tf.DType) -> tf.Tensor:
    tensor = to_tensor(value, "rois", dtype)
    if not (tensor.dtype.is_floating or tensor.dtype.is_integer):
        raise TypeError(
            "Expected `rois` to be of a floating-point or integer type. "
            f"Received: rois.dtype={tensor.dtype.name}"
        )
    return tf.cast(tensor, dtype)


def wanted_gradients(op: tf.Operation) -> list[bool]:
    """Which operands' gradients a tape asks for.

    A tape says so before (`skip_input_indices`). In a graph all are asked
    for, and the kernel computes those that are still used once unused nodes
    and outputs have been pruned.
    """
    skipped = getattr(op, "skip_input_indices", None) or ()
    return [index not in skipped for index in range(len(op.inputs))]


def infer_shape(function: Any, *shapes: Any, **arguments: Any) -> tuple:
    """The shape of `function`'s result, as its op's shape function judges it.

    Args:
        function: A function of tensors that returns one.
        *shapes: Shape of each tensor; None for an unknown dimension, or for a
            tensor that is None.
        **arguments: The other arguments of `function`.

    Raises:
        ValueError: Shapes that do not fit.
    """
    with tf.Graph().as_default():
        result = function(
            *(
                None
                if shape is None
                else tf.compat.v1.placeholder(tf.float32, shape)
                for shape in shapes
            ),
            **arguments,
        )
    return tuple(result.shape.as_list())
