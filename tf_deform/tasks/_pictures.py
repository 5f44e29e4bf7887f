# SPDX-License-Identifier: Apache-2.0
"""Draws what models find, with Pillow, and where they look, with Matplotlib."""

from __future__ import annotations

import colorsys
import importlib
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tf_deform import _files
from tf_deform._keras import keras
from tf_deform._squares import VOID
from tf_deform.layers import DeformableConv2D
from tf_deform.models import deformable_layers

LOGGER = logging.getLogger("tf_deform")
# Larger pictures say no more on a screen.
MAX_SIDE = 1600
# Boxes of a picture from which on text is written only where it fits.
_MANY = 20


def _color(index: int) -> tuple[int, int, int]:
    """Returns the colour of a class; neighbours differ much in hue."""
    hue = (0.33 + index * 0.618034) % 1.0  # by the golden ratio
    return tuple(
        round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.85, 1.0)
    )


def shrink(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns an image of at most `MAX_SIDE` pixels, and its scale."""
    from PIL import Image

    scale = min(1.0, MAX_SIDE / max(image.shape[:2]))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        image = np.asarray(Image.fromarray(image).resize(size))
    return image, scale


def boxes_picture(
    image: np.ndarray,
    found: Mapping[str, np.ndarray],
    classes: Sequence[str],
    least: float = 0.0,
) -> np.ndarray:
    """Returns a copy of an image with boxes, classes and scores.

    With 20 boxes or more, those that are narrower than their text have none.

    Args:
        image: `(h, w, 3)` uint8.
        found: "boxes" `(n, 4)` in pixels of the image, "labels" `(n,)` and, of
            predictions, "scores" `(n,)`.
        classes: Names of the classes.
        least: Boxes with lower scores are left out.
    """
    from PIL import Image, ImageDraw, ImageFont

    image, scale = shrink(image)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    width = max(1, round(max(image.shape) / 400))
    font = ImageFont.load_default(size=max(10, 6 * width))
    scores = found.get("scores")
    chosen = np.arange(len(found["boxes"]))
    if scores is not None:
        chosen = np.flatnonzero(np.asarray(scores) >= least)
    # The best ones come last, above the others.
    for i in reversed(chosen):
        box = [float(x) * scale for x in found["boxes"][i]]
        sides = box[2] - box[0], box[3] - box[1]
        # Edges are half-open: the last pixel is one before the end.
        box[2:] = max(box[0], box[2] - 1), max(box[1], box[3] - 1)
        label = int(found["labels"][i])
        # A line that is thick for its box would hide the object.
        line = max(1, min(width, int(min(sides) / 8)))
        draw.rectangle(box, outline=_color(label), width=line)
        text = classes[label] if label < len(classes) else str(label)
        if scores is not None:
            text += f" {scores[i]:.2f}"
        if len(chosen) >= _MANY and draw.textlength(text, font) > sides[0]:
            continue
        draw.text(
            box[:2],
            text,
            fill=_color(label),
            font=font,
            stroke_width=1,
            stroke_fill="black",
        )
    return np.asarray(picture)


def mask_picture(
    image: np.ndarray, ids: np.ndarray, share: float = 0.5
) -> np.ndarray:
    """Returns a copy of an image in the colours of classes; void stays gray.

    Args:
        image: `(h, w, 3)` uint8.
        ids: `(h, w)` classes.
        share: Weight of the colours.
    """
    colors = np.array([_color(i) for i in range(256)], "float32")
    colors[VOID] = 128
    mixed = (1 - share) * image + share * colors[np.clip(ids, 0, VOID)]
    return shrink(np.round(mixed).astype("uint8"))[0]


def side_by_side(*pictures: np.ndarray) -> np.ndarray:
    """Returns pictures of one size in a row, with a white gap."""
    gap = np.full((len(pictures[0]), 8, 3), 255, "uint8")
    row = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(row[:-1], axis=1)


def write_picture(path: pathlib.Path, picture: np.ndarray) -> None:
    """Writes a PNG file that appears whole or not at all."""
    from PIL import Image

    with _files.writing(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


def has_offsets(model: keras.Model) -> bool:
    """Tells whether the backbone of a model has deformable convolutions."""
    return any(
        isinstance(layer, DeformableConv2D)
        for layer in deformable_layers(model.backbone)
    )


def require_matplotlib() -> None:
    """Raises an ImportError that names the extra, if there is none."""
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "Expected Matplotlib for pictures of sampling points. Received: "
            f"{error}. Run `pip install 'tf-deform[plots]'`"
        ) from error


def write_sampling(
    path: pathlib.Path,
    model: keras.Model,
    image: np.ndarray,
    point: Sequence[float],
    place: str,
) -> bool:
    """Draws where the deformable convolutions of a backbone look.

    Args:
        path: PNG file to write.
        model: A model whose `backbone` takes images `(1, size, size, 3)`.
        image: `(size, size, 3)`, what the model takes.
        point: (y, x) in pixels of the image.
        place: What is at the point, for the caption.

    Returns:
        Whether a picture was written: there may be nothing to draw, or no
        Matplotlib.
    """
    if not has_offsets(model):
        return False
    try:
        require_matplotlib()
    except ImportError as error:
        LOGGER.info("No picture of sampling points. %s", error)
        return False
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    from tf_deform.visualization import plot_sampling

    # Figures of their own need no screen, whatever backend is set.
    figure = Figure(figsize=(8, 8), layout="tight")
    axes = plot_sampling(model.backbone, image, point, ax=figure.add_subplot())
    # The margin is as wide as the samples outside of the image need.
    points = np.concatenate([dots.get_offsets() for dots in axes.collections])
    height, width = image.shape[:2]
    reach = len(image) / 50  # of a dot
    left, top = np.minimum(points.min(0) - reach, -0.5)
    right, bottom = np.maximum(
        points.max(0) + reach, [width - 0.5, height - 0.5]
    )
    (x1, x2), (y2, y1) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(max(left, x1), min(right, x2))
    axes.set_ylim(min(bottom, y2), max(top, y1))
    (cross,) = axes.lines
    cross.set(
        markersize=18,
        markeredgewidth=3,
        path_effects=[withStroke(linewidth=6, foreground="black")],
    )
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=3,
        title="Where the last deformable layers look for the cell at the "
        f"cross,\n{place}",
    ).get_title().set_horizontalalignment("center")
    with _files.writing(path) as partial:
        figure.savefig(
            partial, format="png", dpi=100, bbox_inches="tight", pad_inches=0.1
        )
    return True


def truth_of(photograph: Any) -> dict[str, np.ndarray]:
    """Returns the boxes of a `Photograph` for `boxes_picture`."""
    return {"boxes": photograph.boxes, "labels": photograph.labels}
