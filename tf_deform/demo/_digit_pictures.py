# SPDX-License-Identifier: Apache-2.0
"""Draws what the models of digits find, and where they look."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import data, visualization
from tf_deform._keras import keras
from tf_deform.demo import _digit_scenes, _pictures
from tf_deform.demo._digit_models import DEFORMED, DIGITS
from tf_deform.models import _boxes

_SHOWN = 6  # scenes, or digits
_INCHES = 1.9  # the side of a picture
_LEAST_SCORE = 0.3
Models = Mapping[str, keras.Model]


def draw(
    out: pathlib.Path, task: str, models: Models, part: pathlib.Path
) -> None:
    """Draws all pictures of a task.

    Args:
        out: Folder for the PNG files.
        task: "segment" or "detect".
        models: Models by the name of their arm, the most deformable one last.
        part: A part of the scenes.
    """
    boxes = _digit_scenes.read(part, "detect")
    *_, last = models.values()
    if task == "segment":
        scenes = _digit_scenes.read(part, "segment").photographs[:_SHOWN]
        draw_predictions(out / "predictions.png", models, scenes)
        draw_sampling(out / "sampling.png", models, boxes.photographs)
        return
    scenes = boxes.photographs[:_SHOWN]
    draw_detections(out / "detections.png", models, scenes)
    if last.pooling == "deform":
        draw_parts(out / "parts.png", last, scenes)


def draw_predictions(
    path: pathlib.Path, models: Models, scenes: tuple[Any, ...]
) -> None:
    """Draws a column for each scene: image, true classes, each model's.

    Args:
        path: PNG file to write.
        models: Segmenters by name.
        scenes: Photographs with masks.
    """
    import matplotlib
    import matplotlib.colors
    import matplotlib.patches

    images = _read(scenes)
    rows = {"truth": [data.read_mask(p.mask)[..., 0] for p in scenes]}
    for name, model in models.items():
        rows[name] = model.predict_on_batch(images).argmax(-1)
    figure, grid = _pictures.make_figure(1 + len(rows), len(scenes), _INCHES)
    for ax, image in zip(grid[0], images):
        ax.imshow(image / 255)
    grid[0, 0].set_title("image")
    # Of the background and the digits.
    colors = matplotlib.colors.ListedColormap(
        ["black", *matplotlib.colormaps["tab10"].colors]
    )
    for axes, (name, classes) in zip(grid[1:], rows.items()):
        axes[0].set_title(name)
        for ax, ids in zip(axes, classes):
            ax.imshow(ids, colors, vmin=0, vmax=10, interpolation="nearest")
    figure.legend(
        handles=[
            matplotlib.patches.Patch(color=colors(1 + i), label=digit)
            for i, digit in enumerate(DIGITS)
        ],
        loc="outside lower center",
        ncols=len(DIGITS),
        handlelength=1,
    )
    _pictures.save(figure, path)


def draw_sampling(
    path: pathlib.Path, models: Models, scenes: tuple[Any, ...]
) -> None:
    """Draws where the last two convolutions look for the centres of digits.

    Args:
        path: PNG file to write.
        models: Segmenters by name, a row each.
        scenes: Photographs with boxes, from which digits are chosen, from small
            to large.
    """
    found = [(scene, box) for scene in scenes for box in scene.boxes]
    found.sort(key=lambda pair: (pair[1][2:] - pair[1][:2]).max())
    ranks = np.linspace(0.1, 1, _SHOWN) * (len(found) - 1)
    chosen = [found[int(rank)] for rank in ranks]
    images = _read([scene for scene, _ in chosen])
    figure, grid = _pictures.make_figure(len(models), len(chosen), _INCHES)
    for axes, (name, model) in zip(grid, models.items()):
        for ax, image, (_, box) in zip(axes, images, chosen):
            x, y = (box[:2] + box[2:]) / 2 - 0.5
            visualization.plot_sampling(
                model.backbone, image, (y, x), DEFORMED, depth=2, ax=ax
            )
            _pictures.draw_box(ax, box, edgecolor="white")
        axes[0].set_title(name)
    _pictures.save(figure, path)


def draw_detections(
    path: pathlib.Path, models: Models, scenes: tuple[Any, ...]
) -> None:
    """Draws a column for each scene: true boxes, then each model's.

    Args:
        path: PNG file to write.
        models: Detectors by name. Boxes of a score below .3 are left out.
        scenes: Photographs with boxes.
    """
    images = _read(scenes)
    rows = {"truth": [(p.boxes, p.labels, p.labels + 1) for p in scenes]}
    for name, model in models.items():
        found = model.detect(images)
        rows[name] = list(zip(found["boxes"], found["labels"], found["scores"]))
    figure, grid = _pictures.make_figure(len(rows), len(scenes), _INCHES)
    for axes, (name, found) in zip(grid, rows.items()):
        for ax, image, objects in zip(axes, images, found):
            ax.imshow(image / 255)
            _draw_objects(ax, *objects)
        axes[0].set_title(name)
    _pictures.save(figure, path)


def _draw_objects(
    ax: Any, boxes: np.ndarray, labels: np.ndarray, scores: np.ndarray
) -> None:
    """Draws boxes, and above them their digits and scores below 1."""
    import matplotlib

    colors = matplotlib.colormaps["tab10"].colors
    for box, label, score in zip(boxes, labels, scores):
        if score < _LEAST_SCORE:
            continue
        _pictures.draw_box(ax, box, edgecolor=colors[label])
        text = DIGITS[label] if score >= 1 else f"{DIGITS[label]} {score:.2f}"
        # Where there is no room above the box, the text is inside.
        ax.text(
            box[0] - 0.5,
            max(box[1] - 0.5, 6),
            text,
            fontsize=6,
            color="white",
            verticalalignment="bottom",
            bbox={"facecolor": colors[label], "pad": 0.6, "linewidth": 0},
        )


def draw_parts(
    path: pathlib.Path, model: keras.Model, scenes: tuple[Any, ...]
) -> None:
    """Draws the bins of regions, where they are and where they are moved to.

    The region is the proposal that overlaps the largest digit of a scene most.

    Args:
        path: PNG file to write.
        model: A detector whose bins move.
        scenes: Photographs with boxes.
    """
    images = _read(scenes)
    outputs = model.trunk(images, training=False)
    score_maps, _, features = outputs["maps"]
    proposals = model._propose(outputs)
    figure, grid = _pictures.make_figure(1, len(scenes), 1.4 * _INCHES)
    for index, (ax, scene) in enumerate(zip(grid[0], scenes)):
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        largest = scene.boxes[sides.prod(1).argmax()]
        overlap = _boxes.overlaps(
            proposals[index : index + 1], tf.constant(largest[None, None])
        )
        region = proposals[index, int(tf.argmax(overlap[0, :, 0]))].numpy()
        visualization.plot_roi_parts(
            model.poolings[0],
            score_maps,
            (index, *region[:2], *region[2:] - 1),
            photo=images[index],
            trans_inputs=features,
            ax=ax,
        )
        # All windows are squares inside the image.
        size = images.shape[1]
        reach = min(0.8 * (region[2:] - region[:2]).max(), size / 2)
        middle = (region[:2] + region[2:]) / 2
        x, y = np.clip(middle, reach, size - reach) - 0.5
        ax.set_xlim(x - reach, x + reach)
        ax.set_ylim(y + reach, y - reach)
    _pictures.save(figure, path)


def _read(scenes: Any) -> np.ndarray:
    """Returns `(scenes, 64, 64, 3)` float32."""
    images = np.stack([data.read_image(scene.path) for scene in scenes])
    return images.astype("float32")
