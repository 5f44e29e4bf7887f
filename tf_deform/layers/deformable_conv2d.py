# SPDX-License-Identifier: Apache-2.0
"""Implements deformable convolution as a Keras layer that replaces Conv2D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _keras, _loader
from tf_deform._implementation import check_implementation
from tf_deform.layers import _adoption
from tf_deform.layers._branch import convolve
from tf_deform.layers._op_layer import OpLayer, check_data_format
from tf_deform.ops._arguments import (
    Pair,
    boolean,
    bounded,
    coordinate_type,
    option,
    positive,
    positive_pair,
)
from tf_deform.ops.deformable_conv2d import (
    canonical_padding,
    check_boundary,
    deformable_conv2d,
    infer_output_shape,
)

MODULATIONS = (None, "sigmoid", "2sigmoid")
_BRANCH = ("offset_kernel", "offset_bias")
# Tells the user what to do if a file does not have a layer's weights.
_OF_PLAIN = (
    ". If the file is that of a model with `Conv2D` in its place: "
    "`tf_deform.load_plain_weights(model, path)`"
)


def _shape_of_inputs(
    method: str, shape: Any, keywords: Mapping[str, Any]
) -> Any:
    """Returns the shape that `build` is given, by position or by either name.

    Keras names the arguments of `build` after the arguments of `call`
    (`inputs_shape`), while Conv2D's is called `input_shape`.
    """
    given = {
        name: value
        for name, value in (("inputs_shape", shape), *keywords.items())
        if name != "inputs_shape" or value is not None
    }
    if len(given) != 1 or not given.keys() <= {"inputs_shape", "input_shape"}:
        raise TypeError(
            f"Expected `{method}` to be given `inputs_shape` or `input_shape`, "
            f"and those of displacements. Received: {', '.join(given) or None}"
        )
    return given.popitem()[1]


@_keras.register
class DeformableConv2D(OpLayer, _keras.Conv2D):
    """Convolves like `keras.layers.Conv2D`, but learns where to sample.

    A branch of the layer, one convolution that starts at zero, predicts for
    every output pixel and tap a displacement `(dy, dx)` in input pixels and,
    with `modulation`, a factor. The taps are sampled there:

        offset, m = split(conv(inputs, offset_kernel) + offset_bias)
        modulator = 1 | sigmoid(m) | 2 * sigmoid(m)
        outputs = activation(
            deformable_conv2d(inputs, kernel, offset, modulator) + bias)

    A new layer with `modulation` None or "2sigmoid" therefore returns the same
    outputs as `Conv2D` with the same kernel and bias, and can take these
    weights: `layer.set_weights(conv2d.get_weights())`.

    Source: Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, Eq. 2 to 4; modulation: Zhu et al. 2018, "Deformable
    ConvNets v2", arXiv:1811.11168, Eq. 1.

    Weights:
        kernel: `(kernel_h, kernel_w, channels // groups, filters)`.
        bias: `(filters,)`, with `use_bias`.
        offset_kernel: `(kernel_h, kernel_w, channels, 2 * n or 3 * n)`; its
            filters are the displacements, `[offset_group][kh][kw][(dy, dx)]`,
            then the modulation, `[offset_group][kh][kw]`.
        offset_bias: `(2 * n or 3 * n,)`.

    Here and below `n` is `offset_groups * kernel_h * kernel_w`. Only a layer
    that is called without `offset` has the last two weights. The regularizers
    and constraints of the kernel and bias do not apply to them.
    `tf_deform.training.deformable_optimizer` gives them a learning rate of
    their own.

    Args:
        filters, kernel_size: As in `keras.layers.Conv2D`.
        strides: As in `keras.layers.Conv2D`, and with any `dilation_rate`.
        padding: As in `keras.layers.Conv2D`, or an integer, (height, width)
            or ((top, bottom), (left, right)), in pixels.
        data_format: As in `keras.layers.Conv2D`. "channels_first" costs a
            transposition of the inputs and one of the outputs.
        dilation_rate, groups, activation, use_bias: As in
            `keras.layers.Conv2D`.
        kernel_initializer, bias_initializer: As in `keras.layers.Conv2D`.
        kernel_regularizer, bias_regularizer, activity_regularizer: As in
            `keras.layers.Conv2D`.
        kernel_constraint, bias_constraint: As in `keras.layers.Conv2D`.
        offset_groups: Number of contiguous runs of input channels with
            displacements of their own; divides the input channels.
        modulation: None (displacements only), "sigmoid" or "2sigmoid".
        boundary: "zeros" or "clamp", see `tf_deform.ops.deformable_conv2d`.
        offset_dilation_rate: Dilation of the branch's convolution; None means
            `dilation_rate`. The branch's taps have the same centre as the
            layer's.
        implementation: "native", or "portable" for stock TensorFlow ops; see
            `tf_deform.implementation`.
        freeze_kernel: Whether the layer trains its branch alone, while it is
            trainable: kernel and bias stay as they are.
        kwargs: `name`, `dtype`, `trainable`, and so on, as in
            `keras.layers.Conv2D`.

    Call arguments:
        inputs: `(batch, height, width, channels)`, or `(batch, channels,
            height, width)` for "channels_first"; cast to the compute dtype.
        offset: `(batch, out_h, out_w, 2 * n)`, laid out like `inputs`: given
            displacements. The branch then neither runs nor is built. `offset`
            and `modulator` are not cast to the compute dtype but to float32
            (float64 if that is the compute dtype).
        modulator: `(batch, out_h, out_w, n)`, laid out like `inputs`: factors
            that go with a given `offset`, used as they are. None means 1.

    Returns:
        `(batch, out_h, out_w, filters)`, laid out like `inputs`, in the compute
        dtype. Differentiable with respect to all arguments and weights; weights
        that are not trainable cost nothing. The outputs are NaN where the
        branch predicts NaN; a given NaN lies outside of the image.

    Raises:
        TypeError: Inputs or arguments have another type.
        ValueError: Arguments or shapes do not fit.
    """

    _AXES = {
        "inputs": "batch, height, width, channels",
        "offset": "batch, out_h, out_w, 2 * n",
        "modulator": "batch, out_h, out_w, n",
    }
    _OP_NAMES = {"modulator": "mask"}

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = (1, 1),
        padding: str | int | Sequence[Any] = "valid",
        data_format: str | None = None,
        dilation_rate: int | Sequence[int] = (1, 1),
        groups: int = 1,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        offset_groups: int = 1,
        modulation: str | None = None,
        boundary: str = "zeros",
        offset_dilation_rate: int | Sequence[int] | None = None,
        implementation: str = "native",
        freeze_kernel: bool = False,
        **kwargs: Any,
    ) -> None:
        filters = positive(filters, "filters")
        groups = positive(groups, "groups")
        if filters % groups:
            raise ValueError(
                "Expected `filters` to be a multiple of `groups`. Received: "
                f"filters={filters}, groups={groups}"
            )
        # Keras would cast offsets to the compute dtype, so `call` casts itself.
        kwargs["autocast"] = False
        # Conv2D has only two paddings, and no dilation beside strides, so
        # strides, padding and dilation are set below.
        super().__init__(
            filters,
            positive_pair(kernel_size, "kernel_size"),
            strides=positive_pair(strides, "strides"),
            data_format=check_data_format(data_format),
            groups=groups,
            activation=activation,
            use_bias=boolean(use_bias, "use_bias"),
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.padding = canonical_padding(padding)
        self.dilation_rate = positive_pair(dilation_rate, "dilation_rate")
        self.offset_groups = positive(offset_groups, "offset_groups")
        self.modulation = option(modulation, "modulation", MODULATIONS)
        self.boundary = check_boundary(boundary)
        self.implementation = check_implementation(implementation)
        self.offset_dilation_rate = (
            None
            if offset_dilation_rate is None
            else positive_pair(offset_dilation_rate, "offset_dilation_rate")
        )
        self.offset_kernel = None
        self.offset_bias = None
        self.freeze_kernel = freeze_kernel
        self.supports_jit = _loader.supports_jit()
        if not isinstance(self.padding, str):
            for pixels in (*self.padding[0], *self.padding[1]):
                bounded(pixels, "padding", 0)

    @classmethod
    def adopt(cls, conv: Any, **options: Any) -> DeformableConv2D:
        """Turns a layer of the class `Conv2D` into one of this class, in place.

        The object stays the same, with its weights, its name and its place in
        models. It gets a branch that starts at zero: with `modulation` None or
        "2sigmoid" its outputs stay what they are, up to rounding. A function
        that was traced with the layer before has to be traced again; see
        `tf_deform.make_deformable` for a whole model.

        Args:
            conv: The layer: built, of no subclass, with a kernel of several
                taps, neither quantized nor with LoRA.
            options: `offset_groups`, `modulation`, `boundary`,
                `offset_dilation_rate`, `implementation`, `freeze_kernel`.

        Returns:
            `conv`.

        Raises:
            TypeError: An option has another type.
            ValueError: `conv` is another layer, or an option does not fit.
                `conv` is then as it was.
        """
        return _adoption.adopt(cls, conv, options)

    @property
    def freeze_kernel(self) -> bool:
        return self._freeze_kernel

    @freeze_kernel.setter
    def freeze_kernel(self, value: bool) -> None:
        self._freeze_kernel = boolean(value, "freeze_kernel")
        if self.built:
            self._apply_freeze()

    def _frozen_alone(self) -> list[Any]:
        """Returns the weights that `freeze_kernel` is about."""
        return [self._kernel] + [self.bias] * self.use_bias

    def _apply_freeze(self) -> None:
        trainable = self.trainable and not self.freeze_kernel
        for weight in self._frozen_alone():
            is_kernel = weight is self._kernel
            _keras.set_trainable(
                weight, trainable and not (is_kernel and self.lora_enabled)
            )

    def _flags(self) -> dict[str, bool] | None:
        """Returns which weights are trained, or None if it is as usual.

        Keras saves the flag of a layer and no flags of variables. On Keras 2
        variables have none.
        """
        if not self.built:
            return None
        found, usual = {}, {}
        kernel = {"kernel": self._kernel, "bias": self.bias}
        for name, weight in {**kernel, **self._branch()}.items():
            if weight is None:
                continue
            found[name] = bool(_keras.is_trainable(self, weight))
            frozen = name in kernel and self.freeze_kernel
            frozen |= name == "kernel" and self.lora_enabled
            usual[name] = self.trainable and not frozen
        return None if found == usual else found

    def _set_flags(self, flags: Mapping[str, bool] | None) -> None:
        weights = {"kernel": self._kernel, "bias": self.bias, **self._branch()}
        for name, trainable in (flags or {}).items():
            _keras.set_trainable(weights[name], trainable)

    def get_build_config(self) -> dict[str, Any] | None:
        config, flags = super().get_build_config(), self._flags()
        return config if flags is None else {**config, "trainable": flags}

    def build_from_config(self, config: Mapping[str, Any]) -> None:
        config = dict(config)
        flags = config.pop("trainable", None)
        super().build_from_config(config)
        self._set_flags(flags)

    def _branch(self) -> dict[str, Any]:
        """Returns the branch's weights by the names that files give them."""
        if self.offset_kernel is None:
            return {}
        return {name: getattr(self, name) for name in _BRANCH}

    @property
    def _branch_dilation(self) -> Pair:
        return self.offset_dilation_rate or self.dilation_rate

    @property
    def _arguments(self) -> dict[str, Any]:
        """Returns the op's arguments that are not tensors."""
        return dict(
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            offset_groups=self.offset_groups,
            boundary=self.boundary,
            implementation=self.implementation,
        )

    @_keras.takes_all_shapes
    def build(
        self,
        inputs_shape: Sequence[int | None] | None = None,
        offset_shape: Sequence[int | None] | None = None,
        modulator_shape: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> None:
        inputs_shape = _shape_of_inputs("build", inputs_shape, kwargs)
        channels = self._shape_to_channels_last(inputs_shape, "inputs")[-1]
        if channels is None:
            raise ValueError(
                "Expected the channels of `inputs` to be known. Received: "
                f"inputs.shape={tuple(inputs_shape)}"
            )
        # LoRA closes the list of weights, so it has to wait for the branch's
        # weights.
        lora_rank, self.lora_rank = self.lora_rank, None
        super().build(inputs_shape)
        self._track_kernel()
        if offset_shape is None:
            self._build_branch(channels)
        if lora_rank:
            alpha = getattr(self, "lora_alpha", None)  # not in Keras 3.5
            alpha = {} if alpha is None else {"lora_alpha": alpha}
            self.enable_lora(lora_rank, **alpha)
        if self.freeze_kernel:
            self._apply_freeze()
        self._keep_shapes(
            inputs_shape=inputs_shape,
            offset_shape=offset_shape,
            modulator_shape=modulator_shape,
        )

    def _track_kernel(self) -> None:
        for name in ("kernel", "_kernel"):  # of Keras 2 and of Keras 3
            _keras.track(self, self._kernel, name)

    def _build_branch(self, channels: int) -> None:
        taps = self.kernel_size[0] * self.kernel_size[1]
        fields = self.offset_groups * taps * (3 if self.modulation else 2)
        self.offset_kernel = self.add_weight(
            name="offset_kernel",
            shape=(*self.kernel_size, channels, fields),
            initializer="zeros",
            dtype=self.dtype,
        )
        self.offset_bias = self.add_weight(
            name="offset_bias",
            shape=(fields,),
            initializer="zeros",
            dtype=self.dtype,
        )

    def compute_output_shape(
        self,
        inputs_shape: Sequence[int | None] | None = None,
        offset_shape: Sequence[int | None] | None = None,
        modulator_shape: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> tuple[int | None, ...]:
        inputs_shape = _shape_of_inputs(
            "compute_output_shape", inputs_shape, kwargs
        )
        if modulator_shape is not None and offset_shape is None:
            self._raise_lone_modulator(modulator_shape)
        inputs = self._shape_to_channels_last(inputs_shape, "inputs")
        channels = inputs[-1]
        if channels is not None:
            channels //= self.groups
        with self._own_words():
            shape = infer_output_shape(
                inputs,
                (*self.kernel_size, channels, self.filters),
                self._shape_to_channels_last(offset_shape, "offset"),
                self._shape_to_channels_last(modulator_shape, "modulator"),
                **self._arguments,
            )
        return _keras.as_shape(self._to_data_format(shape))

    @staticmethod
    def _raise_lone_modulator(received: Any) -> None:
        raise ValueError(
            "Expected `modulator` together with `offset`: the layer's own "
            "branch makes both. Received: offset=None, modulator of shape "
            f"{tuple(received)}"
        )

    def _run_branch(self, inputs: tf.Tensor) -> tf.Tensor:
        """Computes displacements and modulation, in channels last."""
        kernel, bias = (
            tf.cast(weight, self.compute_dtype)
            for weight in (self.offset_kernel, self.offset_bias)
        )
        fields = convolve(
            inputs,
            kernel,
            strides=self.strides,
            padding=self._branch_padding(),
            dilations=self._branch_dilation,
        )
        fields = tf.nn.bias_add(fields, bias)
        return tf.cast(fields, coordinate_type(inputs.dtype))

    def _branch_padding(self) -> str | list[Pair]:
        """Returns the padding that centres the branch's taps on the layer's.

        It is "same", or (before, after) for height and width; negative values
        are pixels to cut off.
        """
        if self.padding == "same":
            return "same"
        padding = self.padding
        if padding == "valid":
            padding = ((0, 0), (0, 0))
        result = []
        for axis, (before, after) in enumerate(padding):
            spare = (self.kernel_size[axis] - 1) * (
                self.dilation_rate[axis] - self._branch_dilation[axis]
            )
            result.append((before - spare // 2, after - (spare - spare // 2)))
        return result

    def convolution_op(
        self,
        inputs: tf.Tensor,
        kernel: tf.Tensor,
        offset: Any = None,
        modulator: Any = None,
    ) -> tf.Tensor:
        """Runs the branch and the deformable convolution, for `call`.

        As in `keras.layers.Conv2D`, a subclass may override it, to change the
        operands or the outputs. Without given displacements it is called with
        `inputs` and `kernel` alone.
        """
        inputs = self._to_channels_last(inputs, "inputs")
        if offset is None:
            offset = self._run_branch(inputs)
            modulation = self.modulation or "none"
        else:
            offset = self._to_channels_last(offset, "offset")
            modulator = self._to_channels_last(modulator, "modulator")
            modulation = "mask"
        with self._own_words():
            outputs = deformable_conv2d(
                inputs,
                kernel,
                offset,
                modulator,
                modulation=modulation,
                **self._arguments,
            )
        return self._to_data_format(outputs)

    def call(
        self, inputs: Any, offset: Any = None, modulator: Any = None
    ) -> tf.Tensor:
        if modulator is not None and offset is None:
            self._raise_lone_modulator(modulator.shape)
        if offset is None and self.offset_kernel is None:
            raise ValueError(
                f"Expected `offset`, with which layer {self.name!r} was "
                "built: it has no branch of its own. Received: offset=None"
            )
        inputs = tf.cast(inputs, self.compute_dtype)
        kernel = tf.cast(self.kernel, self.compute_dtype)
        trainable = _keras.is_trainable(self, self._kernel)
        trainable = trainable and not self.freeze_kernel
        if not trainable and not self.lora_enabled:
            # Tapes also watch frozen variables: stops the gradient to save its
            # time.
            kernel = tf.stop_gradient(kernel)
        if offset is None:
            outputs = self.convolution_op(inputs, kernel)
        else:
            outputs = self.convolution_op(inputs, kernel, offset, modulator)
        if self.use_bias:
            bias = tf.cast(self.bias, self.compute_dtype)
            if self.data_format == "channels_last":
                outputs = tf.nn.bias_add(outputs, bias)
            else:
                outputs += tf.reshape(bias, (-1, 1, 1))
        if self.activation is not None:
            outputs = self.activation(outputs)
        return outputs

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        for name, weight in self._branch().items():
            store[name] = _keras.stored(weight)

    def load_own_variables(self, store: Any) -> None:
        own = {name: store[name] for name in store.keys()}
        branch = {name: own.pop(name) for name in _BRANCH if name in own}
        if self.built:
            self._check_branch(branch, sorted(store.keys()))
        super().load_own_variables(own)
        for name, value in branch.items():
            self._branch()[name].assign(value)

    def _check_branch(
        self, branch: dict[str, Any], received: list[str]
    ) -> None:
        """Checks that a file has all weights of the branch, or none of them."""
        expected = {
            name: tuple(weight.shape) for name, weight in self._branch().items()
        }
        if branch.keys() != expected.keys():
            raise ValueError(
                f"Expected weights of layer {self.name!r} "
                f"{'with' if expected else 'without'} those of its branch, as "
                f"it was built{' (both of them)' if expected else ''}. "
                f"Received: {received}{'' if branch else _OF_PLAIN}"
            )
        shapes = {name: np.shape(value) for name, value in branch.items()}
        if shapes != expected:
            raise ValueError(
                f"Expected the branch of layer {self.name!r} to have the "
                f"shapes {expected}. Received: {shapes}"
            )

    def _check_load_own_variables(self, store: Any) -> None:
        if not self.built:
            return super()._check_load_own_variables(store)
        expected = 2 if self.use_bias else 1
        loads = type(self).load_own_variables
        if loads is DeformableConv2D.load_own_variables:
            # Counts the weights of a subclass, too, which Keras 3 never stores.
            expected = len(_keras.own_variables(self)) - len(self._branch())
        if len(store.keys()) != expected:
            raise ValueError(
                f"Expected {expected} weights (kernel and, with use_bias, "
                f"bias) for layer {self.name!r} besides those of its branch. "
                f"Received: {sorted(store.keys())}{_OF_PLAIN}"
            )

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Sets the weights from arrays, in the order of `get_weights`.

        The weights of a `Conv2D`, kernel and bias alone, are accepted as well:
        the branch then stays as it is.
        """
        weights = list(weights)
        if self.offset_kernel is not None and not self.lora_enabled:
            if len(weights) == (2 if self.use_bias else 1):
                weights += [self.offset_kernel, self.offset_bias]
        super().set_weights(weights)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "offset_groups": self.offset_groups,
            "modulation": self.modulation,
            "boundary": self.boundary,
            "offset_dilation_rate": self.offset_dilation_rate,
            "implementation": self.implementation,
            "freeze_kernel": self.freeze_kernel,
        }
