# SPDX-License-Identifier: Apache-2.0
"""Tests transforms by drawing: ids and boxes must stay at the same pixels."""

import colorsys
import itertools

import numpy as np
import pytest
import tensorflow as tf

from tf_deform import _squares
from tf_deform._squares import GRAY, VOID
from tf_deform.data import _transforms, letterbox
from tf_deform.data._transforms import Example

# Boxes in whole pixels that do not overlap; the second touches the corner.
BOXES = np.array(
    [[4, 6, 17, 10], [36, 24, 47, 35], [20, 2, 23, 29], [0, 31, 6, 34]]
)
HEIGHT, WIDTH = 35, 47


def draw(boxes=BOXES, height=HEIGHT, width=WIDTH):
    """Draws object k with id k + 1, and 20 times that in the image."""
    mask = np.zeros((height, width, 1), "int32")
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        mask[y1:y2, x1:x2] = index + 1
    image = np.repeat(20 * mask, 3, axis=2).astype("uint8")
    return Example(
        tf.constant(image),
        tf.constant(boxes, "float32"),
        tf.range(len(boxes)),
        tf.constant(mask),
    )


def find(mask):
    """Returns the boxes of the ids in a mask, by id."""
    found = {}
    for index in np.unique(mask[(mask > 0) & (mask != VOID)]):
        rows, columns = np.nonzero(mask[..., 0] == index)
        box = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        found[index - 1] = np.array(box)
    return found


def check(example, tolerance=0.0):
    """Compares boxes with what is drawn."""
    found = find(example.mask.numpy())
    labels = example.labels.numpy()
    assert sorted(found) == sorted(labels)
    for label, box in zip(labels, example.boxes.numpy()):
        np.testing.assert_allclose(box, found[label], atol=tolerance)


def same_picture(example):
    return np.array_equal(
        example.image, np.repeat(20 * example.mask.numpy(), 3, axis=2)
    )


def test_what_is_drawn_is_found():
    check(draw())
    assert same_picture(draw())


@pytest.mark.parametrize("sides", [*itertools.product([False, True], repeat=3)])
def test_flip(sides):
    example = _transforms.flip(draw(), *sides)
    check(example)
    assert same_picture(example)
    left_right, up_down, transpose = sides
    expected = draw().mask.numpy()
    if left_right:
        expected = expected[:, ::-1]
    if up_down:
        expected = expected[::-1]
    if transpose:
        expected = expected.transpose(1, 0, 2)
    np.testing.assert_array_equal(example.mask, expected)


@pytest.mark.parametrize("seed", range(12))
def test_crop(seed):
    rng = np.random.default_rng(seed)
    shape = rng.integers(5, (HEIGHT, WIDTH))
    origin = rng.integers(0, (HEIGHT, WIDTH) - shape + 1)
    example = _transforms.crop(
        draw(), tf.constant(origin, "int32"), tf.constant(shape, "int32"), 0.4
    )
    (y, x), (height, width) = origin, shape
    whole = draw().mask.numpy()
    part = whole[y : y + height, x : x + width]
    np.testing.assert_array_equal(example.mask, part)
    assert same_picture(example)
    found = find(part)
    kept = [
        index
        for index in range(len(BOXES))
        if (part == index + 1).sum() >= 0.4 * (whole == index + 1).sum()
    ]
    np.testing.assert_array_equal(example.labels, kept)
    for label, box in zip(kept, example.boxes.numpy()):
        np.testing.assert_array_equal(box, found[label])


@pytest.mark.parametrize("share, kept", [(0.5, True), (0.51, False)])
def test_an_object_is_dropped_below_its_share(share, kept):
    # Rows 6 and 7 of rows 6 to 9 are left.
    example = _transforms.crop(draw(), (0, 0), (8, WIDTH), share)
    assert (0 in example.labels) == kept


def test_objects_without_area_are_dropped():
    boxes = [[3, 4, 3, 9], [3, 4, 3, 4], [9, 5, 4, 7], [9, 9, 4, 4]]
    example = draw()._replace(boxes=tf.constant(boxes, "float32"))
    for share in (0.0, 0.4):
        cut = _transforms.crop(example, (0, 0), (HEIGHT, WIDTH), share)
        assert len(cut.labels) == 0 and cut.boxes.shape == (0, 4)


