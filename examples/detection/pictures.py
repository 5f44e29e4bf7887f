# SPDX-License-Identifier: Apache-2.0
"""Draws detections of models, and how their pooling moves its bins."""

import pathlib

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from detection import detector
from keras.utils import bounding_boxes
from matplotlib.patches import Rectangle
from pictures import show

import tf_deform

_COLORS = plt.get_cmap("tab10").colors
_LEAST_SCORE = 0.3


def _draw_box(axes, box: np.ndarray, **style) -> None:
    """Draws a box given by its corners, between pixels."""
    x1, y1, x2, y2 = box - 0.5
    style = {"fill": False, "linewidth": 1.2, **style}
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))


def _draw_objects(axes, boxes, labels, scores=None) -> None:
    """Draws boxes with the digits of their labels."""
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        # Class 0 is the background.
        digit = int(label) - 1
        _draw_box(axes, box, edgecolor=_COLORS[digit])
        text = f"{digit}" if scores is None else f"{digit} {scores[i]:.2f}"
        # Writes above the box, or inside where there is no room.
        x, y = box[0] - 0.5, box[1] - 0.5
        axes.text(
            x,
            max(y, 5),
            text,
            fontsize=6,
            color="white",
            verticalalignment="bottom",
            bbox={"facecolor": _COLORS[digit], "pad": 0.6, "linewidth": 0},
        )


def draw_detections(
    path: pathlib.Path,
    images: np.ndarray,
    truth: dict[str, np.ndarray],
    models: dict[str, detector.Detector],
) -> None:
    """Draws one column per scene: true boxes, then each model's detections.

    Args:
        path: PNG file to write.
        images: `(batch, size, size, 1)` uint8 gray values.
        truth: the objects, as `Detector.compute_loss` takes them.
        models: models by name.
    """
    figure, grid = plt.subplots(
        1 + len(models),
        len(images),
        figsize=(2 * len(images), 2.15 * (1 + len(models))),
        squeeze=False,
    )
    rows = {
        "truth": {
            **truth,
            "scores": [None] * len(images),
            "valid": np.sum(truth["labels"] > 0, axis=1),
        }
    }
    for name, model in models.items():
        found = {
            key: value.numpy() for key, value in model.detect(images).items()
        }
        # The detections are sorted, the best first.
        shown = np.sum(found["scores"] >= _LEAST_SCORE, axis=1)
        rows[name] = {**found, "valid": shown}
    for axes, (name, found) in zip(grid, rows.items(), strict=True):
        for i, ax in enumerate(axes):
            show(ax, images[i, ..., 0], name if i == 0 else "")
            count = found["valid"][i]
            _draw_objects(
                ax,
                found["boxes"][i][:count],
                found["labels"][i][:count],
                found["scores"][i],
            )
    figure.suptitle(
        f"Detections with a score of {_LEAST_SCORE} or more", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def shifted_bins(
    model: detector.Detector, image: np.ndarray, box: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bins of a region, and where the model moves them.

    Args:
        model: a model whose bins move.
        image: `(size, size, 1)` uint8 gray values.
        box: `(4,)` the region.

    Returns:
        Regular and moved bins, both `(bins, bins, 4)` boxes in pixels.
    """
    layer = model.get_layer("head").score_pooling
    *_, features = model(image[None], training=False)["maps"]
    rois = detector.to_rois(tf.constant(box, "float32")[None, None])
    fields = tf.nn.bias_add(
        tf.nn.conv2d(features, layer.offset_kernel, 1, "SAME"),
        layer.offset_bias,
    )
    trans = tf_deform.ops.deformable_psroi_pool(
        fields,
        rois,
        output_dim=2,
        spatial_scale=1 / detector.STRIDE,
        pooled_size=detector.BINS,
    )[0].numpy()
    # The layer rounds corners to pixels.
    corners = np.floor(np.asarray(box) + 0.5).reshape(2, 2)
    size = corners[1] - corners[0]
    index = np.arange(detector.BINS)
    x, y = np.meshgrid(index, index)
    starts = corners[0] + np.stack((x, y), axis=-1) * size / detector.BINS
    bins = np.concatenate((starts, starts + size / detector.BINS), axis=-1)
    shifts = trans[..., ::-1] * layer.trans_std * size
    return bins, bins + np.tile(shifts, 2)


def draw_parts(
    path: pathlib.Path,
    images: np.ndarray,
    truth: dict[str, np.ndarray],
    model: detector.Detector,
) -> None:
    """Draws regular and moved bins for an object of each image.

    The region is the proposal that overlaps the object most, drawn dotted. The
    bins have the corners that the pooling uses, rounded to pixels.

    Args:
        path: PNG file to write.
        images: `(batch, size, size, 1)` uint8 gray values.
        truth: the objects; the largest object of each image is drawn.
        model: a model whose bins move.
    """
    proposals = model(images, training=False)["proposals"]
    overlaps = bounding_boxes.compute_iou(truth["boxes"], proposals, "xyxy")
    overlaps = overlaps.numpy()
    figure, grid = plt.subplots(
        2, len(images), figsize=(2.4 * len(images), 5.2), squeeze=False
    )
    colors = plt.get_cmap("Set1").colors
    for i, (image, column) in enumerate(zip(images, grid.T, strict=True)):
        width, height = np.split(
            truth["boxes"][i, :, 2:] - truth["boxes"][i, :, :2], 2, axis=-1
        )
        largest = np.argmax(width * height)
        region = proposals[i, np.argmax(overlaps[i, largest])]
        for ax, bins, title in zip(
            column,
            shifted_bins(model, image, region),
            ("regular bins", "moved bins"),
            strict=True,
        ):
            show(ax, image[..., 0], title if i == 0 else "")
            _draw_box(ax, region.numpy(), edgecolor="white", linestyle=":")
            for box, color in zip(bins.reshape(-1, 4), colors, strict=True):
                _draw_box(ax, box, edgecolor=color)
            # Draws a square window, so that all pictures have the same size.
            x1, y1, x2, y2 = region.numpy()
            reach = 0.75 * max(x2 - x1, y2 - y1)
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            ax.set_xlim(x - reach, x + reach)
            ax.set_ylim(y + reach, y - reach)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
