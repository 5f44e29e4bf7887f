# SPDX-License-Identifier: Apache-2.0
"""Photographs with boxes and masks, for training."""

from tf_deform.data._pipeline import (
    detection_batches,
    examples_per_epoch,
    segmentation_batches,
)
from tf_deform.data._tiles import tiles
from tf_deform.data._transforms import letterbox

__all__ = [
    "detection_batches",
    "examples_per_epoch",
    "letterbox",
    "segmentation_batches",
    "tiles",
]
