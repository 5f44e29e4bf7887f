# SPDX-License-Identifier: Apache-2.0
"""Computes with boxes: anchors, overlaps, deltas, and which boxes to keep.

Boxes are float32 `(x1, y1, x2, y2)` in pixels of the image; x2 and y2 lie
beyond the last pixel. A padding box is -1 throughout. All functions take a
batch of images with the same number of boxes, have no gradient of their own
choices, and run in every runtime that models are exported to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# A box grows or shrinks at most by this factor, so that no delta overflows.
# Source: He et al., Detectron, 2018; all detectors that followed keep it.
_MAX_GROWTH = math.log(1000 / 16)
_SMALLEST = 1e-6  # pixels; divides in place of a size of 0


def make_anchors(
    size: tuple[int, int],
    stride: int,
    scales: Sequence[float],
    ratios: Sequence[float],
) -> np.ndarray:
    """Makes the anchors of one map: each cell has one for each shape.

    Source: Ren et al. 2015, "Faster R-CNN", arXiv:1506.01497, section 3.1. The
    centers are the cells' corners, as in MMDetection and Detectron2, whose
    weights then fit.

    Args:
        size: Height and width of the map.
        stride: Pixels of the image for one of the map.
        scales: Roots of the anchors' areas, in strides.
        ratios: Heights of the anchors over their widths.

    Returns:
        `(height * width * len(ratios) * len(scales), 4)` boxes, those of a cell
        one after another.
    """
    roots = np.sqrt(np.asarray(ratios, "float64"))[:, None]
    sides = stride * np.asarray(scales, "float64")
    widths, heights = (sides / roots).ravel(), (sides * roots).ravel()
    shapes = np.stack([-widths, -heights, widths, heights], -1) / 2
    y, x = (stride * np.arange(length) for length in size)
    x, y = np.meshgrid(x, y)
    centers = np.stack([x, y, x, y], -1)[:, :, None]
    return (centers + shapes).reshape(-1, 4).astype("float32")


def clip(boxes: tf.Tensor, height: float, width: float) -> tf.Tensor:
    """Returns boxes, `(..., 4)`, cut at the edges of the image."""
    corner = tf.constant((width, height, width, height), "float32")
    return tf.clip_by_value(boxes, 0.0, corner)


def encode(
    anchors: tf.Tensor, boxes: tf.Tensor, deviations: Sequence[float]
) -> tf.Tensor:
    """Returns the deltas that make boxes of anchors; inverse of `decode`.

    delta = ((x - x_a) / w_a, (y - y_a) / h_a, log(w / w_a), log(h / h_a)),
    of centers and sizes, over `deviations`. Source: Girshick et al. 2013,
    "R-CNN", arXiv:1311.2524, appendix C.

    Args:
        anchors: `(..., 4)` boxes.
        boxes: `(..., 4)` boxes.
        deviations: What counts as 1 of each of the four.

    Returns:
        `(..., 4)`, finite for all finite boxes, those of no area included.
    """
    (center, size), (center_a, size_a) = map(_center_and_size, (boxes, anchors))
    shift = (center - center_a) / size_a
    deltas = tf.concat([shift, tf.math.log(size / size_a)], -1)
    return deltas / tf.constant(deviations, "float32")


def decode(
    anchors: tf.Tensor, deltas: tf.Tensor, deviations: Sequence[float]
) -> tf.Tensor:
    """Returns the boxes, `(..., 4)`, that deltas make of anchors."""
    deltas *= tf.constant(deviations, "float32")
    center, size = _center_and_size(anchors)
    center += deltas[..., :2] * size
    size *= tf.exp(tf.clip_by_value(deltas[..., 2:], -1e4, _MAX_GROWTH))
    return tf.concat([center - size / 2, center + size / 2], -1)


def _center_and_size(boxes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    first, last = boxes[..., :2], boxes[..., 2:]
    return (first + last) / 2, tf.maximum(last - first, _SMALLEST)


def area(boxes: tf.Tensor) -> tf.Tensor:
    """Returns the areas, `(...)`, of boxes; 0 for padding and inverted ones."""
    sides = tf.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def _common_and_union(
    boxes: tf.Tensor, others: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the areas, `(batch, n, m)`, of intersections and of unions."""
    x1, y1, x2, y2 = tf.unstack(boxes[:, :, None], axis=-1)
    a1, b1, a2, b2 = tf.unstack(others[:, None], axis=-1)
    width = tf.maximum(tf.minimum(x2, a2) - tf.maximum(x1, a1), 0.0)
    height = tf.maximum(tf.minimum(y2, b2) - tf.maximum(y1, b1), 0.0)
    common = width * height
    return common, area(boxes)[:, :, None] + area(others)[:, None] - common


def overlaps(boxes: tf.Tensor, others: tf.Tensor) -> tf.Tensor:
    """Returns intersection over union, `(batch, n, m)`; 0 for empty boxes."""
    common, union = _common_and_union(boxes, others)
    return common / tf.maximum(union, _SMALLEST)


