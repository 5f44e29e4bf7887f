# SPDX-License-Identifier: Apache-2.0
"""Implements deformable ROIAlign as a Keras layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from tf_deform import _keras
from tf_deform.layers._roi_layer import DisplacedROILayer, check_factor
from tf_deform.ops._arguments import MAX_EXTENT, bounded, option
from tf_deform.ops.deformable_roi_align import deformable_roi_align


@_keras.register
class DeformableROIAlign(DisplacedROILayer):
    """Pools a feature map by ROIAlign whose bins are displaced.

    Displacements are given, as `offset`, or a branch of the layer predicts them
    from the ROIAlign of the same region:

        hidden = relu(dense(... flatten(align(inputs, rois)) ...))    units
        offset = hidden @ offset_kernel + offset_bias
        outputs = align(inputs, rois, offset)

    The last matrix starts at zero, so that a new layer is ROIAlign. With
    `modulation="sigmoid"` a second branch, of one hidden layer less, multiplies
    the bins:

        outputs *= sigmoid(
            hidden @ offset_modulator_kernel + offset_modulator_bias
        )

    It starts at zero too, so that a new layer is half of ROIAlign. `align` is
    `tf_deform.ops.deformable_roi_align`: regions are not rounded, and samples
    lie at the centre of each sub-bin.

    A NaN that the branch predicts is handed on to the outputs of its bin: the
    op alone would treat it as outside of the map and hide it. Padding regions
    stay 0 in any case. For given displacements the op's rule holds.

    Source: He et al. 2017, "Mask R-CNN", arXiv:1703.06870, section 3;
    displacements: Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, Eq. 6; hidden layers and modulation: Zhu et al. 2018,
    "Deformable ConvNets v2", arXiv:1811.11168, section 3.2; a branch of its own
    for modulation: mmcv's ModulatedDeformRoIPoolPack.

    Weights:
        offset_hidden_kernel_0, offset_hidden_bias_0, ...: one pair for each of
            `units`.
        offset_kernel: `(features, pooled_h * pooled_w * 2)`, ordered
            `[ph][pw][(dy, dx)]`.
        offset_bias: `(pooled_h * pooled_w * 2,)`.
        offset_modulator_hidden_kernel_0, ...: one pair for each of `units` but
            the last; these and the next two with `modulation` alone.
        offset_modulator_kernel: `(features, pooled_h * pooled_w)`, ordered
            `[ph][pw]`.
        offset_modulator_bias: `(pooled_h * pooled_w,)`.

    Only a layer that is not given `offset` has weights.

    Args:
        pooled_size: Integer or (height, width): bins of a region.
        spatial_scale: Map pixels per image pixel.
        sampling_ratio: Samples of a bin along each axis; 0 or less: the number
            depends on the size of the region.
        gamma: Factor of the displacements.
        units: Sizes of the branch's hidden layers, none by default.
        modulation: None, or "sigmoid" for factors of the bins.
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
        rois: `(num_rois, 5)`: batch_index, x1, y1, x2, y2, in image pixels; a
            negative batch index marks padding. Not cast to the compute dtype
            but to float32 (float64 if that is the compute dtype). No gradient.
        offset: `(num_rois, pooled_h, pooled_w, 2)`, or `(num_rois, 2,
            pooled_h, pooled_w)` for "channels_first": `(dy, dx)` in fractions
            of the region, times `gamma`; cast like `rois`. No branch then
            runs or is built, and nothing is modulated.

    Returns:
        `(num_rois, pooled_h, pooled_w, channels)`, or `(num_rois, channels,
        pooled_h, pooled_w)`, in the compute dtype.
        Differentiable with respect to all arguments but `rois`.

    Raises:
        ValueError: Arguments or shapes do not fit.
    """

    def __init__(
        self,
        pooled_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        units: Sequence[int] = (),
        modulation: str | None = None,
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
        self.sampling_ratio = bounded(
            sampling_ratio, "sampling_ratio", -MAX_EXTENT
        )
        self.gamma = check_factor(gamma, "gamma")
        self.modulation = option(modulation, "modulation", (None, "sigmoid"))

    def _pool(
        self, inputs: tf.Tensor, rois: tf.Tensor, offset: tf.Tensor | None
    ) -> tf.Tensor:
        return deformable_roi_align(
            inputs,
            rois,
            offset,
            pooled_size=self.pooled_size,
            spatial_scale=self.spatial_scale,
            sampling_ratio=self.sampling_ratio,
            gamma=self.gamma,
            implementation=self.implementation,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "sampling_ratio": self.sampling_ratio,
            "gamma": self.gamma,
            "modulation": self.modulation,
        }
