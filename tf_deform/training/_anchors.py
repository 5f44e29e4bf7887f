# SPDX-License-Identifier: Apache-2.0
"""Counts objects by size, and those that no anchor of a detector fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# COCO's sizes: names, and the areas from which they begin.
_SIZES = ("small", "medium", "large")
_BOUNDS = (32**2, 96**2)
_SIZE_TEXTS = ("below 32 x 32 pixels", "below 96 x 96", "from 96 x 96")
_MOST_PAIRS = 2**22  # of boxes and anchors that are compared at once


@dataclasses.dataclass(frozen=True)
class AnchorReport:
    """What `anchor_report` counted; as text, it says so in words."""

    threshold: float
    objects: dict[str, int]
    without: dict[str, int]
    overlaps: np.ndarray
    boxes: np.ndarray

    def __str__(self) -> str:
        count = len(self.boxes)
        sizes = ", ".join(
            f"{self.objects[size]} {size} ({text})"
            for size, text in zip(_SIZES, _SIZE_TEXTS)
        )
        lines = [f"{count} objects: {sizes}."]
        missed = np.flatnonzero(self.overlaps < self.threshold)
        if not count:
            return "No objects."
        if not missed.size:
            return (
                f"{lines[0]} Each has an anchor that overlaps it by at least "
                f"{self.threshold}."
            )
        parts = ", ".join(
            f"{self.without[size]} {size}"
            for size in _SIZES
            if self.without[size]
        )
        width, height = (self.boxes[missed, 2:] - self.boxes[missed, :2]).T
        lines.append(
            f"{missed.size} of them ({missed.size / count:.1%}; {parts}) get "
            f"no anchor: none overlaps them by {self.threshold} or more, so "
            "they are not learned as objects. They are "
            f"{width.min():.3g} to {width.max():.3g} pixels wide and "
            f"{height.min():.3g} to {height.max():.3g} high."
        )
        return " ".join(lines)


def anchor_report(
    boxes: Any, anchors: Any, threshold: float = 0.3
) -> AnchorReport:
    """Counts objects by COCO's sizes, and those that no anchor fits.

    An object whose overlap (intersection over union) with every anchor is
    below the threshold of matching is background to a detector that is trained
    with it. Faster R-CNN gives an object its best anchor from 0.3 on. Larger
    images, tiles or other anchors help.

        print(anchor_report(boxes, model.anchors()))

    Args:
        boxes: `(n, 4)`, x1, y1, x2, y2 of all objects in pixels of the model's
            input, that is, after photographs are resized; or a list of such
            arrays, one for each photograph.
        anchors: `(m, 4)`, the anchors of the model in the same pixels.
        threshold: The overlap from which an anchor fits, above 0 and at most 1.

    Returns:
        An object whose `str` says it in words. Its attributes `objects` and
        `without` are dictionaries of numbers, of all objects and of those that
        no anchor fits, for "small", "medium" and "large"; `overlaps`, `(n,)`,
        is the overlap of each object with the anchor that fits it best.

    Raises:
        ValueError: The arrays have other shapes or are not finite, there is no
            anchor, or `threshold` is out of its range.
    """
    if isinstance(boxes, (list, tuple)):
        boxes = [np.reshape(each, (-1, 4)) for each in boxes]
        boxes = np.concatenate([np.zeros((0, 4)), *boxes])
    boxes, anchors = (
        _check(value, name)
        for value, name in ((boxes, "boxes"), (anchors, "anchors"))
    )
    if not len(anchors):
        raise ValueError("Expected `anchors` to have a row. Received: none")
    if not 0 < threshold <= 1:
        raise ValueError(
            "Expected `threshold` to be above 0 and at most 1. Received: "
            f"{threshold}"
        )
    overlaps = np.zeros(len(boxes))
    for group in _groups(anchors):
        overlaps = np.maximum(overlaps, _best_overlaps(boxes, group))
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    kinds = np.digitize(areas, _BOUNDS)
    missed = overlaps < threshold
    return AnchorReport(
        threshold,
        {size: int((kinds == k).sum()) for k, size in enumerate(_SIZES)},
        {
            size: int((missed & (kinds == k)).sum())
            for k, size in enumerate(_SIZES)
        },
        overlaps,
        boxes,
    )


def _check(value: Any, name: str) -> np.ndarray:
    array = np.asarray(value, np.float64)
    if array.ndim != 2 or array.shape[1] != 4 or not np.isfinite(array).all():
        raise ValueError(
            f"Expected `{name}` to be finite and (n, 4). Received: the shape "
            f"{array.shape}"
            + ("" if np.isfinite(array).all() else ", with NaN")
        )
    return array


def _groups(anchors: np.ndarray) -> list[np.ndarray]:
    """Splits anchors into those of one width and height."""
    sizes = np.round(anchors[:, 2:] - anchors[:, :2], 3)
    _, group = np.unique(sizes, axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    counts = np.bincount(group.ravel())
    return np.split(anchors[order], np.cumsum(counts)[:-1])


def _best_overlaps(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Returns the best overlap of each box with anchors of one size.

    If these form a grid, the best anchor is the one whose row and whose column
    is nearest to the box: its width and its height of intersection are the
    largest.
    """
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    columns, rows = (np.unique(np.round(x, 3)) for x in centers.T)
    if len(columns) * len(rows) != len(anchors):
        return _best_of_all(boxes, anchors)
    size = (anchors[0, 2:] - anchors[0, :2]) / 2
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    nearest = np.stack(
        [_nearest(columns, middle[:, 0]), _nearest(rows, middle[:, 1])], axis=1
    )
    return _overlap(boxes, np.concatenate([nearest - size, nearest + size], 1))


def _nearest(grid: np.ndarray, values: np.ndarray) -> np.ndarray:
    right = np.clip(np.searchsorted(grid, values), 0, len(grid) - 1)
    left = np.maximum(right - 1, 0)
    closer = values - grid[left] < grid[right] - values
    return np.where(closer, grid[left], grid[right])


def _best_of_all(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    best = np.zeros(len(boxes))
    rows = max(1, _MOST_PAIRS // len(anchors))
    for start in range(0, len(boxes), rows):
        part = boxes[start : start + rows, None]
        best[start : start + rows] = _overlap(part, anchors).max(-1)
    return best


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns intersection over union, 0 where both are empty."""
    low = np.maximum(boxes[..., :2], others[..., :2])
    high = np.minimum(boxes[..., 2:], others[..., 2:])
    both = np.prod(np.maximum(high - low, 0), -1)
    areas = [np.prod(b[..., 2:] - b[..., :2], -1) for b in (boxes, others)]
    either = areas[0] + areas[1] - both
    return np.where(either > 0, both / np.where(either > 0, either, 1), 0.0)
