# SPDX-License-Identifier: Apache-2.0
"""Counts the objects of a tile."""

from __future__ import annotations

import numpy as np


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
