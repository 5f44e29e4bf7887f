# SPDX-License-Identifier: Apache-2.0
"""Decodes image files in a graph to the images that viewers show.

TensorFlow's `decode_image` does not turn photographs as their EXIF orientation
says, and returns the indices of a BMP file instead of its palette's colours.
Most of its pixels of a JPEG file differ a little from what Pillow reads, as it
takes a fast inverse transform and not the accurate one (TensorFlow 2.21; see
findings/decode_image_takes_the_fast_transform.sh).
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

# The orientation is in one of the first segments, which have at most 64 KiB
# each.
_HEAD = 1 << 18
_ORIENTATION = 0x112

# Reads numbers: takes one or several positions, and the number of bytes of
# each.
_Read = Callable[..., tf.Tensor]


def decode(data: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes a JPEG, PNG, GIF or BMP file.

    JPEG files are turned as their EXIF orientation says. GIF files give their
    first image.

    Args:
        data: scalar string.
        channels: 1, 3 or 4.

    Returns:
        `(height, width, channels)` uint8.
    """
    head = tf.cast(tf.io.decode_raw(data, "uint8")[:_HEAD], "int32")
    size = tf.shape(head)[0]
    head = tf.pad(head, ((0, 1),))  # Reads behind the end find zeros.

    def read(position: tf.Tensor, count: int, big: bool | tf.Tensor = False):
        places = tf.expand_dims(position, -1) + tf.range(count)
        places = tf.where((places < 0) | (places > size), size, places)
        values = tf.gather(head, places)
        powers = 256 ** tf.range(count)
        powers = tf.where(big, powers[::-1], powers)
        return tf.reduce_sum(values * powers, axis=-1)

    is_palette = (read(0, 2) == 0x4D42) & (
        (read(28, 2) <= 8) | (read(14, 4) < 40)
    )

    def decode_jpeg() -> tf.Tensor:
        if channels == 4:
            pixels = tf.io.decode_image(data, channels, expand_animations=False)
        else:
            pixels = tf.io.decode_jpeg(
                data, channels, dct_method="INTEGER_ACCURATE"
            )
        pixels = tf.ensure_shape(pixels, (None, None, channels))
        return _turn(pixels, _read_orientation(read))

    def decode_other() -> tf.Tensor:
        return tf.cond(
            is_palette,
            lambda: _decode_palette(data, channels, head, read),
            lambda: tf.io.decode_image(data, channels, expand_animations=False),
        )

    pixels = tf.cond(read(0, 2) == 0xD8FF, decode_jpeg, decode_other)
    return tf.ensure_shape(pixels, (None, None, channels))


def _decode_palette(
    data: tf.Tensor, channels: int, head: tf.Tensor, read: _Read
) -> tf.Tensor:
    """Returns the colours of a BMP file that holds indices of colours."""
    check = tf.debugging.Assert(
        # Checks for a header of Windows 3 or later, 8 bits, and no compression.
        (read(14, 4) >= 40) & (read(28, 2) == 8) & (read(30, 4) == 0),
        ["Expected a BMP file of 8, 24 or 32 bits, not compressed."],
    )
    with tf.control_dependencies([check]):
        indices = tf.io.decode_bmp(data)
    count = read(46, 4)
    count = tf.where((count < 1) | (count > 256), 256, count)
    start = 14 + read(14, 4)
    colours = tf.reshape(head[start : start + 4 * count], (count, 4))
    colours = tf.cast(colours[:, 2::-1], "uint8")
    if channels == 1:
        colours = tf.image.rgb_to_grayscale(colours)
    elif channels == 4:
        colours = tf.pad(colours, ((0, 0), (0, 1)), constant_values=255)
    return tf.gather(colours, tf.cast(indices[..., 0], "int32"))


def _read_orientation(read: _Read) -> tf.Tensor:
    """Reads the EXIF orientation of a JPEG file; 1 (upright) if it has none."""

    def is_exif(segment: tf.Tensor) -> tf.Tensor:
        # An APP1 segment has "Exif" behind its size.
        return (read(segment, 2) == 0xE1FF) & (
            read(segment + 4, 4) == 0x66697845
        )

    def has_next(segment: tf.Tensor) -> tf.Tensor:
        # Each segment before the image data begins with 0xff and a kind, and
        # then has its size, which counts its own two bytes.
        kind = read(segment + 1, 1)
        return (
            (read(segment, 1) == 0xFF)
            & (kind != 0xDA)
            & (read(segment + 2, 2, True) >= 2)
            & ~is_exif(segment)
        )

    (segment,) = tf.while_loop(
        has_next,
        lambda segment: (segment + 2 + read(segment + 2, 2, True),),
        (tf.constant(2),),
    )
    tiff = segment + 10
    big = read(tiff, 2) == 0x4D4D
    table = tiff + read(tiff + 4, 4, big)
    count = tf.minimum(read(table, 2, big), 256)
    entries = table + 2 + 12 * tf.range(count)
    values = tf.where(
        read(entries, 2, big) == _ORIENTATION, read(entries + 8, 2, big), 0
    )
    found = tf.reduce_max(values)
    known = is_exif(segment) & (count > 0) & (found >= 1) & (found <= 8)
    return tf.where(known, found, 1)


def _turn(pixels: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    def apply(kinds: tuple[int, ...], turn: Callable) -> tf.Tensor:
        is_one = tf.reduce_any(orientation == tf.constant(kinds))
        return tf.cond(is_one, lambda: turn(pixels), lambda: pixels)

    pixels = apply((5, 6, 7, 8), lambda x: tf.transpose(x, (1, 0, 2)))
    pixels = apply((2, 3, 6, 7), lambda x: tf.reverse(x, (1,)))
    return apply((3, 4, 7, 8), lambda x: tf.reverse(x, (0,)))
