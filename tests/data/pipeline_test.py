# SPDX-License-Identifier: Apache-2.0
"""Tests batches: nothing moves by itself, and each is known by its number."""

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from tf_deform import data
from tf_deform._keras import keras
from tf_deform._squares import GRAY, VOID

SIZES = [(53, 41), (37, 53), (53, 53), (44, 53), (53, 29)]  # height, width
LONG = 53


def make_photo(name, height, width, boxes, **fields):
    count = len(boxes)
    fields = {
        "labels": np.arange(count, dtype="int32"),
        "crowd": np.zeros(count, bool),
        "difficult": np.zeros(count, bool),
        "mask": f"{name}.png",
    } | fields
    return SimpleNamespace(
        path=f"{name}.jpg",
        width=width,
        height=height,
        boxes=np.array(boxes, "float32").reshape(-1, 4),
        **fields,
    )


class Disk:
    """Holds images by path, and notes which are read."""

    def __init__(self, images, delay=0.0):
        self.images, self.delay, self.paths = images, delay, []
        self._lock = threading.Lock()
        self._random = np.random.default_rng(0)

    def read(self, path):
        with self._lock:
            self.paths.append(path)
            delay = self._random.random() * self.delay
        time.sleep(delay)
        return self.images[path]


def make_noise():
    """Makes photographs of noise with 0 to 4 objects, and where they are."""
    rng = np.random.default_rng(1)
    images, photos = {}, []
    for index, (height, width) in enumerate(SIZES):
        low = rng.uniform(0, 0.5, (index, 2))
        high = low + rng.uniform(0.1, 0.5, (index, 2))
        boxes = np.concatenate([low, high], 1) * [width, height, width, height]
        photos.append(make_photo(index, height, width, boxes))
        images[f"{index}.jpg"] = rng.integers(
            0, 256, (height, width, 3), "uint8"
        )
        images[f"{index}.png"] = rng.integers(0, 9, (height, width, 1), "int32")
    return SimpleNamespace(classes=("a",), photographs=tuple(photos)), images


def detection(annotations, disk, size=LONG, batch_size=2, **arguments):
    return data.detection_batches(
        annotations, size, batch_size, read_image=disk.read, **arguments
    )


def segmentation(annotations, disk, size=LONG, batch_size=2, **arguments):
    return data.segmentation_batches(
        annotations,
        size,
        batch_size,
        read_image=disk.read,
        read_mask=disk.read,
        **arguments,
    )


def take(batches, count):
    """Returns the arrays of the first batches."""
    return [
        [array.numpy() for array in tf.nest.flatten(batch)]
        for batch in batches.take(count)
    ]


