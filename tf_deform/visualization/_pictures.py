# SPDX-License-Identifier: Apache-2.0
"""Draws where a model looks, with Matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from tf_deform._keras import keras
from tf_deform.ops._arguments import plain, positive, real, received
from tf_deform.visualization import _rois, _tree, _walk

# From the last layer down: yellow, orange, red, and on.
_COLORS = ("#ffe34d", "#ff9d2e", "#ff2b2b", "#d81b8c", "#7b3ff2")


def pyplot() -> ModuleType:
    """Imports Matplotlib.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        import matplotlib.pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Expected Matplotlib to be installed, for pictures. Received: "
            f"{error}. Run `pip install 'tf-deform[plots]'`"
        ) from error
    return matplotlib.pyplot


def plot_sampling(
    model: keras.Model,
    image: Any,
    point: Sequence[float],
    layers: Any = None,
    depth: int = 3,
    photo: Any = None,
    ax: Any = None,
) -> Any:
    """Draws the tree of samples of a model for one point of an image.

    The last of the layers samples its input for the cell that is nearest to
    `point`; the layer before samples for each of these samples, and so on, down
    to the first. Each layer has a colour, from yellow for the last to red; the
    area of a dot grows with the weight of the sample, which is the product of
    the modulations on its way. Samples between cells count for all four cells
    around them. Plain layers between are taken to look straight down.

        ax = tf_deform.visualization.plot_sampling(model, image, (120, 200))
        ax.figure.savefig("sampling.png")

    Args:
        model: A built model with one input.
        image: `(height, width, channels)`, what the model takes, or channels
            first if that is Keras' format of images.
        point: (y, x) in pixels of the image.
        layers: The convolutions of the tree. None: all deformable ones. A
            regular expression of their paths, several, a function of a layer,
            or layers, which may be plain.
        depth: How many layers the tree has, from the last one down.
        photo: What is drawn, `(height, width, 1 or 3)` with values 0 to 255.
            None: `image`.
        ax: The axes to draw on. None: new ones.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
        TypeError: An argument has another type.
        ValueError: Shapes do not fit, or the model calls none of the layers.
    """
    plt = pyplot()
    point = _point(point)
    depth = positive(depth, "depth")
    _walk.choose(model, layers)
    images = _walk.to_images(image, 3)
    photo = None if photo is None else np.asarray(photo)[None]
    shown = _walk.photographs(images, photo)[0]
    calls = _walk.walk(model, images, layers)
    cell = calls[-1].nearest(point)
    levels = _tree.follow(calls, len(calls) - 1, cell, depth=depth)
    ax = _show(plt, ax, shown)
    for index, level in reversed(list(enumerate(levels))):
        # A dot of a mean weight has the area of the same dot in each layer.
        share = level.weights / max(level.weights.max(initial=0), 1e-12)
        ax.scatter(
            level.points[:, 1],
            level.points[:, 0],
            s=(36 / (index + 1)) * share,
            color=_COLORS[min(index, len(_COLORS) - 1)],
            edgecolors="black" if index == 0 else "none",
            linewidths=0.5,
            label=level.call.name,
            zorder=3 + len(levels) - index,
        )
    center = calls[-1].outputs.place(cell)
    ax.plot(center[1], center[0], "+", color="cyan", zorder=99)
    return ax


def plot_roi_parts(
    layer: keras.layers.Layer,
    inputs: Any,
    roi: Sequence[float],
    photo: Any = None,
    displacements: Any = None,
    trans_inputs: Any = None,
    ax: Any = None,
) -> Any:
    """Draws where a layer moves the parts of a region.

    The regular bins are dotted, the moved ones coloured.

    Args:
        layer: A `DeformableROIAlign`, `DeformableROIPooling` or
            `DeformablePSROIPooling`.
        inputs: The map that it is called with, a batch of one or more.
        roi: `(5,)`, (batch_index, x1, y1, x2, y2), in pixels of the image.
        photo: What is drawn, `(height, width, 1 or 3)` with values 0 to 255.
            None: the bins alone.
        displacements: What the layer is called with as `offset` or `trans`, if
            it is given any: those of this region, a batch of one.
        trans_inputs: What a `DeformablePSROIPooling` is called with.
        ax: The axes to draw on. None: new ones.

    Returns:
        The axes.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
        TypeError: An argument has another type.
        ValueError: Shapes do not fit.
    """
    plt = pyplot()
    bins, moved = _rois.parts(layer, inputs, roi, displacements, trans_inputs)
    if photo is not None:
        height, width = np.shape(photo)[:2]
        photo = _walk.check_photos(np.asarray(photo)[None], (1, height, width))
        photo = photo[0]
    ax = _show(plt, ax, photo)
    colors = plt.get_cmap("tab20").colors
    for index, (before, after) in enumerate(zip(bins, moved)):
        color = colors[index % len(colors)]
        _box(plt, ax, before, edgecolor="white", linestyle=":", linewidth=0.8)
        _box(plt, ax, after, edgecolor=color, linewidth=1.2)
    if photo is None:
        ends = np.concatenate((bins, moved)).reshape(-1, 2, 2)
        low, high = ends.min((0, 1)), ends.max((0, 1))
        ax.set_xlim(low[0], high[0])
        ax.set_ylim(high[1], low[1])
        ax.set_facecolor("gray")
    return ax


def _box(plt: ModuleType, ax: Any, box: np.ndarray, **style: Any) -> None:
    x1, y1, x2, y2 = box
    ax.add_patch(plt.Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))


def _show(plt: ModuleType, ax: Any, photo: np.ndarray | None) -> Any:
    if ax is None:
        ax = plt.subplots()[1]
    if photo is not None:
        gray = photo.shape[-1] == 1
        shown = photo[..., 0] if gray else photo
        ax.imshow(shown, cmap="gray" if gray else None, vmin=0, vmax=255)
        # A margin shows points outside of the image, which read zeros.
        height, width = photo.shape[:2]
        margin = max(height, width) / 8
        ax.set_xlim(-0.5 - margin, width - 0.5 + margin)
        ax.set_ylim(height - 0.5 + margin, -0.5 - margin)
    ax.set_axis_off()
    return ax


def _point(point: Any) -> tuple[float, float]:
    values = plain(point)
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise ValueError(f"Expected `point` to be (y, x). {received(point)}")
    return (real(values[0], "point"), real(values[1], "point"))
