# SPDX-License-Identifier: Apache-2.0
"""Tests how many objects get no anchor."""

import numpy as np
import pytest

from tf_deform._keras import KERAS_2

if KERAS_2:
    pytest.skip("for Keras 3", allow_module_level=True)

from tf_deform.training import anchor_report  # noqa: E402


def grid(stride, width, height, columns, rows, start=0.0):
    x, y = np.meshgrid(np.arange(columns) * stride, np.arange(rows) * stride)
    middle = np.stack([x, y], -1).reshape(-1, 2) + start
    half = np.array([width, height]) / 2
    return np.concatenate([middle - half, middle + half], 1)


def overlaps(boxes, anchors):
    """Returns the best overlap of each box, one pair at a time."""
    best = []
    for box in boxes:
        found = [0.0]
        for anchor in anchors:
            sides = np.minimum(box[2:], anchor[2:]) - np.maximum(
                box[:2], anchor[:2]
            )
            both = np.prod(np.maximum(sides, 0))
            areas = [np.prod(b[2:] - b[:2]) for b in (box, anchor)]
            if sum(areas) > both:
                found.append(both / (sum(areas) - both))
        best.append(max(found))
    return best


@pytest.mark.parametrize("kind", ["grids", "loose", "clipped"])
def test_overlaps(kind):
    rng = np.random.default_rng(2)
    anchors = np.concatenate(
        [
            grid(8, 16, 16, 7, 5),
            grid(8, 11.3, 22.6, 7, 5),
            grid(16, 40, 20, 4, 3, 5.5),
        ]
    )
    if kind == "loose":
        anchors = anchors[rng.permutation(len(anchors))[:50]]
    if kind == "clipped":
        anchors = np.clip(anchors, 0, [56, 40, 56, 40])
    low = rng.uniform(-5, 60, (40, 2))
    boxes = np.concatenate([low, low + rng.uniform(0, 45, (40, 2))], 1)
    boxes[3, 2:] = boxes[3, :2]  # It has no area.
    report = anchor_report(boxes, anchors.astype("float32"), 0.4)
    expected = overlaps(boxes, anchors.astype("float32").astype(float))
    np.testing.assert_allclose(report.overlaps, expected, rtol=1e-6, atol=1e-9)


def test_many_boxes_and_anchors(monkeypatch):
    """Tests that loose anchors are compared in parts."""
    from tf_deform.training import _anchors

    rng = np.random.default_rng(3)
    anchors = grid(8, 16, 16, 7, 5)[rng.permutation(35)[:20]]
    boxes = grid(5, 12, 12, 9, 9, 2.2)
    whole = anchor_report(boxes, anchors).overlaps
    monkeypatch.setattr(_anchors, "_MOST_PAIRS", 50)
    np.testing.assert_array_equal(anchor_report(boxes, anchors).overlaps, whole)
    assert whole.max() > 0.4


def test_words():
    anchors = grid(16, 32, 32, 10, 10)
    boxes = [
        np.array([[0, 0, 32, 32], [16, 16, 48, 48]], "float32"),
        np.zeros((0, 4)),
        [[0, 0, 4, 5], [10, 10, 40, 50], [0, 0, 150, 100], [3, 3, 6, 6.5]],
    ]
    report = anchor_report(boxes, anchors)
    assert report.objects == {"small": 2, "medium": 3, "large": 1}
    assert report.without == {"small": 2, "medium": 0, "large": 1}
    text = str(report)
    assert text.startswith(
        "6 objects: 2 small (below 32 x 32 pixels), 3 medium (below 96 x 96), "
        "1 large (from 96 x 96)."
    )
    assert "3 of them (50.0%; 2 small, 1 large) get no anchor" in text
    assert "overlaps them by 0.3" in text
    assert "3 to 150 pixels wide and 3.5 to 100 high" in text


def test_words_if_all_is_well():
    anchors = grid(16, 32, 32, 10, 10)
    assert "Each has an anchor" in str(anchor_report(anchors[7:9], anchors))
    assert str(anchor_report([], anchors)) == "No objects."


def test_the_threshold_itself_fits():
    anchors = [[0, 0, 10, 10]]
    report = anchor_report([[0, 0, 10, 5]], anchors, 0.5)
    assert report.without == {"small": 0, "medium": 0, "large": 0}
    assert anchor_report([[0, 0, 10, 4]], anchors, 0.5).without["small"] == 1


@pytest.mark.parametrize(
    "boxes, anchors, threshold, text",
    [
        (np.zeros((3, 5)), np.ones((1, 4)), 0.3, r"`boxes` .*\(3, 5\)"),
        (np.zeros((3, 4)), np.ones(4), 0.3, r"`anchors` .*\(4,\)"),
        (np.full((3, 4), np.nan), np.ones((1, 4)), 0.3, "`boxes`.* with NaN"),
        (np.zeros((3, 4)), np.ones((0, 4)), 0.3, "`anchors` to have a row"),
        (np.zeros((3, 4)), np.ones((1, 4)), 0.0, "`threshold`"),
        (np.zeros((3, 4)), np.ones((1, 4)), 1.1, "`threshold`"),
    ],
)
def test_wrong_arguments(boxes, anchors, threshold, text):
    with pytest.raises(ValueError, match=text):
        anchor_report(boxes, anchors, threshold)
