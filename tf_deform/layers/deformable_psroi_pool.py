# SPDX-License-Identifier: Apache-2.0
"""Implements deformable ROI pooling, position-sensitive or not, for Keras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _keras
from tf_deform._portable.fields import hand_on_nan
from tf_deform.layers._roi_layer import (
    DisplacedROILayer,
    ROILayer,
    branch_value,
    check_factor,
)
from tf_deform.ops._arguments import positive, positive_pair
from tf_deform.ops.deformable_psroi_pool import deformable_psroi_pool


@_keras.register
class DeformablePSROIPooling(ROILayer):
    """Pools position-sensitive maps over regions whose bins may be displaced.

    The maps have a group of `output_dim` channels for each of `group_size`
    cells, and a bin reads the channels of its cell. Displacements are one of:

    - given, as `trans`;
    - made by the layer from a feature map, `trans_inputs`, as in the published
      detector: a 1x1 convolution that starts at zero makes position-sensitive
      maps of displacements, which are pooled over the parts of each region:

          trans = psroi_pool(conv(trans_inputs, offset_kernel) + offset_bias)

    - none: position-sensitive pooling with bilinear samples. A new branch also
      starts from this.

    See `tf_deform.ops.deformable_psroi_pool` for the equation.

    A NaN that the branch predicts is handed on to the bins of its part, in the
    channels of its class: the op alone would treat it as outside of the map and
    hide it. Padding regions stay 0 in any case. For given displacements the
    op's rule holds.

    Source: Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, Eq. 5 and 6, and section 2.2; position-sensitive maps:
    Dai et al. 2016, "R-FCN", arXiv:1605.06409, Eq. 1.

    Weights:
        offset_kernel: `(1, 1, trans_channels, n)`; its filters are ordered
            `[class][(dy, dx)][part_h][part_w]`.
        offset_bias: `(n,)`.

    Here `n` is `num_classes * 2 * part_h * part_w`. Only a layer that is given
    `trans_inputs` has weights.

    Args:
        output_dim: Number of output channels.
        pooled_size: Integer or (height, width): bins of a region.
        spatial_scale: Map pixels per image pixel.
        group_size: Integer or (height, width): cells of the maps. None means
            `pooled_size`.
        part_size: Integer or (height, width): displacements of a region. None
            means `pooled_size`.
        sample_per_part: Samples of a bin along each axis.
        trans_std: Factor of the displacements.
        num_classes: Number of contiguous runs of output channels with
            displacements of their own, made by the branch; divides
            `output_dim`. For a given `trans` its shape sets the number.
        data_format: "channels_last" or "channels_first", of `inputs`, `trans`,
            `trans_inputs` and the outputs; None means
            `keras.config.image_data_format()`. The weights are the same in
            both. "channels_first" costs a transposition of each tensor.
        implementation: "native", or "portable" for stock TensorFlow ops; see
            `tf_deform.implementation`.
        kwargs: `name`, `dtype`, `trainable`, and so on.

    Call arguments:
        inputs: `(batch, height, width, output_dim * group_h * group_w)`; with
            "channels_first" the channels are second here and in all tensors
            below. Cast to the compute dtype.
        rois: `(num_rois, 5)`: batch_index, x1, y1, x2, y2, in image pixels,
            the last pixels included; a negative batch index marks padding. Not
            cast to the compute dtype but to float32 (float64 if that is the
            compute dtype). No gradient.
        trans: `(num_rois, part_h, part_w, classes * 2)`, `(dy, dx)` of each
            class, in fractions of the region, times `trans_std`; cast like
            `rois`.
        trans_inputs: `(batch, height, width, trans_channels)`, of the scale of
            `inputs`; may be given instead of `trans`.

    Returns:
        `(num_rois, pooled_h, pooled_w, output_dim)`, or `(num_rois,
        output_dim, pooled_h, pooled_w)`, in the compute dtype.
        Differentiable with respect to all arguments but `rois`.

    Raises:
        ValueError: Arguments or shapes do not fit.
    """

    _AXES = {
        "inputs": "batch, height, width, output_dim * group_h * group_w",
        "rois": "num_rois, 5",
        "trans": "num_rois, part_h, part_w, classes * 2",
        "trans_inputs": "batch, height, width, trans_channels",
    }

    def __init__(
        self,
        output_dim: int,
        pooled_size: int | Sequence[int],
        spatial_scale: float,
        group_size: int | Sequence[int] | None = None,
        part_size: int | Sequence[int] | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.1,
        num_classes: int = 1,
        data_format: str | None = None,
        implementation: str = "native",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            pooled_size, spatial_scale, data_format, implementation, **kwargs
        )
        self.output_dim = positive(output_dim, "output_dim")
        self.group_size = (
            self.pooled_size
            if group_size is None
            else positive_pair(group_size, "group_size")
        )
        self.part_size = (
            self.pooled_size
            if part_size is None
            else positive_pair(part_size, "part_size")
        )
        self.sample_per_part = positive(sample_per_part, "sample_per_part")
        self.trans_std = check_factor(trans_std, "trans_std")
        self.num_classes = positive(num_classes, "num_classes")
        if self.output_dim % self.num_classes:
            raise ValueError(
                "Expected `output_dim` to be a multiple of `num_classes`. "
                f"Received: output_dim={output_dim}, num_classes={num_classes}"
            )

    @_keras.takes_all_shapes
    def build(
        self,
        inputs_shape: Sequence[int | None],
        rois_shape: Sequence[int | None],
        trans_shape: Sequence[int | None] | None = None,
        trans_inputs_shape: Sequence[int | None] | None = None,
    ) -> None:
        self._keep_shapes(
            inputs_shape=inputs_shape,
            rois_shape=rois_shape,
            trans_shape=trans_shape,
            trans_inputs_shape=trans_inputs_shape,
        )
        if trans_inputs_shape is None:
            return
        channels = self._channels_of(trans_inputs_shape, "trans_inputs")
        fields = 2 * self.num_classes * self.part_size[0] * self.part_size[1]
        self.offset_kernel = self.add_weight(
            name="offset_kernel",
            shape=(1, 1, channels, fields),
            initializer="zeros",
        )
        self.offset_bias = self.add_weight(
            name="offset_bias", shape=(fields,), initializer="zeros"
        )

    def _pool(
        self, inputs: tf.Tensor, rois: tf.Tensor, trans: tf.Tensor | None
    ) -> tf.Tensor:
        return deformable_psroi_pool(
            inputs,
            rois,
            trans,
            output_dim=self.output_dim,
            spatial_scale=self.spatial_scale,
            pooled_size=self.pooled_size,
            group_size=self.group_size,
            part_size=self.part_size,
            sample_per_part=self.sample_per_part,
            trans_std=self.trans_std,
            implementation=self.implementation,
        )

    def _run_branch(
        self, trans_inputs: tf.Tensor, rois: tf.Tensor
    ) -> tf.Tensor:
        kernel, bias = (
            branch_value(self, weight)
            for weight in (self.offset_kernel, self.offset_bias)
        )
        maps = tf.nn.bias_add(tf.tensordot(trans_inputs, kernel[0, 0], 1), bias)
        return deformable_psroi_pool(
            maps,
            rois,
            output_dim=2 * self.num_classes,
            spatial_scale=self.spatial_scale,
            pooled_size=self.part_size,
            sample_per_part=self.sample_per_part,
            implementation=self.implementation,
        )

    def _hand_on_nan(self, outputs: tf.Tensor, trans: tf.Tensor) -> tf.Tensor:
        """Returns NaN in the bins and channels whose part and class are NaN."""
        for axis in range(2):
            parts, bins = self.part_size[axis], self.pooled_size[axis]
            if parts != bins:
                index = np.arange(bins) * parts // bins
                trans = tf.gather(trans, index, axis=1 + axis)
        by_class = (-1, *self.pooled_size, self.num_classes)
        handed_on = hand_on_nan(
            tf.reshape(outputs, (*by_class, self.output_dim // by_class[-1])),
            tf.reshape(trans, (*by_class, 2)),
        )
        return tf.reshape(handed_on, (-1, *self.pooled_size, self.output_dim))

    def _check_trans_inputs(
        self,
        trans_inputs: Sequence[int | None],
        inputs: Sequence[int | None],
        has_trans: bool,
    ) -> None:
        """Checks shapes that the op does not see; () is an unknown rank."""
        if has_trans:
            raise ValueError(
                "Expected displacements (`trans`) or what the layer makes "
                "them from (`trans_inputs`). Received: both"
            )
        if self.built and self.offset_kernel is None:
            raise ValueError(
                "Expected no `trans_inputs`, without which layer "
                f"{self.name!r} was built: it has no branch of its own. "
                f"Received: trans_inputs.shape={tuple(trans_inputs)}"
            )
        shapes = (inputs, trans_inputs)
        batches = {shape[0] for shape in shapes if len(shape) == 4} - {None}
        if len(batches) > 1:
            raise ValueError(
                "Expected `trans_inputs` to have the batch size of `inputs`. "
                f"Received: inputs.shape={tuple(inputs)}, trans_inputs.shape="
                f"{tuple(trans_inputs)}"
            )

    def compute_output_shape(
        self,
        inputs_shape: Sequence[int | None],
        rois_shape: Sequence[int | None],
        trans_shape: Sequence[int | None] | None = None,
        trans_inputs_shape: Sequence[int | None] | None = None,
    ) -> tuple[int | None, ...]:
        if trans_inputs_shape is not None:
            self._channels_of(trans_inputs_shape, "trans_inputs")
            self._check_trans_inputs(
                trans_inputs_shape, inputs_shape, trans_shape is not None
            )
        return self._infer_shape(inputs_shape, rois_shape, trans_shape, "trans")

    def call(
        self,
        inputs: Any,
        rois: Any,
        trans: Any = None,
        trans_inputs: Any = None,
    ) -> tf.Tensor:
        inputs = tf.cast(inputs, self.compute_dtype)
        if trans_inputs is not None:
            trans_inputs = tf.cast(trans_inputs, self.compute_dtype)
            self._check_trans_inputs(
                *(
                    () if x.shape.rank is None else tuple(x.shape)
                    for x in (trans_inputs, inputs)
                ),
                trans is not None,
            )
            trans_inputs = self._to_channels_last(trans_inputs, "trans_inputs")
            trans = self._run_branch(trans_inputs, rois)
        else:
            trans = self._to_channels_last(trans, "trans")
        inputs = self._to_channels_last(inputs, "inputs")
        with self._own_words():
            outputs = self._pool(inputs, rois, trans)
        if trans_inputs is not None:
            outputs = self._hand_on_nan(outputs, trans)
        return self._to_data_format(outputs)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "output_dim": self.output_dim,
            "group_size": self.group_size,
            "part_size": self.part_size,
            "sample_per_part": self.sample_per_part,
            "trans_std": self.trans_std,
            "num_classes": self.num_classes,
        }


@_keras.register
class DeformableROIPooling(DisplacedROILayer):
    """Pools a feature map over regions whose bins are displaced.

    Displacements are given, as `offset`, or a branch of the layer predicts them
    from the plain pooling of the same region:

        hidden = relu(dense(... flatten(pool(inputs, rois)) ...))    units
        offset = hidden @ offset_kernel + offset_bias
        outputs = pool(inputs, rois, offset)

    The last matrix starts at zero, so that a new layer pools plainly. `pool` is
    `tf_deform.ops.deformable_psroi_pool` with `group_size=1`: regions are
    rounded to pixels, and samples lie at the start of each sub-bin.

    A NaN that the branch predicts is handed on to the outputs of its bin: the
    op alone would treat it as outside of the map and hide it. Padding regions
    stay 0 in any case. For given displacements the op's rule holds.

    Source: Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, Eq. 5 and 6; hidden layers: Zhu et al. 2018, "Deformable
    ConvNets v2", arXiv:1811.11168, section 3.2.

    Weights:
        offset_hidden_kernel_0, offset_hidden_bias_0, ...: one pair for each of
            `units`.
        offset_kernel: `(features, pooled_h * pooled_w * 2)`, ordered
            `[ph][pw][(dy, dx)]`.
        offset_bias: `(pooled_h * pooled_w * 2,)`.

    Only a layer that is not given `offset` has weights.

    Args:
        pooled_size: Integer or (height, width): bins of a region.
        spatial_scale: Map pixels per image pixel.
        sample_per_part: Samples of a bin along each axis.
        trans_std: Factor of the displacements.
        units: Sizes of the branch's hidden layers, none by default.
        data_format: "channels_last" or "channels_first", of `inputs`, `offset`
            and the outputs; None means `keras.config.image_data_format()`. The
            weights are the same in both. "channels_first" costs a transposition
            of each tensor.
        implementation: "native", or "portable" for stock TensorFlow ops; see
            `tf_deform.implementation`.
        kwargs: `name`, `dtype`, `trainable`, and so on.

    Call arguments:
        inputs: `(batch, height, width, channels)`, or `(batch, channels,
            height, width)` for "channels_first"; cast to the compute dtype.
        rois: `(num_rois, 5)`: batch_index, x1, y1, x2, y2, in image pixels,
            the last pixels included; a negative batch index marks padding. Not
            cast to the compute dtype but to float32 (float64 if that is the
            compute dtype). No gradient.
        offset: `(num_rois, pooled_h, pooled_w, 2)`, or `(num_rois, 2,
            pooled_h, pooled_w)` for "channels_first": `(dy, dx)` in fractions
            of the region, times `trans_std`; cast like `rois`. The branch then
            neither runs nor is built.

    Returns:
        `(num_rois, pooled_h, pooled_w, channels)`, or `(num_rois, channels,
        pooled_h, pooled_w)`, in the compute dtype.
        Differentiable with respect to all arguments but `rois`.

    Raises:
        ValueError: Arguments or shapes do not fit.
    """

    _OP_NAMES = {"offset": "trans"}

    def __init__(
        self,
        pooled_size: int | Sequence[int],
        spatial_scale: float,
        sample_per_part: int = 4,
        trans_std: float = 0.1,
        units: Sequence[int] = (),
        data_format: str | None = None,
        implementation: str = "native",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            pooled_size,
            spatial_scale,
            units,
            data_format,
            implementation,
            **kwargs,
        )
        self.sample_per_part = positive(sample_per_part, "sample_per_part")
        self.trans_std = check_factor(trans_std, "trans_std")

    def _pool(
        self, inputs: tf.Tensor, rois: tf.Tensor, offset: tf.Tensor | None
    ) -> tf.Tensor:
        return deformable_psroi_pool(
            inputs,
            rois,
            offset,
            output_dim=self._channels_of(
                self._to_data_format(inputs.shape.as_list()), "inputs"
            ),
            spatial_scale=self.spatial_scale,
            pooled_size=self.pooled_size,
            group_size=1,
            sample_per_part=self.sample_per_part,
            trans_std=self.trans_std,
            implementation=self.implementation,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "sample_per_part": self.sample_per_part,
            "trans_std": self.trans_std,
        }