def same(first, second):
    return all(
        np.array_equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_without_augmentation_no_bit_changes():
    annotations, images = make_noise()
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    plain = {"augment": False, "shuffle": False, "batch_size": 5}
    ((found, targets),) = detection(annotations, Disk(images), **plain).take(1)
    ((again, masks),) = segmentation(annotations, Disk(images), **plain).take(1)
    assert found.dtype == "float32" and masks.dtype == "int32"
    assert targets["boxes"].dtype == "float32"
    assert targets["labels"].dtype == "int32"
    np.testing.assert_array_equal(found, again)
    for index, (height, width) in enumerate(SIZES):
        inside = np.zeros((LONG, LONG), bool)
        inside[:height, :width] = True
        image, mask = found[index].numpy(), masks[index].numpy()
        np.testing.assert_array_equal(
            image[:height, :width], images[f"{index}.jpg"]
        )
        np.testing.assert_array_equal(
            mask[:height, :width], images[f"{index}.png"]
        )
        assert (image[~inside] == GRAY).all() and (mask[~inside] == VOID).all()
        photo = annotations.photographs[index]
        boxes, labels = targets["boxes"][index], targets["labels"][index]
        np.testing.assert_array_equal(boxes[:index], photo.boxes)
        np.testing.assert_array_equal(labels[:index], photo.labels)
        assert (boxes.numpy()[index:] == -1).all()
        assert (labels.numpy()[index:] == -1).all()


def test_a_photograph_is_shown_as_letterbox_shows_it():
    annotations, images = make_noise()
    batches = detection(
        annotations, Disk(images), 31, 5, augment=False, shuffle=False
    )
    ((found, targets),) = batches.take(1)
    for index, photo in enumerate(annotations.photographs):
        image, scale = data.letterbox(images[photo.path], 31)
        np.testing.assert_array_equal(found[index], image)
        boxes = targets["boxes"][index][:index]
        np.testing.assert_array_equal(boxes, photo.boxes * scale)


def test_shapes_are_static():
    annotations, images = make_noise()
    spec, boxes = detection(annotations, Disk(images), 31).element_spec
    assert spec.shape == (2, 31, 31, 3)
    assert boxes["boxes"].shape == (2, 4, 4)
    assert boxes["labels"].shape == (2, 4)
    spec, masks = segmentation(annotations, Disk(images), 31).element_spec
    assert spec.shape == (2, 31, 31, 3) and masks.shape == (2, 31, 31, 1)


def test_objects_that_are_not_trained_on_are_left_out():
    image = np.zeros((20, 30, 3), "uint8")
    boxes = [[1, 2, 9, 9], [4, 4, 12, 9], [5, 1, 20, 18]]
    photo = make_photo(
        "a",
        20,
        30,
        boxes,
        crowd=np.array([True, False, False]),
        difficult=np.array([False, False, True]),
    )
    batches = detection(
        SimpleNamespace(photographs=(photo,)),
        Disk({"a.jpg": image}),
        30,
        augment=False,
    )
    ((_, targets),) = batches.take(1)
    assert targets["labels"].numpy().tolist() == [[1], [1]]
    np.testing.assert_array_equal(targets["boxes"], [[boxes[1]]] * 2)


def test_without_objects_there_is_a_row():
    photo = make_photo("a", 20, 30, [])
    disk = Disk({"a.jpg": np.zeros((20, 30, 3), "uint8")})
    for tile in (None, 9):
        batches = detection(
            SimpleNamespace(photographs=(photo,)), disk, 30, tile=tile
        )
        ((_, targets),) = batches.take(1)
        np.testing.assert_array_equal(targets["boxes"], -np.ones((2, 1, 4)))
        np.testing.assert_array_equal(targets["labels"], [[-1], [-1]])


# Order and seeds.


@pytest.mark.parametrize("tile", [None, 17])
@pytest.mark.parametrize("make", [detection, segmentation])
def test_a_batch_depends_on_seed_and_number_alone(make, tile):
    annotations, images = make_noise()
    # A resumed run, another order of reading, and no memory of images.
    arguments = {"seed": 5, "tile": tile, "flips": "all", "batch_size": 3}
    first = take(make(annotations, Disk(images), **arguments), 9)
    disk = Disk(images, delay=0.02)
    again = make(annotations, disk, cache_bytes=0, start=4, **arguments)
    assert same(first[4:], take(again, 5))
    assert same(first[4:], take(again, 5))  # another iterator
    other = take(make(annotations, Disk(images), **arguments | {"seed": 6}), 9)
    assert not same(first, other)


def test_nothing_is_read_for_what_is_left_out():
    rng = np.random.default_rng(2)
    image = rng.integers(0, 256, (4, 6, 3), "uint8")
    photos = [make_photo(i, 4, 6, [[1, 1, 3, 3]]) for i in range(10_000)]
    disk = Disk({photo.path: image for photo in photos})
    batches = detection(
        SimpleNamespace(photographs=photos),
        disk,
        8,
        4,
        shuffle=False,
        start=3_000_000,
    )
    assert len(take(batches, 2)) == 2
    # 12,000,000 = 1200 epochs. A few batches are read ahead.
    assert set(disk.paths) >= {f"{i}.jpg" for i in range(8)}
    assert set(disk.paths) <= {f"{i}.jpg" for i in range(100)}


def test_every_epoch_shows_all_photographs():
    annotations, images = make_noise()
    shades = {
        path: np.full_like(image, 10 * int(path.split(".")[0]))
        for path, image in images.items()
    }
    batches = detection(annotations, Disk(shades), 9, 1, augment=False, seed=4)
    shown = [int(image[0, 0, 0, 0]) for image, _ in take_pairs(batches, 40)]
    epochs = [tuple(shown[i : i + 5]) for i in range(0, 40, 5)]
    assert all(sorted(epoch) == [0, 10, 20, 30, 40] for epoch in epochs)
    assert len(set(epochs)) > 4
    assert data.examples_per_epoch(annotations) == 5


def take_pairs(batches, count):
    return list(batches.take(count).as_numpy_iterator())


# What is drawn.


def draw_scene():
    """Draws six objects, each of a brightness of its own, far apart."""
    boxes = [
        [10, 8, 45, 30],
        [60, 5, 75, 50],
        [95, 20, 130, 40],
        [12, 60, 50, 100],
        [70, 64, 90, 90],
        [100, 55, 140, 104],
    ]
    image = np.zeros((110, 150, 3), "uint8")
    mask = np.zeros((110, 150, 1), "int32")
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = 40 * (index + 1)
        mask[y1:y2, x1:x2] = 40 * (index + 1)
    photo = make_photo("scene", 110, 150, boxes)
    annotations = SimpleNamespace(photographs=(photo,))
    return annotations, Disk({"scene.jpg": image, "scene.png": mask})


def run_around(line, place):
    """Returns where the run of true values around a place begins and ends."""
    before = place - np.argmin(np.append(line[place::-1], False)) + 1
    return before, place + np.argmin(np.append(line[place:], False))


def check_box(image, box, value):
    """Compares a box with the pixels of a value, from its centre on."""
    x, y = (box.reshape(2, 2).mean(0)).astype(int)
    # Edges are interpolated, and count from half of the value on.
    near = np.abs(image - value) < value / 2
    assert near[y, x]
    (x1, x2), (y1, y2) = run_around(near[y], x), run_around(near[:, x], y)
    # An edge within a pixel is counted to one side or the other.
    np.testing.assert_allclose(box, [x1, y1, x2, y2], atol=1.01)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": 150, "tile": None},
        {"size": 150, "tile": None, "flips": "all", "scale": (0.5, 2.0)},
        {"size": 97, "tile": 97, "flips": "all", "scale": (1.0, 1.0)},
        {"size": 181, "tile": 90, "flips": "all", "scale": (0.7, 1.6)},
    ],
)
def test_boxes_stay_around_what_is_drawn(arguments):
    annotations, disk = draw_scene()
    batches = detection(
        annotations, disk, batch_size=4, colour=0.0, seed=8, **arguments
    )
    kept = 0
    for images, targets in take_pairs(batches, 10):
        for image, boxes, labels in zip(
            images, targets["boxes"], targets["labels"]
        ):
            kept += (labels >= 0).sum()
            for label, box in zip(labels[labels >= 0], boxes):
                check_box(image[..., 0], box, 40 * (label + 1))
    assert kept > 60


