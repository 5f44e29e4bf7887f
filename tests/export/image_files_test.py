# SPDX-License-Identifier: Apache-2.0
"""Tests that the endpoint for bytes decodes image files."""

import io
import struct

import keras
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tensorflow as tf
from exported import (
    assert_close,
    make_rois,
    pooling_model,
    randomise,
    small_model,
    write,
)
from operands import random

from tf_deform._image_files import decode
from tf_deform.layers import DeformableConv2D


def make_pixels(height=48, width=80):
    """Makes blocks of one colour, which JPEG hardly changes."""
    blocks = np.random.default_rng(0).integers(
        0, 256, (height // 16, width // 16, 3), np.uint8
    )
    return blocks.repeat(16, 0).repeat(16, 1)


def encode(image, kind):
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 95} if kind == "jpeg" else {}))
    return file.getvalue()


JPEG = encode(make_pixels(), "jpeg")


def exif(orientation, order="<", before=3, kind=3):
    """Makes an EXIF segment with the orientation tag behind other tags."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    tags = [
        (0x100 + i, 4, 1, struct.pack(f"{order}I", 6)) for i in range(before)
    ]
    value = struct.pack(f"{order}HH", orientation, 0)
    tags.append((0x112, kind, 1, value))
    table = b"".join(
        struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags
    )
    tiff = mark + struct.pack(f"{order}IH", 8, len(tags)) + table + bytes(4)
    return segment(0xE1, b"Exif\0\0" + tiff)


def segment(kind, content):
    return struct.pack(">BBH", 0xFF, kind, len(content) + 2) + content


def insert(data, *segments):
    """Inserts segments before the segments of a JPEG file."""
    return data[:2] + b"".join(segments) + data[2:]


@pytest.fixture(scope="module")
def decode_rgb():
    spec = tf.TensorSpec((), "string")
    return tf.function(lambda data: decode(data, 3), [spec])


def assert_upright(received, data, tolerance=12):
    """Compares with Pillow's upright image; JPEG decoders differ a little."""
    image = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    expected = np.asarray(image.convert("RGB")).astype(int)
    assert received.shape == expected.shape
    assert np.abs(received.numpy() - expected).max() <= tolerance


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(orientation, order, decode_rgb):
    data = insert(JPEG, exif(orientation, order))
    received = decode_rgb(data)
    assert received.shape[:2] == ((48, 80) if orientation < 5 else (80, 48))
    assert_upright(received, data)


@pytest.mark.parametrize(
    "segments",
    [
        lambda tag: [segment(0xE0, b"JFIF\0" + bytes(9)), tag],
        lambda tag: [segment(0xE2, bytes(65533)), tag],
        lambda tag: [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), tag],
        lambda tag: [segment(0xFE, b"\xff\xda\xff\xd9 a comment"), tag],
        lambda tag: [tag, exif(3)],
        lambda tag: [tag, segment(0xED, b"Photoshop 3.0\0")],
    ],
)
def test_the_segment_is_found(segments, decode_rgb):
    data = insert(JPEG, *segments(exif(6, before=40)))
    received = decode_rgb(data)
    assert received.shape == (80, 48, 3)
    assert_upright(received, data)


@pytest.mark.parametrize(
    "tag",
    [
        exif(0),
        exif(9),
        exif(65535),
        segment(0xE1, b"Exif\0\0"),
        segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f"),
        segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff"),
        segment(0xE1, exif(6)[4:-20]),
        segment(0xE2, exif(6)[4:]),
    ],
)
def test_what_says_nothing_of_the_orientation(tag, decode_rgb):
    received = decode_rgb(insert(JPEG, tag))
    np.testing.assert_array_equal(received, tf.io.decode_jpeg(JPEG))


def test_pixels_are_those_that_pillow_reads(decode_rgb):
    noise = np.random.default_rng(1).integers(0, 256, (12, 20, 3), np.uint8)
    image = PIL.Image.fromarray(noise).resize((160, 96))
    data = encode(image, "jpeg")
    assert_upright(decode_rgb(data), data, tolerance=1)
    # Otherwise this tells nothing.
    with pytest.raises(AssertionError):
        assert_upright(tf.io.decode_image(data), data, tolerance=1)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_photographs_of_other_kinds(mode, decode_rgb):
    image = PIL.Image.fromarray(make_pixels()).convert(mode)
    data = insert(encode(image, "jpeg"), exif(8))
    received = decode_rgb(data)
    assert received.shape == (80, 48, 3)
    if mode == "L":
        assert_upright(received, data)
        gray = decode(tf.constant(data), 1)
        np.testing.assert_array_equal(gray, received[..., :1])


