# SPDX-License-Identifier: Apache-2.0
"""Draws what models find, with Pillow, and where they look, with Matplotlib."""

from __future__ import annotations

import importlib
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tf_deform import _files
from tf_deform._keras import keras
from tf_deform._squares import VOID
from tf_deform.data._masks import voc_colours
from tf_deform.layers import DeformableConv2D
from tf_deform.models import deformable_layers

LOGGER = logging.getLogger("tf_deform")
# Larger pictures say no more on a screen.
MAX_SIDE = 1600
_GAP = 8  # pixels between pictures in a row
# Boxes of a picture from which on text is written only where it fits.
_MANY = 20
# Matplotlib's tab20 has these, here the strong ones first. Its grays are left
# out: gray is void.
_TAB20 = bytes.fromhex(
    "1f77b4 ff7f0e 2ca02c d62728 9467bd 8c564b e377c2 bcbd22 17becf"
    "aec7e8 ffbb78 98df8a ff9896 c5b0d5 c49c94 f7b6d2 dbdb8d 9edae5"
)
# Further classes have the colours of Pascal VOC.
_COLORS = np.array(list(voc_colours().values()), "uint8")
_COLORS[: len(_TAB20) // 3] = np.frombuffer(_TAB20, "uint8").reshape(-1, 3)
_COLORS[VOID] = 128


def _color(index: int) -> tuple[int, int, int]:
    """Returns the colour of a class."""
    return tuple(_COLORS[index % VOID].tolist())


def _is_clear(classes: Sequence[str]) -> bool:
    """Tells whether class 0 is what is around objects."""
    return classes[0].lower() in ("background", "_background_")


def _font(pixels: int) -> Any:
    """Returns a font for a picture whose side has so many pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size=max(12, 6 * round(pixels / 400)))


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

    Text is black or white, whichever is read better on the colour of its class.
    With 20 boxes or more, those that are narrower than their text have none.

    Args:
        image: `(h, w, 3)` uint8.
        found: "boxes" `(n, 4)` in pixels of the image, "labels" `(n,)` and, of
            predictions, "scores" `(n,)`.
        classes: Names of the classes.
        least: Boxes with lower scores are left out.
    """
    from PIL import Image, ImageDraw

    image, scale = shrink(image)
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    width = max(1, round(max(image.shape) / 400))
    font = _font(max(image.shape))
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
        room = draw.textlength(" ", font)
        x1, y1, x2, y2 = draw.textbbox((box[0] + room, box[1]), text, font)
        if len(chosen) >= _MANY and x2 + room - box[0] > sides[0]:
            continue
        # The strip reaches as far below the text as above.
        draw.rectangle(
            (box[0], box[1], x2 + room, y1 + y2 - box[1]), fill=_color(label)
        )
        # The weights are those of brightness in Rec. 601.
        bright = np.dot(_color(label), (0.299, 0.587, 0.114)) > 140
        draw.text(
            (box[0] + room, box[1]),
            text,
            fill="black" if bright else "white",
            font=font,
        )
    return np.asarray(picture)


def mask_picture(
    image: np.ndarray,
    ids: np.ndarray,
    classes: Sequence[str],
    share: float = 0.5,
) -> np.ndarray:
    """Returns a copy of an image in the colours of classes; void is gray.

    Class 0 has no colour if it is called "background" or "_background_".

    Args:
        image: `(h, w, 3)` uint8.
        ids: `(h, w)` classes.
        classes: Names of the classes.
        share: Weight of the colours.
    """
    ids = np.clip(ids, 0, VOID)
    shares = np.full((VOID + 1, 1), share, "float32")
    if _is_clear(classes):
        shares[0] = 0
    mixed = (1 - shares)[ids] * image + (shares * _COLORS)[ids]
    return shrink(np.round(mixed).astype("uint8"))[0]


def with_legend(
    picture: np.ndarray, ids: Sequence[int], classes: Sequence[str]
) -> np.ndarray:
    """Returns a picture above the colours and names of its classes.

    The result is wider than the picture where a name has no room.

    Args:
        picture: `(h, w, 3)` uint8.
        ids: The classes to name.
        classes: Names of the classes.
    """
    from PIL import Image, ImageDraw

    font = _font(len(picture))
    side = round(font.size)
    names = ["void" if i == VOID else classes[i] for i in ids]
    # A square, its distance, the text, and the distance to the next square.
    lengths = [round(2.5 * side + font.getlength(name)) for name in names]
    width = max(picture.shape[1], side // 2 + max(lengths))
    places, x, y = [], side // 2, len(picture) + side // 2
    for length in lengths:
        if x + length > width:
            x, y = side // 2, y + side * 3 // 2
        places.append((x, y))
        x += length
    result = Image.new("RGB", (width, y + side * 3 // 2), "white")
    result.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(result)
    for i, name, (x, y) in zip(ids, names, places):
        clear = i == 0 and _is_clear(classes)
        draw.rectangle(
            (x, y, x + side, y + side),
            fill="white" if clear else tuple(_COLORS[i].tolist()),
            outline="black",
        )
        draw.text(
            (x + 1.5 * side, y + side / 2), name, "black", font, anchor="lm"
        )
    return np.asarray(result)


def write_mask(
    path: pathlib.Path, ids: np.ndarray, classes: Sequence[str]
) -> None:
    """Writes classes as the pixels of a PNG file with a palette.

    The colours are those of `mask_picture`, and black for a background.

    Args:
        path: The file.
        ids: `(h, w)` classes.
        classes: Names of the classes.

    Raises:
        ValueError: A class has no room in a byte.
    """
    from PIL import Image

    if ids.max() > VOID:
        raise ValueError(
            f"Expected classes of at most {VOID}, for masks in PNG files. "
            f"Received: {ids.max()}"
        )
    colors = _COLORS.copy()
    if _is_clear(classes):
        colors[0] = 0
    mask = Image.fromarray(ids.astype("uint8"))
    mask.putpalette(colors.tobytes())
    mask.save(path, format="PNG")


def side_by_side(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns pictures in a row, below their titles.

    Args:
        pictures: By title, `(h, w, 3)` uint8, all of one size.

    Returns:
        `(h + strip, n * w + gaps, 3)` uint8.
    """
    from PIL import Image, ImageDraw

    height, width = next(iter(pictures.values())).shape[:2]
    font = _font(height)
    strip = sum(font.getmetrics())
    size = (len(pictures) * (width + _GAP) - _GAP, height + strip)
    row = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(row)
    for index, (title, picture) in enumerate(pictures.items()):
        left = index * (width + _GAP)
        draw.text((left, 0), title, fill="black", font=font)
        # A title that is wider than its picture ends at the picture's edge.
        draw.rectangle((left + width, 0, size[0], strip - 1), "white")
        row.paste(Image.fromarray(picture), (left, strip))
    return np.asarray(row)


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