@pytest.mark.parametrize("tile", [None, 80])
def test_masks_stay_on_what_is_drawn(tile):
    annotations, disk = draw_scene()
    batches = segmentation(
        annotations,
        disk,
        112,
        batch_size=4,
        colour=0.0,
        flips="all",
        tile=tile,
        seed=9,
    )
    for images, masks in take_pairs(batches, 6):
        ids = masks[..., 0]
        assert set(np.unique(ids)) <= {0, VOID, *range(40, 241, 40)}
        around = np.stack(
            [
                np.roll(ids, (i, j), (1, 2))
                for i in range(-2, 3)
                for j in range(-2, 3)
            ]
        )
        inside = (around == ids).all(0)[:, 2:-2, 2:-2]
        assert inside.mean() > 0.5
        values = np.where(ids == VOID, GRAY, ids)[:, 2:-2, 2:-2]
        np.testing.assert_allclose(
            images[:, 2:-2, 2:-2, 0][inside], values[inside], atol=1e-3
        )


# Tiles.


def test_tiles_on_a_grid_show_all_of_a_photograph():
    annotations, images = make_noise()
    photo = annotations.photographs[3]  # 44 by 53
    alone = SimpleNamespace(photographs=(photo,))
    count = data.examples_per_epoch(alone, tile=20)
    assert count == 3 * 3
    batches = detection(
        alone, Disk(images), 20, 1, tile=20, augment=False, shuffle=False
    )
    places = data.tiles(44, 53, 20, 0.0)
    for (y, x), (image, targets) in zip(places, take_pairs(batches, count)):
        np.testing.assert_array_equal(
            image[0], images[photo.path][y : y + 20, x : x + 20]
        )
        boxes = targets["boxes"][targets["labels"] >= 0]
        assert (boxes >= 0).all() and (boxes <= 20).all()


