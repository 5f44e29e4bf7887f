# SPDX-License-Identifier: Apache-2.0
"""Judges masks: the mean overlap of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform._keras import keras


@keras.saving.register_keras_serializable("tf_deform")
class MeanIoU(keras.metrics.Metric):
    """Computes the mean over classes of intersection over union.

        IoU = pixels of the class in both masks / pixels of it in either

    of all masks together, not of each image. It counts in integers of 64 bits:
    sums in float32, as `keras.metrics.MeanIoU` had in Keras 3.5, stand still at
    2^24, the pixels of 64 masks of 512 x 512. A class of no pixel in either
    mask counts in no mean.

    Args:
        num_classes: The number of classes.
        ignore_class: The id of pixels in the true mask that do not count, or
            None.
        sparse_y_pred: Whether predictions are ids, and not a number for each
            class in their last axis, of which the largest is the class.
        name: The name of the log.

    Attributes:
        counts: `(num_classes, num_classes)`, int64: the number of pixels of
            each true class (row) and found class (column).

    Raises:
        InvalidArgumentError: When it counts: an id is no class.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_class: int | None = 255,
        sparse_y_pred: bool = True,
        name: str = "mean_iou",
    ) -> None:
        super().__init__(name=name)
        self._direction = "up"  # Keras asks which way is better.
        self.num_classes = num_classes
        self.ignore_class = ignore_class
        self.sparse_y_pred = sparse_y_pred
        self.counts = self.add_variable(
            (num_classes, num_classes), "zeros", dtype="int64", name="counts"
        )

    def update_state(
        self, y_true: Any, y_pred: Any, sample_weight: Any = None
    ) -> None:
        """Counts the pixels of masks.

        Args:
            y_true: True ids, any shape.
            y_pred: Ids found, as many; or numbers for each class, in one more
                axis. See `sparse_y_pred`.
            sample_weight: None; pixels have no weights.
        """
        if sample_weight is not None:
            raise ValueError(
                "Expected no weights of pixels, whose number is counted. "
                f"Received: {sample_weight!r:.100}"
            )
        if not self.sparse_y_pred:
            y_pred = tf.argmax(y_pred, -1)
        true, found = (
            tf.reshape(tf.cast(ids, tf.int64), [-1]) for ids in (y_true, y_pred)
        )
        valid = tf.ones_like(true)
        if self.ignore_class is not None:
            valid = tf.cast(true != self.ignore_class, tf.int64)
        self.counts.assign_add(
            tf.math.confusion_matrix(
                true * valid,
                found * valid,
                self.num_classes,
                weights=valid,
                dtype=tf.int64,
            )
        )

    def result(self) -> tf.Tensor:
        both, either = self._overlaps()
        present = tf.cast(either > 0, tf.float64)
        mean = tf.math.divide_no_nan(
            tf.reduce_sum(tf.math.divide_no_nan(both, either)),
            tf.reduce_sum(present),
        )
        return tf.cast(mean, tf.float32)

    def per_class(self) -> np.ndarray:
        """Returns the IoU of each class, float64, NaN where there is none."""
        both, either = self._overlaps()
        return (both / either).numpy()  # 0 / 0 is NaN.

    def _overlaps(self) -> tuple[tf.Tensor, tf.Tensor]:
        counts = tf.cast(tf.convert_to_tensor(self.counts), tf.float64)
        both = tf.linalg.diag_part(counts)
        return both, tf.reduce_sum(counts, 0) + tf.reduce_sum(counts, 1) - both

    def get_config(self) -> dict[str, Any]:
        return {
            "num_classes": self.num_classes,
            "ignore_class": self.ignore_class,
            "sparse_y_pred": self.sparse_y_pred,
            "name": self.name,
        }
