# SPDX-License-Identifier: Apache-2.0
"""Contains functional ops, differentiable in eager mode and in graphs."""

from tf_deform.ops.deformable_conv2d import deformable_conv2d
from tf_deform.ops.deformable_psroi_pool import deformable_psroi_pool
from tf_deform.ops.deformable_roi_align import deformable_roi_align

__all__ = [
    "deformable_conv2d",
    "deformable_psroi_pool",
    "deformable_roi_align",
]