def test_a_photograph_smaller_than_a_tile_keeps_its_scale():
    annotations, images = make_noise()
    batches = detection(
        annotations, Disk(images), 80, 5, tile=80, augment=False, shuffle=False
    )
    ((found, _),) = batches.take(1)
    for index, (height, width) in enumerate(SIZES):
        np.testing.assert_array_equal(
            found[index][:height, :width], images[f"{index}.jpg"]
        )


def test_half_of_the_tiles_are_laid_around_objects():
    photo = make_photo("a", 500, 700, [[610, 30, 620, 40]])
    disk = Disk({"a.jpg": np.zeros((500, 700, 3), "uint8")})
    batches = detection(
        SimpleNamespace(photographs=(photo,)), disk, 40, 50, tile=40
    )
    ((_, targets),) = batches.take(1)
    # A tile anywhere shows it once in a hundred times.
    assert 15 <= (targets["labels"].numpy() == 0).sum() <= 35


def test_tiles_lie_anywhere():
    """Tests that every pixel is shown, and about equally often."""
    ramp = np.zeros((60, 90, 3), "uint8")
    ramp[..., 0], ramp[..., 1] = np.indices((60, 90))
    photo = make_photo("a", 60, 90, [])
    batches = detection(
        SimpleNamespace(photographs=(photo,)),
        Disk({"a.jpg": ramp}),
        25,
        100,
        tile=25,
        flips="none",
        colour=0.0,
        scale=(1.0, 1.0),
    )
    starts = np.concatenate(
        [images[:, 0, 0, :2] for images, _ in take_pairs(batches, 30)]
    )
    for places, last in zip(starts.T, (35, 65)):
        counts = np.bincount(places.astype(int))
        assert len(counts) == last + 1
        expected = 3000 / (last + 1)
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


# Memory.


def test_what_fits_is_kept():
    annotations, images = make_noise()
    # There is room for two of the five photographs.
    disk = Disk(images)
    batches = detection(
        annotations, disk, 31, 5, cache_bytes=14_000, shuffle=False
    )
    first = take(batches, 6)
    assert set(disk.paths) == {f"{i}.jpg" for i in range(5)}
    disk.paths.clear()
    assert same(first, take(batches, 6))
    assert len(set(disk.paths)) == 3
    batches = detection(
        annotations, Disk(images), 31, 5, cache_bytes=0, shuffle=False
    )
    assert same(first, take(batches, 6))


def test_images_are_kept_as_long_as_the_dataset():
    annotations, images = make_noise()
    kept = []

    def read(path):
        pixels = images[path].copy()
        kept.append(weakref.ref(pixels))
        return pixels

    batches = detection(annotations, SimpleNamespace(read=read), 31)
    iterator = iter(batches.take(9))
    del batches
    gc.collect()
    for _ in range(5):
        next(iterator)
    # Two threads may read one file at once, of which one array is kept.
    assert sum(reference() is not None for reference in kept) == 5
    del iterator
    gc.collect()
    assert all(reference() is None for reference in kept)


# Faults.


def check_error(annotations, read, *texts, make=detection):
    disk = SimpleNamespace(read=read)
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        take(make(annotations, disk, 31, 5, shuffle=False), 1)
    for text in texts:
        assert text in str(caught.value)


