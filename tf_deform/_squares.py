# SPDX-License-Identifier: Apache-2.0
"""Places photographs, and tiles of them, in the squares that models see.

Training, prediction and served models all use these functions, so that a model
sees a photograph in the same way in each of them.
"""

from __future__ import annotations

import math

import tensorflow as tf

VOID = 255  # The id of mask pixels that belong to no class.
GRAY = 114  # The value of image pixels where a photograph does not reach.


def fit(extent: tf.Tensor | int, side: tf.Tensor | int, size: int) -> tf.Tensor:
    """Returns `extent * size / side` in whole pixels, from 1 to `size`.

    Args:
        extent: int32, heights or widths of at most `side` pixels.
        side: pixels that become `size` pixels.
        size: pixels.

    Returns:
        int32 in the shape of `extent`. Halves are rounded up, in integers, so
        that training and prediction agree on every machine.
    """
    extent, side = (tf.cast(value, "int64") for value in (extent, side))
    pixels = (2 * extent * size + side) // (2 * side)
    return tf.cast(tf.clip_by_value(pixels, 1, size), "int32")


def resize(image: tf.Tensor, shape: tf.Tensor) -> tf.Tensor:
    """Changes an image's size, and its type to float32.

    Pixels are interpolated linearly, and averaged where the image shrinks; none
    changes by a bit if the size stays.

    Args:
        image: `(height, width, channels)`.
        shape: `(2,)` int32, the new height and width.
    """
    same = tf.reduce_all(tf.shape(image)[:2] == shape)
    image = tf.cast(image, "float32")
    return tf.cond(
        same,
        lambda: image,
        lambda: tf.image.resize(image, shape, antialias=True),
    )


def pad(pixels: tf.Tensor, size: int, value: int) -> tf.Tensor:
    """Fills up to `(size, size, channels)`, at the right and at the bottom."""
    missing = size - tf.shape(pixels)[:2]
    margins = [[0, missing[0]], [0, missing[1]], [0, 0]]
    filled = tf.pad(pixels, margins, constant_values=value)
    return tf.ensure_shape(filled, (size, size, pixels.shape[-1]))


def place(
    image: tf.Tensor, side: tf.Tensor | int, size: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Scales an image, and puts it at the top left of a gray square.

    Args:
        image: `(height, width, channels)` uint8 or a float type, 0 to 255.
        side: Pixels that become `size` pixels, no fewer than the image has.
        size: Height and width of the square.

    Returns:
        `(size, size, channels)` float32; and int32 `(2,)`, height and width of
        the image in the square.
    """
    image = tf.convert_to_tensor(image)
    inner = fit(tf.shape(image)[:2], side, size)
    return pad(resize(image, inner), size, GRAY), inner


def tiles(
    height: int, width: int, size: int, overlap: float = 0.25
) -> list[tuple[int, int]]:
    """Returns where tiles begin that together cover a photograph.

    Tiles are spread evenly, so neighbours overlap by the share that is asked
    for or by more. Along an axis on which the photograph is no larger than a
    tile there is one tile, which ends where the photograph ends.

    Args:
        height, width: size of the photograph in pixels.
        size: height and width of a tile in pixels.
        overlap: smallest share of a tile that its neighbour shows too, at least
            0 and below 1. An object is whole in one of the tiles if it is no
            larger than `size * overlap`.

    Returns:
        Pairs `(y, x)` of the tiles' top left corners in pixels, row by row.

    Raises:
        ValueError: A size is below 1, or the overlap out of range.
    """
    if min(height, width, size) < 1 or not 0 <= overlap < 1:
        raise ValueError(
            "Expected sizes of at least 1 and 0 <= overlap < 1. Received: "
            f"height={height}, width={width}, size={size}, overlap={overlap}"
        )

    def starts(extent: int) -> list[int]:
        rest = max(extent - size, 0)
        step = max(math.floor(size * (1 - overlap)), 1)
        count = -(-rest // step) + 1
        # All steps are `step` or less, because `rest <= (count - 1) * step`.
        return [rest * i // max(count - 1, 1) for i in range(count)]

    return [(y, x) for y in starts(height) for x in starts(width)]
