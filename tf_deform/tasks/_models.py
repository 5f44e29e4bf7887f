# SPDX-License-Identifier: Apache-2.0
"""Loads trained models, and applies them to photographs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tf_deform import data, models, training
from tf_deform._keras import keras
from tf_deform._squares import VOID

LOGGER = logging.getLogger("tf_deform")


def is_detector(model: keras.Model) -> bool:
    """Tells whether a model finds boxes; else it is a segmenter."""
    return isinstance(model, (models.FasterRCNN, models.RFCN))


def load(path: str, max_detections: int | None = None) -> keras.Model:
    """Loads a model that `train_detector` or `train_segmenter` has saved.

    Args:
        path: The file.
        max_detections: The most boxes of an image; None: the model's own.

    Raises:
        ValueError: The file has another model, or none.
    """
    try:
        model = keras.saving.load_model(path, compile=False)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(
            f"Expected {path} to be a model of Keras 3. Received: {error}"
        ) from error
    if not hasattr(model, "predict_image"):
        raise ValueError(
            f"Expected {path} to be a FasterRCNN, RFCN or Segmenter. Received: "
            f"a {type(model).__name__}"
        )
    if max_detections is not None and is_detector(model):
        model.max_detections = max_detections
    return model


def class_names(model: keras.Model) -> tuple[str, ...]:
    """Returns the names of a model's classes, numbers if it has none."""
    return tuple(
        model.class_names or (str(i) for i in range(model.num_classes))
    )


def predict(
    model: keras.Model, photographs: Iterable[Any], tile: int | None
) -> Iterator[tuple[int, Any]]:
    """Yields ids of photographs, from 1, and what the model finds in each."""
    for number, photograph in enumerate(photographs, start=1):
        image = data.read_image(photograph.path)
        yield number, model.predict_image(image, tile=tile)


class Judge:
    """Judges a model on annotated photographs.

    Args:
        annotations: The photographs; classes are the model's.
        detector: Whether the model is a detector.
        max_detections: Of a detector: the most boxes of an image.
    """

    def __init__(
        self,
        annotations: Any,
        detector: bool,
        max_detections: int | None = None,
    ) -> None:
        self._annotations = annotations
        self.monitor = "AP" if detector else "mIoU"
        self.evaluator = None
        if detector:
            self.evaluator = training.CocoEvaluator(
                annotations.to_coco(), max_detections=max_detections
            )

    def evaluate(self, found: Iterable[tuple[int, Any]]) -> dict[str, float]:
        """Returns the measures of predictions, by name."""
        if self.evaluator is not None:
            return self.evaluator.evaluate(found)
        classes = self._annotations.classes
        metric = training.MeanIoU(len(classes), ignore_class=VOID)
        correct = total = 0
        for number, ids in found:
            truth = self._truth(number)
            metric.update_state(truth, ids)
            seen = truth != VOID
            correct += int(np.sum((truth == ids) & seen))
            total += int(np.sum(seen))
        return {
            "mIoU": float(metric.result()),
            "accuracy": correct / max(total, 1),
            **{
                f"IoU/{name}": float(value)
                for name, value in zip(classes, metric.per_class())
            },
        }

    def _truth(self, number: int) -> np.ndarray:
        photograph = self._annotations.photographs[number - 1]
        return data.read_mask(photograph.mask)[..., 0]