def test_a_broken_file_is_named():
    annotations, images = make_noise()

    def read(path):
        if path == "3.jpg":
            raise OSError("image file is truncated")
        return images[path]

    check_error(
        annotations,
        read,
        "ValueError: Expected a file that can be read. "
        "Received: 3.jpg: image file is truncated",
    )


def test_the_words_of_a_reader_stay():
    annotations, images = make_noise()

    def read(path):
        raise ValueError(f"Expected {path} to be sound. Received: noise")

    check_error(annotations, read, "ValueError: Expected 0.jpg to be sound.")


def test_a_file_of_another_size_is_named():
    annotations, images = make_noise()
    images["2.jpg"] = images["2.jpg"][:-1]
    check_error(
        annotations,
        images.__getitem__,
        "(53, 53, 3), as annotated. Received: 2.jpg of (52, 53, 3)",
    )


@pytest.mark.parametrize(
    "value, received", [(256, "0 to 256"), (-1, "-1 to 8")]
)
def test_a_mask_with_other_ids_is_named(value, received):
    annotations, images = make_noise()
    images["4.png"][0, 0] = value
    check_error(
        annotations,
        images.__getitem__,
        f"4.png of {received}",
        make=segmentation,
    )


def test_a_mask_may_be_more_than_a_path():
    annotations, images = make_noise()
    for photo in annotations.photographs:
        photo.mask = SimpleNamespace(path=photo.mask, labels={1: 2})
    batches = data.segmentation_batches(
        annotations,
        LONG,
        5,
        augment=False,
        shuffle=False,
        read_image=images.__getitem__,
        read_mask=lambda mask: images[mask.path] + mask.labels[1],
    )
    ((_, masks),) = batches.take(1)
    np.testing.assert_array_equal(masks[2], images["2.png"] + 2)

    def read(file):
        if file is annotations.photographs[4].mask:
            raise OSError("truncated")
        return images[getattr(file, "path", file)]

    check_error(annotations, read, "4.png: truncated", make=segmentation)


def test_files_are_read_by_default(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(7)
    image = rng.integers(0, 256, (31, 53, 3), "uint8")
    mask = rng.integers(0, 9, (31, 53, 1), "uint8")
    Image.fromarray(image).save(tmp_path / "0.png")
    Image.fromarray(mask[..., 0]).save(tmp_path / "mask.png")
    photo = make_photo(
        tmp_path / "0", 31, 53, [], mask=str(tmp_path / "mask.png")
    )
    photo.path = str(tmp_path / "0.png")
    annotations = SimpleNamespace(photographs=(photo,))
    batches = data.segmentation_batches(annotations, 53, 1, augment=False)
    ((images, masks),) = batches.take(1)
    np.testing.assert_array_equal(images[0, :31], image)
    np.testing.assert_array_equal(masks[0, :31], mask)
    (tmp_path / "0.png").write_bytes(b"not an image")
    batches = data.detection_batches(annotations, 53, 1)
    with pytest.raises(tf.errors.InvalidArgumentError, match="0.png"):
        take(batches, 1)


def test_a_missing_mask_is_named():
    annotations, images = make_noise()
    annotations.photographs[1].mask = None
    with pytest.raises(ValueError, match="Received none for 1.jpg"):
        segmentation(annotations, Disk(images))


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"size": 0}, "size >= 1"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"start": -1}, "start >= 0"),
        ({"tile": 0}, "tile >= 1"),
        ({"scale": (0.0, 1.0)}, "0 < scale"),
        ({"scale": (1.5, 1.0)}, "0 < scale"),
        ({"flips": "vertical"}, 'flips of "none", "horizontal" or "all"'),
        ({"colour": 1.5}, "0 <= colour <= 1"),
        ({"min_visible": -0.1}, "0 <= min_visible <= 1"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    annotations, images = make_noise()
    with pytest.raises(ValueError, match=f"Expected .*{text}"):
        detection(annotations, Disk(images), **arguments)


def test_no_photographs_are_refused():
    with pytest.raises(ValueError, match="Received: 0 photographs"):
        detection(SimpleNamespace(photographs=()), Disk({}))
