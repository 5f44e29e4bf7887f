# SPDX-License-Identifier: Apache-2.0
"""Tests the pixels of photographs and masks, against TensorFlow's decoder."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_sets import picture

from tf_deform import data

WIDTH, HEIGHT = 22, 13


def smooth():
    """Returns colours that survive JPEG."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([8 * x, 15 * y, 255 - 6 * x - 5 * y], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def decoded(path):
    image = tf.io.decode_image(path.read_bytes(), 3, expand_animations=False)
    return image.numpy()


@pytest.mark.parametrize(
    "mode, kind",
    [
        ("RGB", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("RGBA", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGB", "BMP"),
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("RGB", "WEBP"),
    ],
)
def test_pixels_are_those_that_a_server_decodes(mode, kind, tmp_path):
    path = tmp_path / "photo"
    image = smooth().quantize(9) if mode == "P" else smooth().convert(mode)
    image.save(path, kind)
    found = data.read_image(str(path))
    assert found.shape == (HEIGHT, WIDTH, 3) and found.dtype == np.uint8
    # Decoders of JPEG and WebP round colours differently.
    bound = 6 if kind in ("JPEG", "WEBP") else 0
    assert np.abs(found.astype(int) - decoded(path)).max() <= bound
    if kind in ("PNG", "BMP"):
        np.testing.assert_array_equal(found, image.convert("RGB"))


def test_transparency_is_dropped(tmp_path):
    pixels = np.array(smooth().convert("RGBA"))
    pixels[..., 3] = np.arange(WIDTH)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    found = data.read_image(tmp_path / "photo.png")
    np.testing.assert_array_equal(found, pixels[..., :3])


def test_cmyk_is_not_inverted(tmp_path):
    """Tests it on the inks of a printer: Adobe's files store them inverted."""
    inks = smooth().convert("CMYK")
    inks.save(tmp_path / "photo.jpg", quality=98)
    found = data.read_image(tmp_path / "photo.jpg").astype(int)
    assert np.abs(found - np.array(smooth())).max() < 25
    assert np.abs(found - decoded(tmp_path / "photo.jpg")).max() <= 25


def test_sixteen_bits_of_colour_give_their_high_byte(tmp_path):
    from image_faults_test import png

    values = np.random.default_rng(3).integers(0, 1 << 16, (HEIGHT, WIDTH, 3))
    rows = values.astype(">u2")
    content = png(
        WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows)
    )
    (tmp_path / "photo.png").write_bytes(content)
    found = data.read_image(tmp_path / "photo.png")
    np.testing.assert_array_equal(found, values >> 8)
    np.testing.assert_array_equal(found, decoded(tmp_path / "photo.png"))


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    frames = [smooth().convert("L"), smooth().convert("L").rotate(180)]
    frames[0].save(
        tmp_path / "photo.gif", save_all=True, append_images=frames[1:]
    )
    found = data.read_image(tmp_path / "photo.gif")
    np.testing.assert_array_equal(found, frames[0].convert("RGB"))


def test_previews_behind_a_photograph_are_no_animation(tmp_path):
    """Tests the form in which telephones write a photograph and a preview."""
    path = tmp_path / "a.jpg"
    picture("a").save(
        path, "MPO", save_all=True, append_images=[picture("a").resize((6, 4))]
    )
    (tmp_path / "classes.txt").write_text("car\n")
    (tmp_path / "a.txt").write_text("0 .5 .5 .5 .5\n")
    result = data.read(f"yolo:{tmp_path}")
    assert "animated" not in "\n".join(result.notes)
    assert data.read_image(path).shape == (16, 24, 3)


def test_too_many_pixels_are_an_error_in_words(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    smooth().save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    with pytest.raises(ValueError, match="photo.png to have at most .* pixels"):
        data.read_image(path)


@pytest.mark.parametrize("read", [data.read_image, data.read_mask])
def test_a_missing_file_is_named(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="photo.png', which is not"):
        read(tmp_path / "photo.png")


def test_a_palette_mask_is_its_indices(tmp_path):
    ids = np.random.default_rng(4).choice([0, 1, 2, 255], (HEIGHT, WIDTH))
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [7] * 759)
    image.save(tmp_path / "mask.png")
    found = data.read_mask(tmp_path / "mask.png")
    assert found.shape == (HEIGHT, WIDTH, 1) and found.dtype == np.int32
    np.testing.assert_array_equal(found[..., 0], ids)


def test_a_mask_of_one_bit_is_zero_and_one(tmp_path):
    ids = np.random.default_rng(4).integers(0, 2, (HEIGHT, WIDTH)).astype(bool)
    Image.fromarray(ids).save(tmp_path / "mask.png")
    found = data.read_mask(tmp_path / "mask.png")
    np.testing.assert_array_equal(found[..., 0], ids)


def test_a_mask_says_which_value_has_no_label(tmp_path):
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    ids[5, 7] = 3
    Image.fromarray(ids).save(tmp_path / "mask.png")
    mask = data.Mask(str(tmp_path / "mask.png"), {0: 4, 2: 1})
    with pytest.raises(ValueError, match="mask.png .* 3 at row 5, column 7"):
        data.read_mask(mask)


def test_without_pillow_the_extra_is_named(run_python):
    printed = run_python(
        """
import sys

sys.modules["PIL"] = None
import tf_deform

try:
    tf_deform.data.read("voc:photos")
except ModuleNotFoundError as error:
    print(error)
"""
    )
    assert "Run `pip install 'tf-deform[train]'`" in printed
