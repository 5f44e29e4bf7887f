# SPDX-License-Identifier: Apache-2.0
"""Implements the common parts of the layers that pool regions of interest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_deform import _keras, _loader
from tf_deform._implementation import check_implementation
from tf_deform._portable.fields import hand_on_nan
from tf_deform.layers._op_layer import OpLayer, check_data_format
from tf_deform.ops._arguments import (
    coordinate_type,
    infer_shape,
    positive,
    positive_pair,
    real,
    received,
)


def check_factor(value: Any, name: str, zero_allowed: bool = True) -> float:
    value = real(value, name)
    if not (
        math.isfinite(value) and (value > 0 or zero_allowed and value == 0)
    ):
        raise ValueError(
            f"Expected `{name}` to be a finite number "
            f"{'of at least' if zero_allowed else 'above'} 0. Received: {value}"
        )
    return value


def branch_value(layer: ROILayer, weight: Any) -> tf.Tensor:
    """Returns a weight of a layer's branch; a frozen weight has no gradient.

    Tapes also watch frozen variables. Without a gradient here, the gradient of
    displacements that depend on frozen weights alone is not computed.
    """
    value = tf.cast(weight, layer.compute_dtype)
    if _keras.is_trainable(layer, weight):
        return value
    return tf.stop_gradient(value)


class ROILayer(OpLayer):
    """Holds the arguments of all three layers, and computes shapes.

    Subclasses define `_pool(inputs, rois, displacements)` on maps in channels
    last, where `displacements` may be None.
    """

    def __init__(
        self,
        pooled_size: int | Sequence[int],
        spatial_scale: float,
        data_format: str | None,
        implementation: str,
        **kwargs: Any,
    ) -> None:
        # Keras would cast regions to the compute dtype, so `call` casts itself.
        kwargs["autocast"] = False
        super().__init__(**kwargs)
        self.pooled_size = positive_pair(pooled_size, "pooled_size")
        self.spatial_scale = check_factor(
            spatial_scale, "spatial_scale", zero_allowed=False
        )
        self.data_format = check_data_format(data_format)
        self.implementation = check_implementation(implementation)
        self.offset_kernel = None
        self.offset_bias = None
        self.supports_jit = _loader.supports_jit()

    def _channels_of(self, shape: Sequence[int | None], name: str) -> int:
        """Returns the number of a map's channels, which has to be known."""
        channels = self._shape_to_channels_last(shape, name)[-1]
        if channels is None:
            raise ValueError(
                f"Expected the channels of `{name}` to be known. Received: "
                f"{name}.shape={tuple(shape)}"
            )
        return channels

    def _pool(
        self,
        inputs: tf.Tensor,
        rois: tf.Tensor,
        displacements: tf.Tensor | None,
    ) -> tf.Tensor:
        raise NotImplementedError

    def _infer_shape(
        self,
        inputs_shape: Sequence[int | None],
        rois_shape: Sequence[int | None],
        shape: Sequence[int | None] | None,
        name: str,
    ) -> tuple[int | None, ...]:
        """Returns the output's shape; displacements `name` have `shape`."""
        inputs_shape = self._shape_to_channels_last(inputs_shape, "inputs")
        shape = self._shape_to_channels_last(shape, name)
        with self._own_words():
            shape = infer_shape(
                self._pool, inputs_shape, tuple(rois_shape), shape
            )
        return _keras.as_shape(self._to_data_format(shape))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "pooled_size": self.pooled_size,
            "spatial_scale": self.spatial_scale,
            "data_format": self.data_format,
            "implementation": self.implementation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ROILayer:
        # A layer that was saved before there was a `data_format` is in channels
        # last, whatever Keras' setting is where it is loaded.
        if "implementation" in config:
            config = {"data_format": "channels_last", **config}
        return super().from_config(config)


