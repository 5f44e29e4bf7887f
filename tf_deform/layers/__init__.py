# SPDX-License-Identifier: Apache-2.0
"""Keras layers."""

from tf_deform.layers.deformable_conv2d import DeformableConv2D

__all__ = ["DeformableConv2D"]