def test_a_crop_of_all_changes_no_bit():
    boxes = tf.random.uniform((4, 2), seed=1) * 10.0
    boxes = tf.concat([boxes, boxes + 7.3], 1)
    example = draw()._replace(boxes=boxes)
    cut = _transforms.crop(example, (0, 0), (HEIGHT, WIDTH), 0.4)
    for before, after in zip(example, cut):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_resize_to_multiples(times):
    example = _transforms.resize(draw(), (HEIGHT * times, WIDTH * times))
    check(example)
    assert example.image.dtype == "float32" and example.mask.dtype == "int32"
    assert (example.image.shape, example.mask.shape) == (
        (HEIGHT * times, WIDTH * times, 3),
        (HEIGHT * times, WIDTH * times, 1),
    )


@pytest.mark.parametrize("shape", [(29, 61), (44, 40), (53, 90)])
def test_resize(shape):
    example = _transforms.resize(draw(), shape)
    check(example, tolerance=1.0)
    np.testing.assert_allclose(
        example.boxes,
        BOXES * np.array([shape[1], shape[0]] * 2) / ([WIDTH, HEIGHT] * 2),
        rtol=1e-6,
    )
    # Where the id is the same all around, interpolation changes no colour.
    mask = example.mask.numpy()[..., 0]
    around = np.stack(
        [
            np.roll(mask, (i, j), (0, 1))
            for i in range(-2, 3)
            for j in (-2, 0, 2)
        ]
    )
    inside = (around == mask).all(0)[2:-2, 2:-2]
    assert inside.mean() > 0.4
    for channel in range(3):
        np.testing.assert_allclose(
            example.image.numpy()[2:-2, 2:-2, channel][inside],
            20 * mask[2:-2, 2:-2][inside],
            atol=1e-3,
        )


def test_shrinking_averages():
    """A board of single black and white pixels becomes gray, not either."""
    board = np.indices((60, 90)).sum(0) % 2 * 255
    image = np.repeat(board[..., None], 3, 2).astype("uint8")
    image, _ = letterbox(image, 30)
    assert np.ptp(image.numpy()[1:19, 1:29]) < 40  # else 255


def test_pad():
    example = _transforms.pad(_transforms.resize(draw(), (HEIGHT, WIDTH)), 50)
    check(example)
    assert example.image.shape == (50, 50, 3)
    assert example.mask.shape == (50, 50, 1)
    inside = np.zeros((50, 50), bool)
    inside[:HEIGHT, :WIDTH] = True
    assert (example.image.numpy()[~inside] == GRAY).all()
    assert (example.mask.numpy()[~inside] == VOID).all()
    np.testing.assert_array_equal(
        example.mask.numpy()[:HEIGHT, :WIDTH], draw().mask
    )


def test_pad_objects():
    boxes, labels = _transforms.pad_objects(draw(), 6)
    np.testing.assert_array_equal(labels, [0, 1, 2, 3, -1, -1])
    np.testing.assert_array_equal(boxes[:4], BOXES)
    assert (boxes.numpy()[4:] == -1).all()
    empty = Example(None, tf.zeros((0, 4)), tf.zeros((0,), "int32"))
    boxes, labels = _transforms.pad_objects(empty, 1)
    np.testing.assert_array_equal(boxes, [[-1, -1, -1, -1]])
    np.testing.assert_array_equal(labels, [-1])


def noise(height, width, dtype="uint8"):
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (height, width, 3)).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(53, 53), (53, 41), (29, 53)])
def test_letterbox_to_the_same_size_changes_no_bit(shape, dtype):
    for function in (letterbox, tf.function(letterbox)):
        image, scale = function(noise(*shape, dtype), 53)
        assert image.shape == (53, 53, 3) and image.dtype == "float32"
        np.testing.assert_array_equal(
            image[: shape[0], : shape[1]], noise(*shape)
        )
        assert (image.numpy()[shape[0] :] == GRAY).all()
        assert (image.numpy()[:, shape[1] :] == GRAY).all()
        np.testing.assert_array_equal(scale, [1, 1, 1, 1])