def match(
    anchors: tf.Tensor, truth: tf.Tensor, least: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Finds for each anchor the object that it belongs to, if to any.

    That is the object that it overlaps most; but first an object of whose
    anchors none overlaps it more than this one.

    Args:
        anchors: `(n, 4)` boxes.
        truth: `(batch, m, 4)` boxes of objects, m at least 1.
        least: The least overlap of an anchor that is the best of its object.

    Returns:
        `(batch, n)` the largest overlap; `(batch, n)` int64, the object; and
        `(batch, n)` bool, whether the anchor is the best one of its object.
    """

    def match_image(truth: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        overlap = overlaps(anchors[None], truth[None])[0]
        nearest = tf.reduce_max(overlap, 0)
        enough = tf.less(0.0, overlap) & (overlap >= least)
        nearest = (overlap == nearest) & enough
        forced = tf.reduce_any(nearest, -1)
        index = tf.where(
            forced,
            tf.argmax(tf.cast(nearest, "int32"), -1),
            tf.argmax(overlap, -1),
        )
        return tf.reduce_max(overlap, -1), index, forced

    # One image after the other: all overlaps of a crowd and of all anchors take
    # a GiB.
    return tf.map_fn(
        match_image,
        truth,
        parallel_iterations=1,
        fn_output_signature=tuple(
            tf.TensorSpec(anchors.shape[:1], dtype)
            for dtype in ("float32", "int64", "bool")
        ),
    )


def suppress(
    boxes: tf.Tensor,
    scores: tf.Tensor,
    size: int,
    max_overlap: float,
    classes: tf.Tensor | None = None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Chooses the best boxes of each class that overlap no better one much.

    The choice is the one that box after box, by its score, would be kept or
    dropped. Here all are judged at once: a box goes if a better one that stays
    overlaps it. Of what is known at first, that all stay, this makes a new
    guess, and so on until a guess repeats; the n-th guess is right for the
    first n boxes at least, and for boxes of photographs after 3 to 10 guesses.

    Stock functions do not serve: `tf.image.combined_non_max_suppression` has no
    counterpart in XLA, ONNX and LiteRT, and the others know no classes and
    treat an overlap that equals the bound, or boxes of no area, differently
    from one runtime to the next.

    Args:
        boxes: `(batch, n, 4)` boxes, the best first.
        scores: `(batch, n)`, never larger than the one before; boxes of a score
            of 0 or less, of NaN, or of no area are not chosen.
        size: Number of boxes to choose.
        max_overlap: Intersection over union; a box goes if its overlap with a
            better one is larger.
        classes: `(batch, n)` integers; None if all are of one class.

    Returns:
        `(batch, size)` int32 places of the chosen boxes, the best first, and
        `(batch, size)`, whether there is such a box.
    """
    count = boxes.shape[1]
    # Avoids `greater`, which is true of NaN in OpenVINO.
    real = tf.less(0.0, scores) & tf.less(0.0, area(boxes))
    common, union = _common_and_union(boxes, boxes)
    order = tf.range(count)
    goes = (common > max_overlap * union) & (order[:, None] < order)
    if classes is not None:
        goes &= classes[:, :, None] == classes[:, None]
    goes = tf.cast(goes, "float32")
    start = tf.cast(real, "float32")[:, None]

    def is_new(stays: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        return tf.reduce_any(stays != before)

    def guess(stays: tf.Tensor, _: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        dropped = tf.less(0.5, tf.matmul(stays, goes))
        return tf.where(dropped, tf.zeros_like(start), start), stays

    stays, _ = tf.while_loop(is_new, guess, (start, start - 1))
    ranks = tf.where(stays[:, 0] > 0, tf.cast(count - order, "float32"), 0.0)
    ranks = tf.pad(ranks, ((0, 0), (0, max(0, size - count))))
    ranks, places = tf.math.top_k(ranks, size)
    return tf.minimum(places, count - 1), ranks > 0


def choose(
    wanted: tf.Tensor, scores: tf.Tensor, most: int, count: tf.Tensor
) -> tf.Tensor:
    """Chooses at random among what is wanted.

    Args:
        wanted: `(batch, n)` bool.
        scores: `(batch, n)` random numbers of 0 to 1: the largest win.
        most: Upper bound of `count`, at most n.
        count: `(batch,)` int32: how many to choose.

    Returns:
        `(batch, n)` bool: all that are wanted, if they are no more.
    """
    scores = tf.where(wanted, scores, -1.0)
    best, _ = tf.math.top_k(scores, most)
    # The last one of the best, or 2 if none is to be chosen.
    best = tf.pad(best, ((0, 0), (1, 0)), constant_values=2.0)
    least = tf.gather(best, tf.minimum(count, most), batch_dims=1)
    return wanted & (scores >= least[:, None])


def to_rois(
    boxes: tf.Tensor, wanted: tf.Tensor | None = None, last: float = 0.0
) -> tf.Tensor:
    """Converts boxes to regions as pooling takes them, with its padding.

    Args:
        boxes: `(batch, n, 4)`.
        wanted: `(batch, n)` bool: the boxes that are not to be padding.
        last: What the op adds to the last coordinates: 1 for those that take
            the last pixel itself.

    Returns:
        `(batch * n, 5)`: index of the image, or -1, and the corners.
    """
    images = tf.range(tf.shape(boxes)[0])[:, None, None]
    images = tf.cast(images, "float32") + tf.zeros_like(boxes[..., :1])
    exists = boxes[..., 2] >= 0
    if wanted is not None:
        exists &= wanted
    images = tf.where(exists[..., None], images, -1.0)
    rois = tf.concat([images, boxes - (0.0, 0.0, last, last)], -1)
    return tf.reshape(rois, (-1, 5))
