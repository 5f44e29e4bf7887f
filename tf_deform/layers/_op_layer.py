# SPDX-License-Identifier: Apache-2.0
"""Checks arguments of calls, and converts data formats, for all layers."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from tf_deform import _keras
from tf_deform._implementation import is_for_other_runtime
from tf_deform._keras import keras
from tf_deform.ops._arguments import coordinate_type, option, to_tensor

# These arguments of `call` are maps, which may be images of integers.
_MAPS = ("inputs", "trans_inputs")
_COORDINATES = ("offset", "modulator", "trans")


def check_data_format(data_format: Any) -> str:
    if data_format is None:
        return keras.backend.image_data_format()
    if isinstance(data_format, str):
        data_format = data_format.lower()  # Keras does this, too.
    return option(
        data_format, "data_format", ("channels_last", "channels_first")
    )


def _with_known_sizes(maps: tf.Tensor) -> tf.Tensor:
    """Gives maps of an empty batch the sizes that the graph says they have.

    With oneDNN, a convolution of TensorFlow returns its input's sizes, channels
    included, where the batch is empty. Any other batch is left as it is, and
    nothing is copied.
    """
    known = maps.shape
    if known.rank != 4 or known[0] is not None or is_for_other_runtime():
        return maps
    if math.prod(size or 1 for size in known[1:]) > tf.int32.max:
        return maps  # The image that is added would not fit in memory.
    batch, *found = tf.unstack(tf.shape(maps))
    sizes = [
        size if size is not None else dynamic
        for size, dynamic in zip(known[1:], found)
    ]
    # Adds an image where there is none, and takes it away again: Grappler would
    # remove a reshaping alone, as nothing seems to change.
    values = tf.reshape(maps, (-1,))
    added = tf.where(batch > 0, 0, math.prod(sizes))
    values = tf.pad(values, ((0, added),))
    return tf.reshape(values, (tf.maximum(batch, 1), *sizes))[:batch]


class OpLayer(_keras.LayerMixin, keras.layers.Layer):
    """Hands the arguments of its `call` to an op.

    Attributes of subclasses:
        _AXES: The axes of every tensor that `call` takes, by its name; maps
            have four axes, named in channels last.
        _OP_NAMES: The op's names of arguments that have another name here.
    """

    _AXES: Mapping[str, str] = {}
    _OP_NAMES: Mapping[str, str] = {}
    data_format = "channels_last"
    _built_for: Mapping[str, tuple[int | None, ...]] | None = None

    def _keep_shapes(self, **shapes: Any) -> None:
        """Keeps the arguments of `build`, which files tell to a new layer."""
        shapes = {
            name: tuple(tf.TensorShape(shape).as_list())
            for name, shape in shapes.items()
            if shape is not None
        }
        # No checkpoint contains an attribute that is set in this way.
        object.__setattr__(self, "_built_for", shapes)

    def get_build_config(self) -> dict[str, Any] | None:
        # Keras 3 would use the names by which the shapes were given, Keras 2
        # would know one shape alone.
        if self._built_for is None:
            return super().get_build_config()
        if len(self._built_for) == 1:
            return {"input_shape": self._built_for["inputs_shape"]}
        return {"shapes_dict": dict(self._built_for)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _keras.check_caller(self.name, [*args, *kwargs.values()])
        # Checks before Keras does: Keras and its casts would take arguments
        # that no op can use, or raise errors that do not say which argument
        # they mean.
        parameters = inspect.signature(self.call).parameters
        names = list(parameters)
        args = [
            self._operand(value, *names[index : index + 1])
            for index, value in enumerate(args)
        ]
        kwargs = {
            name: self._operand(value, name) for name, value in kwargs.items()
        }
        for name in ("inputs", "rois"):
            if name in names[len(args) :] and name not in kwargs:
                raise TypeError(
                    f"Expected `{name}` to be passed to layer {self.name!r}. "
                    "Received: a call without it"
                )
        return super().__call__(*args, **kwargs)

    def _operand(self, value: Any, name: str | None = None) -> Any:
        """Returns an argument of a call as a tensor of the op's type."""
        if name not in self._AXES:
            return value
        if value is None and name not in ("inputs", "rois"):
            return value
        if not isinstance(value, (tf.Tensor, tf.Variable)):
            if not isinstance(value, _keras.KerasTensor):
                value = to_tensor(
                    value,
                    name,
                    coordinate_type(tf.as_dtype(self.compute_dtype)),
                )
            elif not _keras.is_dense(value):
                raise TypeError(
                    f"Expected `{name}` to be a dense tensor. Received: {value}"
                )
        dtype = tf.as_dtype(value.dtype)
        integers = dtype.is_integer and name not in _COORDINATES
        if not (
            dtype.is_floating
            or (integers and not dtype.is_quantized)
            or (dtype == tf.bool and name in _MAPS)
        ):
            raise TypeError(
                f"Expected `{name}` to be of a floating-point"
                f"{'' if name in _COORDINATES else ' or integer'} type. "
                f"Received: {name}.dtype={dtype.name}"
            )
        shape = tf.TensorShape(value.shape)
        if shape.rank is not None:
            self._check_rank(shape, name)
        return value

    def rematerialized_call(
        self, layer_call: Callable, *args: Any, **kwargs: Any
    ) -> Callable:
        """Adapts to `keras.RematScope`, which takes no keywords in graphs."""
        rematerialize = super().rematerialized_call
        signature = inspect.signature(layer_call)

        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            names = [name for name in given if given[name] is not None]
            run = rematerialize(
                lambda *values: layer_call(**dict(zip(names, values))),
                *args,
                **kwargs,
            )
            return run(*(given[name] for name in names))

        return call

    def _axes(self, name: str) -> str:
        axes = self._AXES[name].split(", ")
        if len(axes) == 4:
            axes = self._to_data_format(axes)
        return ", ".join(axes)

    def _check_rank(self, shape: tf.TensorShape, name: str) -> None:
        axes = self._axes(name)
        rank = axes.count(", ") + 1
        if shape.rank != rank:
            raise ValueError(
                f"Expected `{name}` to have rank {rank} ({axes}). Received: "
                f"{name}.shape={shape}"
            )

    def _shape_to_channels_last(
        self, shape: Any, name: str
    ) -> tuple[int | None, ...] | None:
        """Returns the shape of a map in channels last."""
        if shape is None:
            return None
        shape = tf.TensorShape(shape)
        self._check_rank(shape, name)
        shape = tuple(shape.as_list())
        if self.data_format == "channels_last":
            return shape
        return (shape[0], *shape[2:], shape[1])

    def _to_channels_last(self, value: Any, name: str) -> Any:
        """Returns a map in channels last."""
        if value is None:
            return None
        value = to_tensor(value, name)
        if value.shape.rank is not None:
            self._check_rank(value.shape, name)
        if name in _MAPS:
            value = _with_known_sizes(value)
        if self.data_format == "channels_last":
            return value
        return tf.transpose(value, (0, 2, 3, 1))

    def _to_data_format(self, value: Any) -> Any:
        """Returns the op's result, or its shape, in the layer's data format."""
        if self.data_format == "channels_last":
            return value
        if isinstance(value, (list, tuple)):
            return (value[0], value[-1], *value[1:-1])
        return tf.transpose(value, (0, 3, 1, 2))

    @contextlib.contextmanager
    def _own_words(self) -> Iterator[None]:
        """Makes errors of the op name the arguments of the layer's call."""
        try:
            yield
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            is_op_error = isinstance(error, tf.errors.OpError)
            text = error.message if is_op_error else str(error)
            own = self._in_own_words(text)
            if own == text or type(error) not in (
                ValueError,
                TypeError,
                tf.errors.InvalidArgumentError,
            ):
                raise
            if is_op_error:
                raise type(error)(error.node_def, error.op, own) from None
            raise type(error)(own) from None

    def _in_own_words(self, text: str) -> str:
        for own, name in self._OP_NAMES.items():
            text = text.replace(f"`{name}`", f"`{own}`")
            text = re.sub(rf"\b{name}(?=\.(shape|dtype)=)", own, text)
        if self.data_format == "channels_first":
            text = re.sub(
                rf"\b({'|'.join(self._AXES)})\.shape="
                r"\(([^,()]+), ([^,()]+), ([^,()]+), ([^,()]+)\)",
                r"\1.shape=(\2, \5, \3, \4)",
                text,
            )
            text = text.replace("last dimension", "second dimension")
        return text