@pytest.mark.parametrize("colours", [2, 7, 100, 256])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_palettes_of_bmp_files(channels, colours, decode_rgb):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    image = PIL.Image.fromarray(pixels).quantize(colours)
    data = encode(image, "bmp")
    if struct.unpack("<H", data[28:30]) != (8,):
        pytest.fail("Pillow wrote another kind of file")
    colour = np.asarray(image.convert("RGB"))
    received = decode(tf.constant(data), channels)
    assert received.shape == (9, 13, channels)
    if channels == 1:
        expected = tf.image.rgb_to_grayscale(colour)
        np.testing.assert_array_equal(received, expected)
    else:
        np.testing.assert_array_equal(received[..., :3], colour)
        assert channels == 3 or (received[..., 3].numpy() == 255).all()


def test_gray_bmp_files():
    """Tests that all 256 grays are equal in one channel and in three."""
    pixels = np.arange(256, dtype=np.uint8).reshape(8, 32)
    data = tf.constant(encode(pixels, "bmp"))
    np.testing.assert_array_equal(decode(data, 1)[..., 0], pixels)
    np.testing.assert_array_equal(decode(data, 3)[..., 1], pixels)


PALETTE = encode(PIL.Image.fromarray(make_pixels()).quantize(50), "bmp")
REFUSED = {
    "1 bit": encode(PIL.Image.fromarray(make_pixels()).convert("1"), "bmp"),
    "compressed": PALETTE[:30] + b"\x01" + PALETTE[31:],
    "old header": PALETTE[:14] + b"\x0c" + PALETTE[15:],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_bmp_files_that_are_refused(kind, decode_rgb):
    error = tf.errors.InvalidArgumentError
    with pytest.raises(error, match="8, 24 or 32 bits"):
        decode_rgb(bytes(REFUSED[kind]))


@pytest.mark.parametrize("kind", ["png", "bmp", "gif"])
def test_other_files_are_as_before(kind, decode_rgb):
    image = PIL.Image.fromarray(make_pixels())
    if kind == "gif":
        image = image.quantize(64)
    data = encode(image, kind)
    np.testing.assert_array_equal(
        decode_rgb(data), np.asarray(image.convert("RGB"))
    )


@pytest.mark.parametrize(
    "data", [b"", b"B", b"BM", b"\xff\xd8\xff", b"no image"]
)
def test_what_is_no_image_is_an_error(data, decode_rgb):
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_rgb(data)


@pytest.mark.parametrize("kind", ["native", "portable"])
def test_the_endpoint_takes_them(kind, tmp_path):
    """Tests files of several kinds and sizes in one batch."""
    image = keras.Input((48, 80, 3), name="image")
    model = keras.Model(image, DeformableConv2D(2, 3, strides=2)(image))
    write(kind, randomise(model), tmp_path / "model", image_bytes=True)
    loaded = tf.saved_model.load(tmp_path / "model")
    pixels, large = make_pixels(), make_pixels(96, 112)
    palette = PIL.Image.fromarray(pixels).quantize(64)
    lying = insert(encode(np.rot90(pixels).copy(), "jpeg"), exif(6))
    files = [encode(pixels, "png"), encode(palette, "bmp"), lying]
    files += [encode(large, "jpeg"), encode(pixels[..., 0], "png")]
    images = [
        pixels,
        np.asarray(palette.convert("RGB")),
        np.rot90(tf.io.decode_jpeg(lying).numpy(), -1),
        tf.image.resize(tf.io.decode_jpeg(files[3]), (48, 80), antialias=True),
        pixels[..., :1].repeat(3, -1),
    ]
    expected = model(np.stack(images).round().astype("float32"))
    assert_close(loaded.serve_image_bytes(tf.constant(files)), expected)
    nothing = loaded.serve_image_bytes(tf.constant([], tf.string))
    assert nothing.shape[0] == 0


def test_the_endpoint_of_any_size(tmp_path):
    """Tests a file of colours for a model of one channel."""
    model = small_model(channels=1, dtype="uint8")
    write("native", model, tmp_path / "model")
    loaded = tf.saved_model.load(tmp_path / "model")
    gray = make_pixels()[..., :1]
    colour = encode(make_pixels(), "png")
    received = loaded.serve_image_bytes([encode(gray[..., 0], "png"), colour])
    images = np.stack([gray, tf.io.decode_png(colour, 1)])
    np.testing.assert_array_equal(received, model(images, training=False))


def test_the_endpoint_made_by_the_user(tmp_path):
    model, path = small_model((16, 20)), tmp_path / "model"

    def fit(pixels):
        pixels = tf.image.resize_with_crop_or_pad(pixels, 16, 20)
        return tf.cast(pixels, "float32") / 255

    write("native", model, path, image_bytes=fit)
    loaded = tf.saved_model.load(path)
    pixels = make_pixels(16, 32)
    received = loaded.serve_image_bytes([encode(pixels, "png")])
    assert_close(received, model(fit(pixels)[None], training=False))

    write("native", model, path, image_bytes=False)
    assert not hasattr(tf.saved_model.load(path), "serve_image_bytes")

    sample = [random(2, 20, 24, 18), make_rois(2, 4)]
    arguments = {"sample": sample, "image_bytes": True}
    with pytest.raises(ValueError, match="a model of one image"):
        write("native", pooling_model("align"), path, **arguments)
