# SPDX-License-Identifier: Apache-2.0
"""What every op does with its arguments before it calls its kernel."""

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform._portable.shapes import MAX_EXTENT

FLOAT_TYPES = (tf.float16, tf.bfloat16, tf.float32, tf.float64)

Pair = tuple[int, int]


def received(value: Any) -> str:
    """What came, for the end of an error's text; arrays may be long."""
    text = repr(value)
    if len(text) > 200:
        text = f"{text[:200]}..."
    return f"Received: {text} of type {type(value).__name__}"


def plain(value: Any) -> Any:
    """NumPy's and eager TensorFlow's numbers and lists as Python's.

    Objects and times stay arrays, which are no numbers.
    """
    if isinstance(value, tf.Tensor | tf.Variable) and hasattr(value, "numpy"):
        try:
            value = value.numpy()
        except NotImplementedError:  # A variable inside of a graph.
            return value
    if isinstance(value, np.ndarray | np.generic):
        return value if value.dtype.kind in "OmM" else value.tolist()
    return value


def integer(value: Any, name: str) -> int:
    """`value` as an int that fits in 64 bits; bool is not one."""
    bare = plain(value)
    try:
        if isinstance(bare, bool | np.generic):
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
    """An integer of the range that ops judge when they are called."""
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
    """One integer for both axes, or (height, width)."""
    bare = plain(value)
    if isinstance(bare, list | tuple):
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
    """`value` as a float; bool and text are none."""
    bare = plain(value)
    try:
        # `float` reads text and bytes as well: they have no `__float__`.
        if isinstance(bare, bool | np.ndarray | np.timedelta64) or not (
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
    """A number as float32s that sum up to it: attributes have no doubles."""
    value = real(value, name)
    with np.errstate(over="ignore"):
        high = float(np.float32(value))
    return [high, value - high] if np.isfinite(high) else [high]


def boolean(value: Any, name: str) -> bool:
    """True or False, which 1 and 0 may stand for as in files of Keras."""
    bare = plain(value)
    if not isinstance(bare, int) or bare not in (0, 1):
        raise TypeError(
            f"Expected `{name}` to be True or False. {received(value)}"
        )
    return bool(bare)


def option(value: Any, name: str, options: Sequence[str | None]) -> Any:
    """`value`, one of `options`: text or None, and nothing that equals it."""
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
    """Type of offsets, masks and ROIs that go with inputs of `dtype`."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def to_tensor(
    value: Any, name: str, dtype: tf.DType | None = None
) -> tf.Tensor:
    """Python's numbers become `dtype`; what has a type keeps it."""
    hint = None if hasattr(value, "dtype") else dtype
    try:
        return tf.convert_to_tensor(value, dtype_hint=hint)
    # Whatever a foreign type's conversion raises.
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
