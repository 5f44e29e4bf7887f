# SPDX-License-Identifier: Apache-2.0
"""Keras layers, of Keras 2 or 3, as TensorFlow's `tf.keras` is."""

from tf_deform.layers.deformable_conv2d import DeformableConv2D
from tf_deform.layers.deformable_psroi_pool import (
    DeformablePSROIPooling,
    DeformableROIPooling,
)
from tf_deform.layers.deformable_roi_align import DeformableROIAlign

__all__ = [
    "DeformableConv2D",
    "DeformablePSROIPooling",
    "DeformableROIAlign",
    "DeformableROIPooling",
]
