# SPDX-License-Identifier: Apache-2.0
"""Functional ops, differentiable in eager mode and in graphs."""

from tf_deform.ops.deformable_conv2d import deformable_conv2d

__all__ = ["deformable_conv2d"]
