# SPDX-License-Identifier: Apache-2.0
"""Moves a photograph, its boxes and its mask by one and the same rule.

Boxes are x1, y1, x2, y2 in pixels with half-open edges: the pixel in row `y`
and column `x` fills the square from `(x, y)` to `(x + 1, y + 1)`. So a box that
spans columns 3 to 5 has x1 = 3 and x2 = 6, and needs no "one pixel more" in any
of these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from tf_deform import _squares

PADDING = -1  # The label of rows that hold no object, and all of their box.


class Example(NamedTuple):
    """Holds a photograph, or a part of one, and what is known about it."""

    image: tf.Tensor  # (height, width, 3) uint8 or float32, 0 to 255
    boxes: tf.Tensor  # (n, 4) float32
    labels: tf.Tensor  # (n,) int32
    mask: tf.Tensor | None = None  # (height, width, 1) int32


def letterbox(
    image: tf.Tensor | np.ndarray, size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Fits an image into a square, at the top left.

    The longer side becomes `size` pixels. Pixels are interpolated linearly, and
    averaged where the image shrinks (`tf.image.resize(antialias=True)`); an
    image whose longer side is `size` already is not changed by a bit. The rest
    of the square is gray (114).

    Args:
        image: `(height, width, channels)`, 0 to 255, uint8 or a float type.
        size: height and width of the square in pixels.

    Returns:
        `(size, size, channels)` float32; and by how much it is larger than the
        image, `(4,)` float32 for x, y, x, y: sides are whole pixels, so that x
        and y may differ slightly. `boxes / scale` are boxes in the image's own
        pixels.
    """
    image = tf.convert_to_tensor(image)
    full = tf.shape(image)[:2]
    square, inner = _squares.place(image, tf.reduce_max(full), size)
    return square, _four(inner) / _four(full)


def crop(
    example: Example, origin: tf.Tensor, shape: tf.Tensor, min_visible: float
) -> Example:
    """Cuts a part out of a photograph.

    Boxes are clipped to the part. An object of which less than a share of its
    area is left is dropped, and so is a box without area.

    Args:
        example: photograph with its objects.
        origin: `(2,)` int32, y and x of the part's top left corner.
        shape: `(2,)` int32, height and width of the part, which lies within the
            photograph.
        min_visible: smallest share of its box by which an object is kept.
    """

    def cut(pixels: tf.Tensor) -> tf.Tensor:
        end = tf.add(origin, shape)
        return pixels[origin[0] : end[0], origin[1] : end[1]]

    def area(boxes: tf.Tensor) -> tf.Tensor:
        sides = tf.maximum(boxes[:, 2:] - boxes[:, :2], 0.0)
        return tf.reduce_prod(sides, axis=1)

    boxes = example.boxes - _four(origin)
    clipped = tf.clip_by_value(boxes, 0.0, _four(shape))
    left = area(clipped)
    kept = (left > 0.0) & (left >= min_visible * area(boxes))
    return Example(
        cut(example.image),
        tf.boolean_mask(clipped, kept),
        tf.boolean_mask(example.labels, kept),
        None if example.mask is None else cut(example.mask),
    )


def resize(example: Example, shape: tf.Tensor) -> Example:
    """Changes the size, and the image's type to float32.

    The image is interpolated linearly, and averaged where it shrinks. Each
    pixel of the mask takes the id of the nearest one, so that no new ids come
    up. Nothing changes by a bit if the size stays.

    Args:
        example: photograph with its objects.
        shape: `(2,)` int32, the new height and width.
    """
    old = tf.shape(example.image)[:2]
    same = tf.reduce_all(old == shape)
    return Example(
        _squares.resize(example.image, shape),
        example.boxes * (_four(shape) / _four(old)),
        example.labels,
        _apply(
            ~same,
            lambda mask: tf.image.resize(mask, shape, method="nearest"),
            example.mask,
        ),
    )


