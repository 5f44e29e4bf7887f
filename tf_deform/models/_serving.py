# SPDX-License-Identifier: Apache-2.0
"""Detects objects in photographs of any size, and serves detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _image_files, _squares, data

_BATCH = 4  # tiles that go through the model together
# A box that its tile cuts is dropped if a box of another tile covers this share
# of it.
_COVERED = 0.5


def cut(
    image: np.ndarray, tile: int | None, overlap: float
) -> tuple[np.ndarray, int, list[tuple[int, int]]]:
    """Cuts a photograph into tiles.

    Args:
        image, tile, overlap: As in `Detector.predict_image`.

    Returns:
        The photograph; pixels of a tile; y and x of the tiles' corners.

    Raises:
        ValueError: An argument is something else.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            "Expected `image` to be (height, width, 3) uint8. Received: "
            f"{image.shape} {image.dtype}"
        )
    if min(image.shape) < 1:
        raise ValueError(
            f"Expected `image` to have pixels. Received: {image.shape}"
        )
    if tile is not None and (tile < 1 or not 0 <= overlap < 1):
        raise ValueError(
            "Expected `tile` of at least 1 pixel, and 0 <= overlap < 1. "
            f"Received: tile={tile}, overlap={overlap}"
        )
    height, width = image.shape[:2]
    if tile is None:
        return image, max(height, width), [(0, 0)]
    return image, tile, _squares.tiles(height, width, tile, overlap)


