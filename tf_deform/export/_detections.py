# SPDX-License-Identifier: Apache-2.0
"""Compares what detectors find, whatever the order of nearly equal scores.

Another runtime rounds differently. Detections whose scores nearly tie then
change places, and the last one of a full list, or one that barely reaches the
least score, is there on one side alone. Neither says that a file is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_NAMES = ("boxes", "scores", "labels", "valid")
Arrays = Mapping[str, np.ndarray]


class Unlike(Exception):
    """Says in words how the detections of a file differ from a model's."""


def are_detections(outputs: Arrays) -> bool:
    """Tells whether outputs are those of `FasterRCNN` and `RFCN`.

    These are "boxes" `(batch, n, 4)`, "scores" and "labels" `(batch, n)`, and
    "valid" `(batch,)`, the number of detections; they come first, and the
    labels of other rows are -1.
    """
    if not set(_NAMES) <= set(outputs):
        return False
    boxes, scores, labels, valid = (outputs[name] for name in _NAMES)
    return (
        scores.ndim == 2
        and boxes.shape == (*scores.shape, 4)
        and labels.shape == scores.shape
        and valid.shape == scores.shape[:1]
        and np.array_equal(labels >= 0, _are_valid(outputs))
        and bool(np.isfinite(boxes).all() and np.isfinite(scores).all())
    )


def _are_valid(outputs: Arrays) -> np.ndarray:
    count = outputs["labels"].shape[1]
    return np.arange(count) < outputs["valid"][:, None]


def align(
    expected: Arrays,
    received: Arrays,
    tolerance: float,
    least: float | None = None,
) -> dict[str, np.ndarray]:
    """Moves each received detection to the row of its counterpart.

    Counterparts have one label, and their corners and scores differ by no more
    than the tolerance. A detection may lack one if its score, to the tolerance,
    is no higher than what the other side had to leave out: than its last score
    if all its `n` rows are taken, else than the detector's least score.

    Args:
        expected: The model's outputs, for which `are_detections` is true.
        received: The file's, of the same shapes.
        tolerance: Relative to the largest coordinate, and to the largest score.
        least: The detector's least score; None: detections may not be missing
            from rows that are free.

    Returns:
        The received outputs, in which rows without a counterpart are those that
        are expected.

    Raises:
        Unlike: A detection lacks its counterpart, or rows, their order and
            "valid" contradict each other.
    """
    reach, slack = (
        tolerance * np.abs(expected[name]).max(initial=0)
        for name in ("boxes", "scores")
    )
    steps = np.diff(received["scores"]) > slack
    for wrong, text in (
        (
            (received["labels"] >= 0) != _are_valid(received),
            "labels that are not -1 from the row on that 'valid' says",
        ),
        (steps & _are_valid(received)[:, 1:], "scores in another order"),
    ):
        if wrong.any():
            raise Unlike(text)
    rows = [
        name
        for name, value in expected.items()
        if value.shape[:2] == expected["scores"].shape
    ]
    found = {**received, "valid": expected["valid"]}
    found.update({name: expected[name].copy() for name in rows})
    for image in range(len(expected["valid"])):
        sides = [
            {name: side[name][image][: side["valid"][image]] for name in rows}
            for side in (expected, received)
        ]
        pairs = _pair(*sides, reach, slack)
        for name in rows:
            for row, other in pairs:
                found[name][image, row] = sides[1][name][other]
        for index, (side, whose) in enumerate(zip(sides, ("model", "file"))):
            taken = {pair[index] for pair in pairs}
            other = sides[1 - index]
            cut = least
            if len(other["scores"]) == expected["scores"].shape[1]:
                cut = other["scores"][-1]
            for row, score in enumerate(side["scores"]):
                missing = cut is None or not score <= cut + slack
                if row not in taken and missing:
                    raise Unlike(_tell(side, row, other, whose, image))
    return found


def _pair(
    side: Arrays, other: Arrays, reach: float, slack: float
) -> list[tuple[int, int]]:
    """Returns rows of both sides that belong together, each at most once."""
    pairs, free = [], np.ones(len(other["scores"]), bool)
    for row, score in enumerate(side["scores"]):
        apart = _distances(side, row, other)
        fits = free & (apart <= reach)
        fits &= np.abs(other["scores"] - score) <= slack
        if fits.any():
            best = int(np.argmin(np.where(fits, apart, np.inf)))
            free[best] = False
            pairs.append((row, best))
    return pairs


def _distances(side: Arrays, row: int, other: Arrays) -> np.ndarray:
    """Returns how far corners are apart; infinity for other labels, or NaN."""
    apart = np.abs(other["boxes"] - side["boxes"][row]).max(-1, initial=0)
    alike = (other["labels"] == side["labels"][row]) & ~np.isnan(apart)
    return np.where(alike, apart, np.inf)


def _tell(side: Arrays, row: int, other: Arrays, whose: str, image: int) -> str:
    def describe(side: Arrays, row: int) -> str:
        box = ", ".join(f"{x:.4g}" for x in side["boxes"][row])
        return f"({box}) with the score {side['scores'][row]:.4g}"

    apart = _distances(side, row, other)
    nearest = "no box of this label"
    if np.isfinite(apart).any():
        nearest = describe(other, int(np.argmin(apart)))
        nearest = f"{nearest} as the nearest of this label"
    return (
        f"a box that the {whose} alone has in image {image}, label "
        f"{side['labels'][row]}, {describe(side, row)}; the other side has "
        f"{nearest}"
    )