def flip(
    example: Example,
    left_right: tf.Tensor | bool = False,
    up_down: tf.Tensor | bool = False,
    transpose: tf.Tensor | bool = False,
) -> Example:
    """Mirrors: left and right, then up and down, then at the diagonal.

    The eight combinations are the eight ways in which a square piece of paper
    can be laid. `transpose` swaps rows and columns, and with them height and
    width.
    """

    def flip_boxes(axis: int, boxes: tf.Tensor) -> tf.Tensor:
        extent = tf.cast(tf.shape(example.image)[axis], "float32")
        x1, y1, x2, y2 = tf.unstack(boxes, axis=1)
        if axis:
            x1, x2 = extent - x2, extent - x1
        else:
            y1, y2 = extent - y2, extent - y1
        return tf.stack([x1, y1, x2, y2], axis=1)

    image, boxes, labels, mask = example
    for axis, chosen in ((1, left_right), (0, up_down)):
        image, mask = (
            _apply(chosen, lambda x, axis=axis: tf.reverse(x, [axis]), pixels)
            for pixels in (image, mask)
        )
        boxes = tf.where(chosen, flip_boxes(axis, boxes), boxes)
    image, mask = (
        _apply(transpose, lambda x: tf.transpose(x, (1, 0, 2)), pixels)
        for pixels in (image, mask)
    )
    swapped = tf.gather(boxes, (1, 0, 3, 2), axis=1)
    return Example(image, tf.where(transpose, swapped, boxes), labels, mask)


def recolour(example: Example, numbers: tf.Tensor, strength: float) -> Example:
    """Changes brightness, contrast, saturation and hue of the image.

    Args:
        example: photograph with its objects.
        numbers: `(4,)` float32 from -1 to 1: how much of each of the four.
        strength: at 1, brightness changes by up to 128 of 255, contrast and
            saturation are multiplied by 0 to 2, and the hue turns by up to a
            tenth of the circle.
    """
    brightness, contrast, saturation, hue = tf.unstack(strength * numbers)
    image = tf.image.adjust_brightness(example.image, 128.0 * brightness)
    image = tf.image.adjust_contrast(image, 1.0 + contrast)
    # These two know colours from 0 to 255 only.
    image = tf.clip_by_value(image, 0.0, 255.0)
    image = tf.image.adjust_saturation(image, 1.0 + saturation)
    image = tf.image.adjust_hue(image, 0.1 * hue)
    return example._replace(image=tf.clip_by_value(image, 0.0, 255.0))


def pad(example: Example, size: int) -> Example:
    """Fills up to a square at the right and at the bottom.

    The image is filled with gray (114), the mask with the void id (255).
    """
    mask = example.mask
    if mask is not None:
        mask = _squares.pad(mask, size, _squares.VOID)
    image = _squares.pad(example.image, size, _squares.GRAY)
    return example._replace(image=image, mask=mask)


def pad_objects(example: Example, count: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `(count, 4)` boxes and `(count,)` labels, filled up with -1."""
    missing = count - tf.shape(example.labels)[0]
    boxes = tf.pad(
        example.boxes, [[0, missing], [0, 0]], constant_values=PADDING
    )
    labels = tf.pad(example.labels, [[0, missing]], constant_values=PADDING)
    return tf.ensure_shape(boxes, (count, 4)), tf.ensure_shape(labels, (count,))


def _four(pair: tf.Tensor) -> tf.Tensor:
    """Returns x, y, x, y as float32 for a pair y, x."""
    return tf.cast(tf.gather(pair, (1, 0, 1, 0)), "float32")


def _apply(
    chosen: tf.Tensor | bool,
    function: Callable[[tf.Tensor], tf.Tensor],
    pixels: tf.Tensor | None,
) -> tf.Tensor | None:
    """Returns `function(pixels)` where it is chosen; None stays None."""
    if pixels is None:
        return None
    return tf.cond(
        tf.convert_to_tensor(chosen), lambda: function(pixels), lambda: pixels
    )
