# SPDX-License-Identifier: Apache-2.0
"""Tests where tiles lie, and how many objects one can show."""

import numpy as np
import pytest

from tf_deform.data import _tiles, tiles


@pytest.mark.parametrize(
    "extent, size, overlap",
    [
        (400, 400, 0.25),
        (401, 400, 0.25),
        (399, 400, 0.0),
        (2472, 400, 0.25),
        (800, 400, 0.0),
        (801, 400, 0.0),
        (10, 3, 0.99),
        (5, 1, 0.5),
        (1, 7, 0.5),
    ],
)
def test_tiles_cover_and_overlap(extent, size, overlap):
    (rows,) = {y for y, _ in tiles(1, extent, size, overlap)}
    places = [x for _, x in tiles(1, extent, size, overlap)]
    assert rows == 0
    assert places[0] == 0 and places[-1] == max(extent - size, 0)
    steps = np.diff(places)
    assert (steps > 0).all()
    # A step is at least one pixel, however large the overlap.
    assert (steps <= max(size * (1 - overlap), 1)).all()
    assert len(steps) == 0 or np.ptp(steps) <= 1


def test_no_tile_is_in_vain():
    assert len(tiles(1200, 800, 400, 0.0)) == 3 * 2
    assert len(tiles(1201, 800, 400, 0.0)) == 4 * 2
    # 1 + ceil((2299 - 400) / 300) rows, 1 + ceil((2472 - 400) / 300) columns.
    assert len(tiles(2299, 2472, 400)) == 8 * 8


def test_tiles_go_row_by_row():
    assert tiles(5, 7, 4, 0.0) == [(0, 0), (0, 3), (1, 0), (1, 3)]


@pytest.mark.parametrize(
    "arguments", [(0, 5, 3), (5, 0, 3), (5, 5, 0), (5, 5, 3, 1), (5, 5, 3, -1)]
)
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="Expected sizes of at least 1"):
        tiles(*arguments)


def count_all(boxes, size, share, extent):
    """Counts the objects of every tile, one by one."""
    most = 0
    for y in range(extent - size + 1):
        for x in range(extent - size + 1):
            low = np.maximum(boxes[:, :2], (x, y))
            high = np.minimum(boxes[:, 2:], (x + size, y + size))
            left = np.maximum(high - low, 0).prod(1)
            area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
            most = max(most, ((left > 0) & (left >= share * area)).sum())
    return most


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("size", [9, 40])
def test_no_tile_has_more_objects(share, size):
    rng = np.random.default_rng(size)
    extent = 70
    corner = rng.uniform(0, extent - 1, (60, 2))
    far = np.minimum(corner + rng.uniform(0.5, 30, (60, 2)), extent)
    boxes = np.concatenate([corner, far], 1)
    most = count_all(boxes, size, share, extent)
    bound = _tiles.most_objects(boxes, size, share)
    assert most <= bound <= min(1.6 * most + 3, len(boxes))


def test_few_objects():
    assert _tiles.most_objects(np.zeros((0, 4)), 5, 0.4) == 0
    assert _tiles.most_objects(np.array([[3, 4, 5, 6]]), 5, 0.4) == 1
    # Nine tenths of an object of 50 pixels fit into no tile of 5.
    assert _tiles.most_objects(np.array([[0, 0, 50, 50]]), 5, 0.9) == 0


def test_objects_far_apart_are_not_added():
    corners = np.arange(12)[:, None] * [1_000_000, 7]
    boxes = np.concatenate([corners, corners + 3], 1)
    assert _tiles.most_objects(boxes, 16, 0.4) == 1
