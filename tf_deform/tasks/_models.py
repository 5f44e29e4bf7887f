# SPDX-License-Identifier: Apache-2.0
"""Loads trained models, and applies them to photographs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tf_deform import _squares, data, models, training
from tf_deform._keras import keras
from tf_deform._squares import VOID

LOGGER = logging.getLogger("tf_deform")


def is_detector(model: keras.Model) -> bool:
    """Tells whether a model finds boxes; else it is a segmenter."""
    return isinstance(model, (models.FasterRCNN, models.RFCN))


def load(
    path: str, max_detections: int | None = None, tile: int | None = None
) -> keras.Model:
    """Loads a model that `train_detector` or `train_segmenter` has saved.

    Args:
        path: The file.
        max_detections: The most boxes of an image; None: the model's own.
        tile: Pixels of the tiles that it sees; None: the model's own.

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
        set_max_detections(model, max_detections)
    if tile is not None:
        model.tile = tile
    return model


def set_max_detections(model: keras.Model, count: int) -> None:
    """Lets a detector find so many objects, of one class, too.

    A region is one object of each class at most.
    """
    model.max_detections = count
    model.proposals = max(model.proposals, count)


def class_names(model: keras.Model) -> tuple[str, ...]:
    """Returns the names of a model's classes, numbers if it has none."""
    return tuple(
        model.class_names or (str(i) for i in range(model.num_classes))
    )


def first(
    found: Iterable[tuple[int, Any]], count: int, kept: list[tuple[int, Any]]
) -> Iterator[tuple[int, Any]]:
    """Yields predictions, of which the first ones are appended to a list.

    All masks of large photographs would take gigabytes.
    """
    for index, item in enumerate(found):
        if index < count:
            kept.append(item)
        yield item


def view(
    model: keras.Model, image: np.ndarray, point: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns what a model sees of a photograph: all, or a tile of it.

    Args:
        model: The model.
        image: `(height, width, 3)` uint8.
        point: y and x in pixels, the middle of the tile if there is room.

    Returns:
        `(image_size, image_size, 3)` float32; and the point in it.
    """
    extent = np.array(image.shape[:2])
    tile = model.tile or int(extent.max())
    y, x = np.clip(point - tile / 2, 0, np.maximum(extent - tile, 0)).astype(
        int
    )
    part = image[y : y + tile, x : x + tile]
    square, inner = _squares.place(part, tile, model.image_size)
    return np.asarray(square), (point - (y, x)) * np.divide(
        inner, part.shape[:2]
    )


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