def predictions(
    model: Any, photographs: Iterable[Any], tile: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields what a model finds in photographs, one after the other.

        evaluator = tf_deform.training.CocoEvaluator(val.to_coco())
        found = tf_deform.models.predictions(model, val.photographs)
        metrics = evaluator.evaluate(found)

    Args:
        model: A `FasterRCNN`, `RFCN` or `Segmenter`.
        photographs: The `photographs` of `tf_deform.data.Annotations`.
        tile: As in the model's `predict_image`.

    Returns:
        An iterator of pairs: the number of the photograph, counted from 1,
        which is its id in `Annotations.to_coco`, and what `predict_image`
        returns.

    Raises:
        OSError, ValueError: A file cannot be read.
    """
    for number, photograph in enumerate(photographs, start=1):
        image = data.read_image(photograph.path)
        yield number, model.predict_image(image, tile=tile)


def predict_image(
    model: Any, image: np.ndarray, tile: int | None, overlap: float
) -> dict[str, np.ndarray]:
    """Computes `Detector.predict_image`."""
    image, side, origins = cut(image, tile, overlap)
    height, width = image.shape[:2]
    found = []
    for first in range(0, len(origins), _BATCH):
        some = origins[first : first + _BATCH]
        # All batches have one size, for which the model is traced.
        some += some[-1:] * (min(_BATCH, len(origins)) - len(some))
        parts = [image[y : y + side, x : x + side] for y, x in some]
        images, inner = zip(
            *(_squares.place(x, side, model.image_size) for x in parts)
        )
        outputs = model.detect(np.stack(images))
        for index, (y, x) in enumerate(origins[first : first + _BATCH]):
            count = int(outputs["valid"][index])
            rows = {
                name: value[index, :count]
                for name, value in outputs.items()
                if name != "valid"
            }
            shape = parts[index].shape[:2]
            scale = np.divide(inner[index], shape)
            rows = _place(rows, (y, x), shape, scale, (height, width))
            # Boxes of the filling have no pixel of the photograph.
            real = (rows["boxes"][:, :2] < rows["boxes"][:, 2:]).all(-1)
            found.append({name: value[real] for name, value in rows.items()})
    rows = {
        name: np.concatenate([part[name] for part in found])
        for name in found[0]
    }
    rows["tile"] = np.repeat(
        range(len(found)), [len(part["scores"]) for part in found]
    )
    kept = _merge(rows, model.max_overlap)
    return {name: rows[name][kept] for name in ("boxes", "scores", "labels")}


def _place(
    rows: dict[str, np.ndarray],
    origin: tuple[int, int],
    shape: tuple[int, int],
    scale: np.ndarray,
    size: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Moves the boxes of a tile to their place in the photograph.

    Args:
        rows: What the model finds.
        origin, shape: y and x, height and width of the tile in the photograph.
        scale: Pixels that the model sees for one of the photograph, down and
            across.
        size: Height and width of the photograph.

    Returns:
        The rows, and "cut": whether a box ends at the border of the tile, to a
        pixel, where the photograph goes on.
    """
    scale, origin, shape, size = (
        np.array(pair)[[1, 0]] for pair in (scale, origin, shape, size)
    )
    boxes = rows["boxes"] / np.tile(scale, 2)
    boxes = np.minimum(boxes, np.tile(shape, 2))
    near = 1 / scale + 1e-3
    cut = (boxes[:, :2] < near) & (origin > 0)
    cut |= (shape - boxes[:, 2:] < near) & (origin + shape < size)
    boxes = (boxes + np.tile(origin, 2)).astype("float32")
    return {**rows, "boxes": boxes, "cut": cut.any(-1)}


def _merge(rows: dict[str, np.ndarray], max_overlap: float) -> np.ndarray:
    """Returns which boxes of tiles stay, so that each object is there once.

    A box that overlaps a better one of its class by more than `max_overlap`
    goes, as within one tile. A box that its tile cuts may be a part of an
    object: all others are better, and it also goes if a box of another tile
    covers half of it.
    """
    boxes, scores, labels, tile, cut = (
        rows[name] for name in ("boxes", "scores", "labels", "tile", "cut")
    )
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    kept = np.zeros(0, int)
    for index in np.lexsort((-scores, cut)):
        low = np.maximum(boxes[kept, :2], boxes[index, :2])
        high = np.minimum(boxes[kept, 2:], boxes[index, 2:])
        common = np.maximum(high - low, 0).prod(-1)
        goes = common > max_overlap * (area[index] + area[kept] - common)
        if cut[index]:
            covered = common > _COVERED * area[index]
            goes |= covered & (tile[kept] != tile[index])
        if not np.any(goes & (labels[kept] == labels[index])):
            kept = np.append(kept, index)
    return kept[np.argsort(-scores[kept], kind="stable")]


def serving(model: Any) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Returns a function from files of images to what a model finds in them.

        archive = keras.export.ExportArchive()
        archive.track(model)
        archive.add_endpoint("serve", tf_deform.models.serving(model))
        archive.write_out("served")

    Args:
        model: A `FasterRCNN`, `RFCN` or `Segmenter`.

    Returns:
        A `tf.function` of `(batch,)` strings, each a JPEG or PNG file of any
        size, gray or in colour; JPEG files are turned as EXIF's orientation
        says. It returns, padded to the same number for each image,

        - "boxes": `(batch, n, 4)` float32, x1, y1, x2, y2 in pixels of the
          given image, and -1 beyond the last one;
        - "scores": `(batch, n)` float32, the best first, and 0;
        - "labels": `(batch, n)` int32, from 0, and -1;
        - "names": `(batch, n)` strings, the model's `class_names`, or the ids
          if it has none, and "";
        - "valid": `(batch,)` int32, how many of the `n` are detections.

        For a segmenter, padded to the height and width of the largest image,

        - "ids": `(batch, height, width)` int32, the classes of the given
          image's pixels, and -1 beyond them;
        - "sizes": `(batch, 2)` int32, height and width of each image.

    Raises:
        TypeError: `model` is none of these.
    """
    if hasattr(model, "_server"):
        return model._server()
    if not hasattr(model, "predict_image") or not hasattr(model, "anchors"):
        raise TypeError(
            "Expected `model` to be a FasterRCNN, RFCN or Segmenter. Received: "
            f"{model!r:.200}"
        )
    size = model.image_size
    names = model.class_names or map(str, range(model.num_classes))
    names = tf.constant([*names, ""])

    def read(data: tf.Tensor) -> tuple[tf.Tensor, ...]:
        pixels = _image_files.decode(data, channels=3)
        full = tf.shape(pixels)[:2]
        return (*_squares.place(pixels, tf.reduce_max(full), size), full)

    def serve(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        images, inner, full = tf.map_fn(
            read,
            image_bytes,
            fn_output_signature=(
                tf.TensorSpec((size, size, 3), "float32"),
                tf.TensorSpec((2,), "int32"),
                tf.TensorSpec((2,), "int32"),
            ),
        )
        # Detects in a blank image where there is no image: TensorFlow's
        # convolutions return a wrong shape for an empty batch.
        count = tf.shape(images)[0]
        blank = tf.cast(count == 0, "int32")
        images = tf.pad(images, ((0, blank), (0, 0), (0, 0), (0, 0)))
        found = model(images, training=False)
        found = {name: value[:count] for name, value in found.items()}
        inner, limits = (
            tf.tile(tf.cast(x[:, ::-1], "float32"), (1, 2))[:, None]
            for x in (inner, full)
        )
        boxes = tf.minimum(found["boxes"] * (limits / inner), limits)
        # Boxes of the filling have no pixel of the image: the others go first.
        real = tf.reduce_all(boxes[..., :2] < boxes[..., 2:], -1)
        real &= found["labels"] >= 0
        order = tf.argsort(tf.cast(~real, "int32"), -1, stable=True)
        real, boxes, scores, labels = (
            tf.gather(x, order, batch_dims=1)
            for x in (real, boxes, found["scores"], found["labels"])
        )
        labels = tf.where(real, labels, -1)
        ids = tf.where(real, labels, model.num_classes)
        return {
            "boxes": tf.where(real[..., None], boxes, -1.0),
            "scores": tf.where(real, scores, 0.0),
            "labels": labels,
            "names": tf.gather(names, ids),
            "valid": tf.reduce_sum(tf.cast(real, "int32"), -1),
        }

    serve.min_score = model.min_score  # Exports know it of a model itself.
    return tf.function(
        serve,
        input_signature=[tf.TensorSpec((None,), "string", name="image_bytes")],
    )
