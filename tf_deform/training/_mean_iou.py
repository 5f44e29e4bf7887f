# SPDX-License-Identifier: Apache-2.0
"""Judges masks: the mean overlap of classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from tf_deform._keras import keras


@keras.saving.register_keras_serializable("tf_deform")
class MeanIoU(keras.metrics.MeanIoU):
    """Computes the mean over classes of intersection over union.

        IoU = pixels of the class in both masks / pixels of it in either

    of all masks together, not of each image. Keras' own metric, which counts
    pixels in integers of 64 bits whatever the default type: sums in float32
    stand still at 2^24, the pixels of 64 masks of 512 x 512. A class of no
    pixel in either mask counts in no mean.

    Args:
        num_classes: The number of classes.
        ignore_class: The id of pixels in the true mask that do not count, or
            None.
        sparse_y_pred: Whether predictions are ids, and not a number for each
            class in their last axis, of which the largest is the class.
        name: The name of the log.

    Raises:
        ValueError: Keras says what is wrong.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_class: int | None = 255,
        sparse_y_pred: bool = True,
        name: str = "mean_iou",
    ) -> None:
        super().__init__(
            num_classes,
            name=name,
            dtype="int64",
            ignore_class=ignore_class,
            sparse_y_pred=sparse_y_pred,
        )

    def per_class(self) -> np.ndarray:
        """Returns the IoU of each class, float64, NaN where there is none."""
        counts = self.total_cm.numpy().astype(np.float64)
        both = np.diag(counts)
        either = counts.sum(0) + counts.sum(1) - both
        with np.errstate(invalid="ignore"):
            return both / either

    def get_config(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "ignore_class": self.ignore_class,
            "sparse_y_pred": self.sparse_y_pred,
            "name": self.name,
        }
