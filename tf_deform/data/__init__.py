# SPDX-License-Identifier: Apache-2.0
"""Photographs with boxes or masks, in the forms that labelling tools write.

`import tf_deform` does not import this package; it is imported when
`tf_deform.data` is used. Files are read by Pillow, which the extra
`tf-deform[train]` brings.
"""

from tf_deform._squares import tiles
from tf_deform.data._images import read_image, read_mask
from tf_deform.data._pipeline import (
    detection_batches,
    examples_per_epoch,
    segmentation_batches,
)
from tf_deform.data._read import read
from tf_deform.data._records import Annotations, Mask, Photograph
from tf_deform.data._transforms import letterbox

__all__ = [
    "Annotations",
    "Mask",
    "Photograph",
    "detection_batches",
    "examples_per_epoch",
    "letterbox",
    "read",
    "read_image",
    "read_mask",
    "segmentation_batches",
    "tiles",
]
