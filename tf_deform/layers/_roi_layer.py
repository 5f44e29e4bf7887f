# SPDX-License-Identifier: Apache-2.0
"""What the layers that pool regions of interest have in common."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tf_deform import _loader
from tf_deform._implementation import check_implementation
from tf_deform.ops._arguments import (
    Pair,
    coordinate_type,
    infer_shape,
    integer,
    number,
    pair,
)


def positive(value: Any, name: str) -> int:
    value = integer(value, name)
    if value < 1:
        raise ValueError(f"Expected `{name}` to be positive. Received: {value}")
    return value


def positive_pair(value: Any, name: str) -> Pair:
    height, width = pair(value, name)
    return positive(height, name), positive(width, name)


def check_factor(value: Any, name: str, zero_allowed: bool = True) -> float:
    number(value, name)  # of another type: an error
    value = float(value)
    if not (
        math.isfinite(value) and (value > 0 or zero_allowed and value == 0)
    ):
        raise ValueError(
            f"Expected `{name}` to be a finite number "
            f"{'of at least' if zero_allowed else 'above'} 0. Received: {value}"
        )
    return value


def channels_of(shape: Sequence[int | None], name: str) -> int:
    """The channels of a map, which have to be known."""
    if len(shape) != 4:
        raise ValueError(
            f"Expected `{name}` to have rank 4 (batch, height, width, "
            f"channels). Received: {name}.shape={tuple(shape)}"
        )
    if shape[-1] is None:
        raise ValueError(
            f"Expected the channels of `{name}` to be known. Received: "
            f"{name}.shape={tuple(shape)}"
        )
    return shape[-1]


def branch_value(weight: keras.Variable, dtype: str) -> tf.Tensor:
    """A weight of a branch; no gradient of a frozen one.

    Tapes watch frozen variables too: spare the gradient of displacements that
    come from nothing else.
    """
    value = tf.cast(weight, dtype)
    return value if weight.trainable else tf.stop_gradient(value)


class DisplacedROILayer(keras.layers.Layer):
    """Pooling with one displacement for each bin, given or from dense layers.

    Subclasses define `_pool(inputs, rois, offset)`, where `offset` may be None.
    """

    def __init__(
        self,
        pooled_size: int | Sequence[int],
        spatial_scale: float,
        units: Sequence[int],
        implementation: str,
        **kwargs: Any,
    ):
        # Keras would cast regions to the compute dtype: `call` casts itself.
        kwargs["autocast"] = False
        super().__init__(**kwargs)
        self.pooled_size = positive_pair(pooled_size, "pooled_size")
        self.spatial_scale = check_factor(
            spatial_scale, "spatial_scale", zero_allowed=False
        )
        if not isinstance(units, list | tuple):
            raise TypeError(
                "Expected `units` to be a list or tuple of integers. Received: "
                f"{units!r} of type {type(units).__name__}"
            )
        self.units = tuple(positive(size, "units") for size in units)
        self.implementation = check_implementation(implementation)
        self.offset_kernel = None
        self.offset_bias = None
        self._hidden = []
        self._channels = None
        self.supports_jit = _loader.supports_jit()

    def build(
        self,
        inputs_shape: Sequence[int | None],
        rois_shape: Sequence[int | None],
        offset_shape: Sequence[int | None] | None = None,
    ) -> None:
        self._channels = channels_of(inputs_shape, "inputs")
        if offset_shape is not None:
            return
        bins = self.pooled_size[0] * self.pooled_size[1]
        features = bins * self._channels
        for index, size in enumerate(self.units):
            kernel = self.add_weight(
                name=f"offset_hidden_kernel_{index}",
                shape=(features, size),
                initializer="glorot_uniform",
            )
            bias = self.add_weight(
                name=f"offset_hidden_bias_{index}",
                shape=(size,),
                initializer="zeros",
            )
            self._hidden.append((kernel, bias))
            features = size
        self.offset_kernel = self.add_weight(
            name="offset_kernel",
            shape=(features, 2 * bins),
            initializer="zeros",
        )
        self.offset_bias = self.add_weight(
            name="offset_bias", shape=(2 * bins,), initializer="zeros"
        )

    def _pool(
        self, inputs: tf.Tensor, rois: tf.Tensor, offset: tf.Tensor | None
    ) -> tf.Tensor:
        raise NotImplementedError

    def _run_branch(self, inputs: tf.Tensor, rois: tf.Tensor) -> tf.Tensor:
        def dense(x, kernel, bias):
            kernel, bias = (
                branch_value(weight, self.compute_dtype)
                for weight in (kernel, bias)
            )
            return tf.matmul(x, kernel) + bias

        x = self._pool(inputs, rois, None)
        x = tf.reshape(x, (-1, math.prod(x.shape[1:])))
        for kernel, bias in self._hidden:
            x = tf.nn.relu(dense(x, kernel, bias))
        offset = dense(x, self.offset_kernel, self.offset_bias)
        offset = tf.cast(offset, coordinate_type(inputs.dtype))
        return tf.reshape(offset, (-1, *self.pooled_size, 2))

    def _check_offset(self, shape: Sequence[int | None] | None) -> None:
        if shape is None:
            if self.built and self.offset_kernel is None:
                raise ValueError(
                    f"Expected `offset`, with which layer {self.name!r} was "
                    "built: it has no branch of its own. Received: offset=None"
                )
            return
        if len(shape) != 4:
            raise ValueError(
                "Expected `offset` to have rank 4 (num_rois, pooled_h, "
                f"pooled_w, 2). Received: offset.shape={tuple(shape)}"
            )
        for size, received, quantity in zip(
            (*self.pooled_size, 2),
            shape[1:],
            ("height", "width", "a last dimension of"),
            strict=True,
        ):
            if received not in (None, size):
                raise ValueError(
                    f"Expected `offset` to have {quantity} {size} (pooled_h, "
                    "pooled_w, 2). Received: offset.shape="
                    f"{tuple(shape)}"
                )

    def compute_output_shape(
        self,
        inputs_shape: Sequence[int | None],
        rois_shape: Sequence[int | None],
        offset_shape: Sequence[int | None] | None = None,
    ) -> tuple[int | None, ...]:
        self._check_offset(offset_shape)
        return infer_shape(self._pool, inputs_shape, rois_shape, offset_shape)

    def call(self, inputs: Any, rois: Any, offset: Any = None) -> tf.Tensor:
        inputs = tf.cast(inputs, self.compute_dtype)
        if offset is not None:
            offset = tf.convert_to_tensor(offset)
        if offset is None or offset.shape.rank is not None:
            self._check_offset(None if offset is None else offset.shape)
        if inputs.shape.rank is None or inputs.shape[-1] is None:
            inputs = tf.ensure_shape(inputs, (None, None, None, self._channels))
        if offset is None:
            offset = self._run_branch(inputs, rois)
        return self._pool(inputs, rois, offset)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "pooled_size": self.pooled_size,
            "spatial_scale": self.spatial_scale,
            "units": self.units,
            "implementation": self.implementation,
        }