@pytest.mark.parametrize("size", [94, 31, 640, 1])
def test_letterbox_keeps_places(size):
    image, scale = letterbox(draw().image, size)
    inner = np.maximum(np.floor(np.array([HEIGHT, WIDTH]) * size / 47 + 0.5), 1)
    np.testing.assert_allclose(
        scale.numpy() * [WIDTH, HEIGHT, WIDTH, HEIGHT],
        inner[[1, 0, 1, 0]],
        rtol=1e-6,
    )
    found = BOXES * scale.numpy()
    np.testing.assert_allclose(found / scale.numpy(), BOXES, rtol=1e-6)
    if size >= 94:  # A white object shows where its box says.
        for box, value in zip(found, (20, 40, 60, 80)):
            x1, y1, x2, y2 = np.round(box).astype(int)
            centre = image[(y1 + y2) // 2, (x1 + x2) // 2]
            np.testing.assert_allclose(centre, [value] * 3, atol=1e-3)


def test_fit_is_exact_in_integers():
    rng = np.random.default_rng(0)
    side = rng.integers(1, 100_000, 500)
    extent = rng.integers(1, side + 1)
    for size in (1, 640, 1333):
        exact = (2 * extent * size + side) // (2 * side)
        np.testing.assert_array_equal(
            _squares.fit(extent, side, size), np.maximum(exact, 1)
        )
    assert _squares.fit(2472, 2472, 640) == 640
    assert _squares.fit(3, 2472, 640) == 1  # 0.78 pixels
    assert _squares.fit(1, 2472, 640) == 1  # 0.26 pixels
    assert _squares.fit(1, 4, 2) == 1  # a half


def recolour(image, numbers, strength):
    example = draw()._replace(image=tf.constant(image, "float32"))
    changed = _transforms.recolour(example, tf.constant(numbers), strength)
    np.testing.assert_array_equal(changed.boxes, BOXES)
    np.testing.assert_array_equal(changed.mask, example.mask)
    return changed.image.numpy()


def test_recolour():
    image = noise(31, 43, "float32")
    same = recolour(image, [0.0, 0.0, 0.0, 0.0], 1.0)
    np.testing.assert_allclose(same, image, atol=1e-3)

    brighter = recolour(image, [0.5, 0.0, 0.0, 0.0], 0.5)
    np.testing.assert_allclose(brighter, np.minimum(image + 32, 255), atol=1e-3)

    mean = image.mean((0, 1))
    flatter = recolour(image, [0.0, -0.5, 0.0, 0.0], 0.4)
    np.testing.assert_allclose(flatter, 0.8 * (image - mean) + mean, atol=1e-3)

    gray = recolour(image, [0.0, 0.0, -1.0, 0.0], 1.0)
    np.testing.assert_allclose(gray, image.max(2)[..., None] + [0, 0, 0])

    turned = recolour(image, [0.0, 0.0, 0.0, 1.0], 1.0)
    for pixel, result in zip(image[0], turned[0]):
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        expected = colorsys.hsv_to_rgb((h + 0.1) % 1, s, v)
        np.testing.assert_allclose(result, expected, atol=1e-3)


def test_colours_stay_in_range():
    for sign in (-1.0, 1.0):
        changed = recolour(noise(31, 43), [sign, 1.0, 1.0, sign], 1.0)
        assert changed.min() >= 0 and changed.max() <= 255
        assert np.isfinite(changed).all()


@pytest.mark.parametrize("seed", range(6))
def test_transforms_in_a_row(seed):
    rng = np.random.default_rng(seed)
    example = _transforms.resize(draw(), (HEIGHT * 3, WIDTH * 3))
    shape = rng.integers(60, (HEIGHT * 3, WIDTH * 3))
    example = _transforms.crop(example, (7, 11), shape - (7, 11), 0.0)
    example = _transforms.flip(example, *(rng.random(3) < 0.5))
    example = _transforms.resize(example, tf.shape(example.image)[:2] * 2)
    example = _transforms.pad(example, 400)
    check(example)
    assert len(example.labels) >= 2
