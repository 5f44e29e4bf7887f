# SPDX-License-Identifier: Apache-2.0
"""Makes pictures, and draws what detectors of trees find."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tf_deform import data, visualization
from tf_deform._files import writing
from tf_deform._keras import keras
from tf_deform.models import deformable_layers

_LEAST_SCORE = 0.3
_LEAST_HALF = 64  # pixels from the middle of a tree to the picture's edge
_FONT = 10


class Row(NamedTuple):
    """Holds a row of pictures: a photograph and what was found in it.

    Attributes:
        place: Where it was taken.
        image: `(height, width, 3)` uint8.
        photograph: The photograph's annotations.
        found: By arm, "boxes" `(n, 4)` and "scores" `(n,)`.
    """

    place: str
    image: np.ndarray
    photograph: Any
    found: Mapping[str, Mapping[str, np.ndarray]]


def make_figure(
    rows: int, columns: int, inches: float = 4.0
) -> tuple[Any, np.ndarray]:
    """Makes a figure that needs no screen, and its axes, squares in rows."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(
        figsize=(inches * columns, inches * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    return figure, axes


def save(figure: Any, path: pathlib.Path) -> None:
    """Writes a figure as a PNG file."""
    with writing(path) as partial:
        figure.savefig(partial, format="png", dpi=100)


def draw_box(ax: Any, box: np.ndarray, **style: Any) -> None:
    """Draws the edges of a box, x1, y1, x2, y2 in pixels."""
    import matplotlib.patches

    # A box's edges lie between pixels; Matplotlib counts from their centres.
    x1, y1, x2, y2 = box - 0.5
    ax.add_patch(
        matplotlib.patches.Rectangle(
            (x1, y1), x2 - x1, y2 - y1, fill=False, **style
        )
    )


def draw_boxes(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Draws one row for each photograph: true boxes, then each arm's.

    Args:
        path: PNG file to write.
        rows: The photographs. Boxes of a score below .3 are left out.
    """
    arms = list(rows[0].found)
    figure, axes = make_figure(len(rows), 1 + len(arms))
    for row, line in zip(rows, axes):
        wanted = ~(row.photograph.crowd | row.photograph.difficult)
        boxes = row.photograph.boxes[wanted]
        _show(line[0], row.image, boxes, "white")
        line[0].set_title(f"{row.place}: {len(boxes)} trees", fontsize=_FONT)
        for ax, (arm, found) in zip(line[1:], row.found.items()):
            likely = found["scores"] >= _LEAST_SCORE
            _show(ax, row.image, found["boxes"][likely], "yellow")
            ax.set_title(f"{arm}: {likely.sum()} found", fontsize=_FONT)
    save(figure, path)


def _show(ax: Any, image: np.ndarray, boxes: np.ndarray, color: str) -> None:
    ax.imshow(image)
    for box in boxes:
        draw_box(ax, box, edgecolor=color)


def draw_sampling(
    path: pathlib.Path, model: keras.Model, rows: Sequence[Row], trees: int = 3
) -> None:
    """Draws where deformable layers of a backbone look for trees.

    These are the last two of strides 8 and 16, whose cells are smaller than
    trees. The pictures show what lies around the trees.

    Args:
        path: PNG file to write.
        model: A detector whose backbone has deformable layers.
        rows: The photographs, a row each.
        trees: Number of trees of a photograph, from small to large.
    """
    shown = [
        layer
        for layer in deformable_layers(model.backbone)
        if layer.name.startswith(("conv3", "conv4"))
    ]
    figure, axes = make_figure(len(rows), trees)
    for row, line in zip(rows, axes):
        wanted = ~(row.photograph.crowd | row.photograph.difficult)
        boxes = row.photograph.boxes[wanted]
        boxes = boxes[np.argsort((boxes[:, 2:] - boxes[:, :2]).prod(1))]
        ranks = np.linspace(0.1, 0.9, trees) * (len(boxes) - 1)
        pixels, scale = data.letterbox(row.image, model.image_size)
        for ax, box in zip(line, boxes[ranks.astype(int)]):
            x1, y1, x2, y2 = box * np.asarray(scale)
            visualization.plot_sampling(
                model.backbone,
                np.asarray(pixels),
                ((y1 + y2) / 2, (x1 + x2) / 2),
                layers=shown,
                depth=2,
                ax=ax,
            )
            _show(
                ax,
                np.asarray(pixels) / 255,
                np.array([[x1, y1, x2, y2]]),
                "white",
            )
            center = np.array([x1 + x2, y1 + y2]) / 2
            half = max(_LEAST_HALF, x2 - x1, y2 - y1)
            width, height = box[2:] - box[:2]
            ax.set_xlim(center[0] - half, center[0] + half)
            ax.set_ylim(center[1] + half, center[1] - half)
            ax.set_title(
                f"{row.place}\na tree of {width:.0f} x {height:.0f} pixels",
                fontsize=_FONT,
            )
    figure.suptitle(
        "Where the deformable layers look for the middle of a tree\n"
        f"yellow: {shown[-1].name}; orange: {shown[-2].name}, for each of them",
        fontsize=_FONT,
    )
    save(figure, path)
