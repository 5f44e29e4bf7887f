# SPDX-License-Identifier: Apache-2.0
"""Tests how exports compare detections, whose order nearly tied scores swap."""

import pathlib

import numpy as np
import pytest

from tf_deform.export import _common, _detections

PATH = pathlib.Path("model.onnx")
TOLERANCE = 1e-3
BOXES = [(10, 4, 22, 27), (11, 20, 21, 43), (38, 1, 64, 23), (34, 28, 45, 51)]
SCORES = [0.9, 0.5, 0.4998, 0.0501]
LABELS = [1, 0, 0, 1]


def make(boxes, scores, labels, rows):
    """Makes a batch of an image without detections, and one with these."""
    count = len(scores)
    made = {
        "boxes": np.full((2, rows, 4), -1, "float32"),
        "scores": np.zeros((2, rows), "float32"),
        "labels": np.full((2, rows), -1, "int32"),
        "names": np.full((2, rows), b"", object),
        "valid": np.array([0, count], "int32"),
    }
    made["boxes"][1, :count] = boxes
    made["scores"][1, :count] = scores
    made["labels"][1, :count] = labels
    made["names"][1, :count] = [(b"cat", b"dog")[label] for label in labels]
    return made


def make_side(order=(0, 1, 2, 3), rows=6, **changes):
    """Makes detections in an order; `changes` are made before."""
    parts = {"boxes": BOXES, "scores": SCORES, "labels": LABELS}
    parts = {name: np.array(value, float) for name, value in parts.items()}
    for name, (row, value) in changes.items():
        parts[name][row] += value
    labels = parts["labels"].astype(int)
    order = list(order)
    return make(
        parts["boxes"][order], parts["scores"][order], labels[order], rows
    )


def compare(expected, received, tolerance=TOLERANCE, least=0.05):
    assert _detections.are_detections(expected)
    sample = _common.Sample({"image": np.zeros((1, 2, 2, 3))}, expected)
    return _common.compare([sample], lambda _: received, PATH, tolerance, least)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_nearly_tied_scores_in_any_order(order):
    differences = compare(make_side(), make_side(order))
    assert differences == dict.fromkeys(make_side(), 0)


def test_small_differences_are_measured():
    received = make_side((0, 2, 1, 3), boxes=(1, 0.032), scores=(0, 0.0003))
    differences = compare(make_side(), received)
    assert differences["boxes"] == pytest.approx(0.032 / 64, rel=1e-3)
    assert differences["scores"] == pytest.approx(0.0003 / 0.9, rel=1e-3)
    assert differences["names"] == differences["valid"] == 0


@pytest.mark.parametrize("expected_more", [True, False])
def test_a_score_at_the_least_may_be_missing(expected_more):
    """Tests a last row that only one side has, in a list with free rows."""
    sides = [make_side(), make_side((0, 1, 2))]
    expected, received = sides if expected_more else sides[::-1]
    compare(expected, received)
    for least in (0.04, None):  # There the score is no doubtful one.
        with pytest.raises(RuntimeError, match="Received: a box that the "):
            compare(expected, received, least=least)


def test_another_last_row_of_a_full_list():
    """Tests that of two equally good boxes either may be the last one."""
    expected = make_side((0, 1), rows=2)
    compare(expected, make_side((0, 2), rows=2))
    with pytest.raises(RuntimeError, match="the model alone has in image 1"):
        compare(expected, make_side((0, 3), rows=2))


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"boxes": (0, 2)}, r"\(10, 4, 22, 27\) .*\(12, 6, 24, 29\) with the"),
        ({"boxes": (1, (0, 0, 0, 2))}, "label 0, .*11, 20, 21, 45"),
        ({"boxes": (1, np.nan)}, "that the model alone has"),
        ({"scores": (0, -0.002)}, "score 0.9; .* score 0.898"),
        ({"scores": (1, 0.002)}, "score 0.5; .* score 0.502"),
        ({"scores": (3, np.nan)}, "that the file alone has .* score nan"),
        ({"labels": (0, -1)}, "label 1, "),
        ({"order": (0, 1)}, "score 0.4998; the other side has "),
        ({"order": (3, 0, 1, 2)}, "scores in another order"),
        ({"order": (0, 1, 2, 2, 3)}, "a box that the file alone has"),
    ],
)
def test_wrong_detections_are_told(changes, text):
    with pytest.raises(RuntimeError, match=text) as error:
        compare(make_side(), make_side(**changes))
    assert "Expected model.onnx to give what the model gives" in str(
        error.value
    )
    assert "Nothing was written" in str(error.value)


def test_rows_that_contradict_their_number():
    received = make_side()
    received["valid"] = received["valid"] - [0, 1]
    with pytest.raises(RuntimeError, match="labels that are not -1"):
        compare(make_side(), received)


def test_names_that_differ():
    received = make_side((0, 2, 1, 3))
    received["names"][1, 0] = b"cat"
    with pytest.raises(RuntimeError, match="difference of 0.083 in 'names'"):
        compare(make_side(), received)


def test_other_outputs_are_no_detections():
    side = make_side()
    for name, value in (
        ("valid", side["valid"] + 1),
        ("labels", side["labels"][:, :3]),
        ("boxes", side["boxes"] * np.nan),
    ):
        assert not _detections.are_detections({**side, name: value})
    del side["valid"]
    assert not _detections.are_detections(side)