class DisplacedROILayer(ROILayer):
    """Pools with bins displaced one by one, as given or by a branch.

    Attributes of subclasses:
        modulation: None, or "sigmoid" for a second branch of the same kind,
            whose factors multiply the bins.
    """

    modulation: str | None = None

    _AXES = {
        "inputs": "batch, height, width, channels",
        "rois": "num_rois, 5",
        "offset": "num_rois, pooled_h, pooled_w, 2",
    }

    def __init__(
        self,
        pooled_size: int | Sequence[int],
        spatial_scale: float,
        units: Sequence[int],
        data_format: str | None,
        implementation: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            pooled_size, spatial_scale, data_format, implementation, **kwargs
        )
        if not isinstance(units, (list, tuple)):
            raise TypeError(
                "Expected `units` to be a list or tuple of integers. "
                f"{received(units)}"
            )
        self.units = tuple(positive(size, "units") for size in units)
        self._hidden = []
        self.offset_modulator_kernel = None
        self.offset_modulator_bias = None
        self._modulator_hidden = []
        self._channels = None

    @_keras.takes_all_shapes
    def build(
        self,
        inputs_shape: Sequence[int | None],
        rois_shape: Sequence[int | None],
        offset_shape: Sequence[int | None] | None = None,
    ) -> None:
        self._keep_shapes(
            inputs_shape=inputs_shape,
            rois_shape=rois_shape,
            offset_shape=offset_shape,
        )
        self._channels = self._channels_of(inputs_shape, "inputs")
        if offset_shape is not None:
            return
        bins = math.prod(self.pooled_size)
        self.offset_kernel, self.offset_bias = self._add_branch(
            "offset", self._hidden, self.units, 2 * bins
        )
        if self.modulation is not None:
            self.offset_modulator_kernel, self.offset_modulator_bias = (
                self._add_branch(
                    "offset_modulator",
                    self._modulator_hidden,
                    self.units[:-1],
                    bins,
                )
            )

    def _add_branch(
        self,
        name: str,
        hidden: list[tuple[Any, Any]],
        units: Sequence[int],
        outputs: int,
    ) -> tuple[Any, Any]:
        """Makes the weights of dense layers, of which the last are zero.

        Args:
            name: What the names of weights begin with.
            hidden: Receives kernel and bias of each hidden layer.
            units: Sizes of the hidden layers.
            outputs: Size of the last layer.

        Returns:
            Kernel and bias of the last layer.
        """
        features = math.prod(self.pooled_size) * self._channels
        for index, size in enumerate(units):
            kernel = self.add_weight(
                name=f"{name}_hidden_kernel_{index}",
                shape=(features, size),
                initializer="glorot_uniform",
            )
            bias = self.add_weight(
                name=f"{name}_hidden_bias_{index}",
                shape=(size,),
                initializer="zeros",
            )
            for weight, kind in ((kernel, "kernel"), (bias, "bias")):
                _keras.track(self, weight, f"{name}_hidden_{kind}_{index}")
            hidden.append((kernel, bias))
            features = size
        kernel = self.add_weight(
            name=f"{name}_kernel",
            shape=(features, outputs),
            initializer="zeros",
        )
        bias = self.add_weight(
            name=f"{name}_bias", shape=(outputs,), initializer="zeros"
        )
        return kernel, bias

    def _run_branch(self, inputs: tf.Tensor, rois: tf.Tensor) -> tf.Tensor:
        return self._run_branches(inputs, rois)[0]

    def _run_branches(
        self, inputs: tf.Tensor, rois: tf.Tensor
    ) -> list[tf.Tensor]:
        """Returns what the branches make of the plain pooling.

        Displacements `(num_rois, pooled_h, pooled_w, 2)` and, with modulation,
        factors `(num_rois, pooled_h, pooled_w, 1)`, in the coordinate type.
        """
        coordinates = coordinate_type(inputs.dtype)
        # Keeps padding at 0 also where weights are NaN: 0 times NaN would be
        # NaN.
        known = tf.cast(rois, coordinates)
        exists = tf.reduce_all(tf.abs(known) <= coordinates.max, 1, True)
        exists &= known[:, :1] >= 0
        x = self._pool(inputs, rois, None)
        # Flattens channels last, whatever the layer's format is, so that the
        # weights are the same in both formats.
        x = tf.reshape(x, (-1, math.prod(x.shape[1:])))

        def dense(x: tf.Tensor, kernel: Any, bias: Any) -> tf.Tensor:
            kernel, bias = (
                branch_value(self, weight) for weight in (kernel, bias)
            )
            return tf.matmul(x, kernel) + bias

        def run(hidden: list[tuple[Any, Any]], *last: Any) -> tf.Tensor:
            fields = x
            for kernel, bias in hidden:
                fields = tf.nn.relu(dense(fields, kernel, bias))
            fields = tf.cast(dense(fields, *last), coordinates)
            fields = tf.where(exists, fields, tf.zeros_like(fields))
            return tf.reshape(
                fields,
                (-1, *self.pooled_size, last[0].shape[-1] // bins),
            )

        bins = math.prod(self.pooled_size)
        found = [run(self._hidden, self.offset_kernel, self.offset_bias)]
        if self.offset_modulator_kernel is not None:
            factors = run(
                self._modulator_hidden,
                self.offset_modulator_kernel,
                self.offset_modulator_bias,
            )
            found.append(tf.sigmoid(factors))
        return found

    def _check_offset(self, shape: Sequence[int | None] | None) -> None:
        if shape is None:
            if self.built and self.offset_kernel is None:
                raise ValueError(
                    f"Expected `offset`, with which layer {self.name!r} was "
                    "built: it has no branch of its own. Received: offset=None"
                )
            return
        last = "second" if self.data_format == "channels_first" else "last"
        for size, length, quantity in zip(
            (*self.pooled_size, 2),
            self._shape_to_channels_last(shape, "offset")[1:],
            ("height", "width", f"a {last} dimension of"),
        ):
            if length not in (None, size):
                raise ValueError(
                    f"Expected `offset` to have {quantity} {size} "
                    f"({self._axes('offset')}). Received: offset.shape="
                    f"{tuple(shape)}"
                )

    def compute_output_shape(
        self,
        inputs_shape: Sequence[int | None],
        rois_shape: Sequence[int | None],
        offset_shape: Sequence[int | None] | None = None,
    ) -> tuple[int | None, ...]:
        self._check_offset(offset_shape)
        return self._infer_shape(
            inputs_shape, rois_shape, offset_shape, "offset"
        )

    def call(self, inputs: Any, rois: Any, offset: Any = None) -> tf.Tensor:
        inputs = tf.cast(inputs, self.compute_dtype)
        inputs = self._to_channels_last(inputs, "inputs")
        if offset is not None:
            offset = tf.convert_to_tensor(offset)
        if offset is None or offset.shape.rank is not None:
            self._check_offset(None if offset is None else offset.shape)
        if inputs.shape.rank is None or inputs.shape[-1] is None:
            inputs = tf.ensure_shape(inputs, (None, None, None, self._channels))
        has_own = offset is None
        factors = []
        if has_own:
            offset, *factors = self._run_branches(inputs, rois)
        else:
            offset = self._to_channels_last(offset, "offset")
        with self._own_words():
            outputs = self._pool(inputs, rois, offset)
        if has_own:
            outputs = hand_on_nan(outputs, offset)
        for factor in factors:
            outputs *= tf.cast(factor, outputs.dtype)
        return self._to_data_format(outputs)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "units": self.units}
