# SPDX-License-Identifier: Apache-2.0
"""Checks and converts arguments of ops before their kernels are called."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform._portable.shapes import MAX_EXTENT

FLOAT_TYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)

Pair = tuple[int, int]


def received(value: Any) -> str:
    """Returns a value's text for the end of an error; cuts long arrays."""
    text = repr(value)
    if len(text) > 200:
        text = f"{text[:200]}..."
    return f"Received: {text} of type {type(value).__name__}"


def plain(value: Any) -> Any:
    """Converts numbers and lists of NumPy and eager TensorFlow to Python's.

    Objects and times stay arrays, as they are no numbers.
    """
    if isinstance(value, (tf.Tensor, tf.Variable)) and hasattr(value, "numpy"):
        try:
            value = value.numpy()
        except NotImplementedError:  # It is a variable inside of a graph.
            return value
    if isinstance(value, (np.ndarray, np.generic)):
        return value if value.dtype.kind in "OmM" else value.tolist()
    return value


def integer(value: Any, name: str) -> int:
    """Returns `value` as an int that fits in 64 bits; refuses bool."""
    bare = plain(value)
    try:
        if isinstance(bare, (bool, np.generic)):
            raise TypeError
        result = operator.index(bare)
    except (TypeError, ValueError):
        raise TypeError(
            f"Expected `{name}` to be made of integers. {received(value)}"
        ) from None
    if not -(2**63) <= result < 2**63:
        raise ValueError(
            f"Expected `{name}` to fit in 64 bits. Received: {result}"
        )
    return result


def bounded(value: Any, name: str, least: int) -> int:
    """Returns an integer in the range that ops check when they are called."""
    value = integer(value, name)
    if not least <= value <= MAX_EXTENT:
        raise ValueError(
            f"Expected `{name}` to hold integers from {least} to {MAX_EXTENT}. "
            f"Received: {value}"
        )
    return value


def positive(value: Any, name: str) -> int:
    return bounded(value, name, 1)


def pair(value: Any, name: str) -> Pair:
    """Returns (height, width); one integer stands for both axes."""
    bare = plain(value)
    if isinstance(bare, (list, tuple)):
        if len(bare) != 2:
            raise ValueError(
                f"Expected `{name}` to be an integer or a pair (height, "
                f"width). {received(value)}"
            )
        return (integer(bare[0], name), integer(bare[1], name))
    return (integer(value, name),) * 2


def positive_pair(value: Any, name: str) -> Pair:
    height, width = pair(value, name)
    return positive(height, name), positive(width, name)


def real(value: Any, name: str) -> float:
    """Returns `value` as a float; refuses bool and text."""
    bare = plain(value)
    try:
        # `float` also reads text and bytes, which have no `__float__`.
        if isinstance(bare, (bool, np.ndarray, np.timedelta64)) or not (
            hasattr(bare, "__float__") or hasattr(bare, "__index__")
        ):
            raise TypeError
        return float(bare)
    except (TypeError, ValueError):
        raise TypeError(
            f"Expected `{name}` to be a number. {received(value)}"
        ) from None
    except OverflowError:
        raise ValueError(
            f"Expected `{name}` to fit in 64 bits. Received: an integer of "
            f"{bare.bit_length()} bits"
        ) from None


def number(value: Any, name: str) -> list[float]:
    """Returns float32s that sum up to a number: attributes have no doubles."""
    value = real(value, name)
    with np.errstate(over="ignore"):
        high = float(np.float32(value))
    return [high, value - high] if np.isfinite(high) else [high]


def boolean(value: Any, name: str) -> bool:
    """Returns a bool; also takes 1 and 0, which Keras writes in files."""
    bare = plain(value)
    if not isinstance(bare, int) or bare not in (0, 1):
        raise TypeError(
            f"Expected `{name}` to be True or False. {received(value)}"
        )
    return bool(bare)


def option(value: Any, name: str, options: Sequence[str | None]) -> Any:
    """Returns `value` if it is text or None, and one of `options`."""
    if (value is None or isinstance(value, str)) and value in options:
        return options[options.index(value)]
    *others, last = (
        "None" if each is None else f'"{each}"' for each in options
    )
    raise ValueError(
        f"Expected `{name}` to be {', '.join(others)} or {last}. "
        f"{received(value)}"
    )


def coordinate_type(dtype: tf.DType) -> tf.DType:
    """Returns the type of offsets, masks and ROIs for inputs of `dtype`."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def to_tensor(
    value: Any, name: str, dtype: tf.DType | None = None
) -> tf.Tensor:
    """Converts Python's numbers to `dtype`; a value with a type keeps it."""
    hint = None if hasattr(value, "dtype") else dtype
    try:
        return tf.convert_to_tensor(value, dtype_hint=hint)
    # The conversion of a foreign type may raise any error.
    except Exception as error:
        raise TypeError(
            f"Expected `{name}` to be a dense tensor or what converts to one. "
            f"{received(value)} ({str(error)[:200]})"
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
    """Returns the op's first operand, which decides the types of the others."""
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
    """Tells which operands' gradients a tape asks for.

    A tape says so before (`skip_input_indices`). A graph asks for all
    gradients; after unused nodes and outputs are pruned, the kernel computes
    the gradients that are still used.
    """
    skipped = getattr(op, "skip_input_indices", None) or ()
    return [index not in skipped for index in range(len(op.inputs))]


def infer_shape(function: Any, *shapes: Any, **arguments: Any) -> tuple:
    """Returns the result's shape according to the op's shape function.

    Args:
        function: A function of tensors that returns one tensor.
        *shapes: Shape of each tensor; None for an unknown dimension, or for a
            tensor that is None.
        **arguments: The other arguments of `function`.

    Raises:
        ValueError: The shapes do not fit.
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
