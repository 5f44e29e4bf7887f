# SPDX-License-Identifier: Apache-2.0
"""Packs a detector for serving: bytes of images in, boxes in pixels out."""

import pathlib
from collections.abc import Callable

import keras
import tensorflow as tf
from detection import detector

from tf_deform import _files


def fit_image(data: tf.Tensor, size: int) -> tuple[tf.Tensor, ...]:
    """Decodes an image and fits it into a square, at the top left.

    Args:
        data: scalar string, a JPEG or PNG file of any size, gray or in colour.
        size: height and width of the square in pixels.

    Returns:
        `(size, size, 1)` uint8 gray values, 0 where the image does not reach;
        `(2,)` float32 height and width of the image, and of its copy in the
        square.
    """
    # All formats decode to three channels; gray images lose nothing.
    pixels = tf.io.decode_image(data, channels=3, expand_animations=False)
    pixels = tf.image.rgb_to_grayscale(tf.ensure_shape(pixels, (None, None, 3)))
    full = tf.cast(tf.shape(pixels)[:2], "float32")
    inner = tf.maximum(tf.round(full * size / tf.reduce_max(full)), 1.0)
    pixels = tf.image.resize(pixels, tf.cast(inner, "int32"), antialias=True)
    pixels = tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), "uint8")
    pixels = tf.image.pad_to_bounding_box(pixels, 0, 0, size, size)
    return tf.ensure_shape(pixels, (size, size, 1)), full, inner


def make_server(
    model: detector.Detector, categories: list[dict]
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """Returns the function that serves the model.

    Args:
        model: trained model.
        categories: the `"categories"` of the COCO file that it learned from.

    Returns:
        A function of a `(batch,)` string tensor of JPEG or PNG files, each of
        any size. It returns, padded with 0 and "" to the same number for each
        image,

        - "boxes": `(batch, n, 4)` float32, x1, y1, x2, y2 in pixels of the
          given image;
        - "scores": `(batch, n)` float32, the best first;
        - "class_ids": `(batch, n)` int32, ids of COCO categories;
        - "labels": `(batch, n)` string, their names;
        - "valid": `(batch,)` int32, the number of detections among the `n`.

    Raises:
        ValueError: if the model takes images of any size, so that there is no
            size to fit images into.
    """
    if model.image_size is None:
        raise ValueError(
            "Expected a model with a fixed `image_size` to serve. Received: "
            "image_size=None"
        )
    categories = sorted(categories, key=lambda item: item["id"])
    ids = [0, *(item["id"] for item in categories)]
    names = ["", *(item["name"] for item in categories)]
    size = model.image_size

    def serve(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        images, full, inner = tf.map_fn(
            lambda data: fit_image(data, size),
            image_bytes,
            fn_output_signature=(
                tf.TensorSpec((size, size, 1), "uint8"),
                tf.TensorSpec((2,), "float32"),
                tf.TensorSpec((2,), "float32"),
            ),
        )
        # Detects in a blank image where there is no image: TensorFlow's
        # convolutions return a wrong shape for an empty batch.
        count = tf.shape(images)[0]
        blank = tf.cast(count == 0, "int32")
        found = model.detect(
            tf.pad(images, ((0, blank), (0, 0), (0, 0), (0, 0)))
        )
        found = {name: value[:count] for name, value in found.items()}
        scale = tf.tile(tf.reverse(full / inner, (-1,)), (1, 2))
        limits = tf.tile(tf.reverse(full, (-1,)), (1, 2))
        boxes = tf.minimum(found["boxes"] * scale[:, None], limits[:, None])
        return {
            "boxes": boxes,
            "scores": found["scores"],
            "class_ids": tf.gather(ids, found["labels"]),
            "labels": tf.gather(names, found["labels"]),
            "valid": found["valid"],
        }

    return tf.function(
        serve,
        input_signature=[tf.TensorSpec((None,), "string", name="image_bytes")],
    )


def export(
    model: detector.Detector, categories: list[dict], folder: pathlib.Path
) -> None:
    """Writes a SavedModel with the endpoint "serve", see `make_server`.

    Args:
        model: trained model.
        categories: the `"categories"` of the COCO file that it learned from.
        folder: folder to write; an existing SavedModel is replaced.
    """
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", make_server(model, categories))
    with _files.writing(folder, "saved_model.pb") as partial:
        archive.write_out(partial, verbose=False)
