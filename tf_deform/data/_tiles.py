# SPDX-License-Identifier: Apache-2.0
"""Covers large photographs with tiles, and counts the objects of a tile."""

from __future__ import annotations

import math

import numpy as np


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


def most_objects(boxes: np.ndarray, size: int, share: float) -> int:
    """Returns a number of objects that no tile of a photograph exceeds.

    A tile shows an object if it shows at least a share `s` of its area, so `s`
    of its width and `s` of its height: it begins between `x1 + s w - size` and
    `x2 - s w`, and likewise in y. These rectangles of places are drawn on a
    grid, and the largest number that meet in one cell is returned.

    Args:
        boxes: `(n, 4)` x1, y1, x2, y2 in pixels.
        size: height and width of a tile in pixels.
        share: smallest share of the area of an object that is shown.

    Returns:
        At most `n`, and usually a few more than the fullest tile has.
    """
    if len(boxes) == 0:
        return 0
    corners = np.asarray(boxes, "float64").reshape(-1, 2, 2)
    inset = share * (corners[:, 1] - corners[:, 0])
    # Tiles begin at whole pixels; one more is for the rounding of shares.
    first = corners[:, 0] + inset - size - 1
    last = corners[:, 1] - inset + 1
    fits = (first <= last).all(1)
    if not fits.any():
        return 0
    first, last = first[fits], last[fits]
    low = first.min(0)
    # The grid has at most 2048 cells along an axis.
    cell = np.maximum(max(size // 16, 1), (last.max(0) - low) / 2048)
    (x1, y1), (x2, y2) = (
        ((edge - low) // cell).astype(int).T for edge in (first, last)
    )
    # Sums over both axes turn the marks of corners into numbers of rectangles.
    marks = np.zeros((y2.max() + 2, x2.max() + 2), int)
    for y, x, mark in (
        (y1, x1, 1),
        (y1, x2 + 1, -1),
        (y2 + 1, x1, -1),
        (y2 + 1, x2 + 1, 1),
    ):
        np.add.at(marks, (y, x), mark)
    return int(marks.cumsum(0).cumsum(1).max())
