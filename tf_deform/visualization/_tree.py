# SPDX-License-Identifier: Apache-2.0
"""Follows a cell's samples down through the layers that they are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from tf_deform.visualization._walk import Call


@dataclasses.dataclass(frozen=True)
class Level:
    """Holds what one layer contributes to a cell of the last.

    Attributes:
        call: The layer's call.
        points: `(n, 2)`, (y, x) in pixels of the image.
        weights: `(n,)`, of which the last layer's sum up to its mean
            modulation, and each layer's before to what is left of it; parallel
            branches have equal shares.
    """

    call: Call
    points: np.ndarray
    weights: np.ndarray


def follow(
    calls: Sequence[Call],
    index: int,
    cell: Sequence[int],
    image: int = 0,
    depth: int | None = None,
) -> list[Level]:
    """Returns where a cell's samples come from, from the last layer down.

    A sample of a layer lies between cells of the layer before, whose samples
    count by bilinear weights. Samples beyond a map read zeros, and are left
    out. Layers that are not among `calls` are taken to look straight down.
    Where parallel branches come together, all are followed.

    Args:
        calls: All calls.
        index: The call whose cell is asked for.
        cell: Row and column.
        image: The number of the image.
        depth: The number of layers. None: all.
    """
    weights = np.zeros(calls[index].size)
    weights[tuple(cell)] = 1
    levels: list[Level] = []
    following = {index: weights}
    while following and len(levels) != depth:
        latest = max(following)  # so that all that samples it has come before
        call = calls[latest]
        levels.append(_level(call, following.pop(latest), image))
        for each in call.previous:
            share = _spread(calls[each], levels[-1]) / len(call.previous)
            following[each] = following.get(each, 0) + share
    return levels


def _level(call: Call, weights: np.ndarray, image: int) -> Level:
    where = np.nonzero(weights)
    locations = call.locations[image][where].reshape(-1, 2)
    factors = abs(call.modulation[image][where])
    count = np.prod(factors.shape[1:])
    factors = factors.reshape(-1, count) / count
    shares = (weights[where][:, None] * factors).reshape(-1)
    inside = ((locations > -1) & (locations < call.input_size)).all(-1)
    inside &= shares > 0
    return Level(call, call.inputs.place(locations[inside]), shares[inside])


def _spread(call: Call, level: Level) -> np.ndarray:
    """Returns bilinear weights of a layer's cells for points."""
    weights = np.zeros(call.size)
    cells: Any = call.outputs.cells(level.points)
    low = np.floor(cells).astype(int)
    for corner in np.ndindex(2, 2):
        at = low + corner
        share = (1 - abs(cells - at)).prod(-1) * level.weights
        inside = ((at >= 0) & (at < call.size)).all(-1)
        np.add.at(weights, tuple(at[inside].T), share[inside])
    return weights
