# SPDX-License-Identifier: Apache-2.0
"""Models with deformable layers."""

from tf_deform.layers._search import deformable_layers
from tf_deform.models._output_stride import set_output_stride
from tf_deform.models._surgery import Surgery, make_deformable
from tf_deform.models._training import train_only

__all__ = [
    "Surgery",
    "deformable_layers",
    "make_deformable",
    "set_output_stride",
    "train_only",
]
