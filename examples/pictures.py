# SPDX-License-Identifier: Apache-2.0
"""Draws predictions of models, and where their convolutions sample."""

import pathlib

import keras
import numpy as np

try:
    import matplotlib
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Expected Matplotlib to be installed. "
        f"Received: {error}. Run `pip install 'tf-deform[examples]'`."
    ) from error

matplotlib.use("Agg")  # It writes pictures to files, and needs no display.

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from tf_deform import visualization

# The colours stand for the background and ten digits.
_COLORS = ListedColormap(["black", *plt.get_cmap("tab10").colors])


def show(axes, image: np.ndarray, title: str = "") -> None:
    """Draws a `(height, width)` image, gray values 0 to 255."""
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def draw_predictions(
    path: pathlib.Path,
    images: np.ndarray,
    truth: np.ndarray,
    predictions: dict[str, np.ndarray],
) -> None:
    """Draws one column per scene: image, true classes, each model's classes.

    Args:
        path: PNG file to write.
        images: `(batch, height, width, 1)`, gray values 0 to 255.
        truth: `(batch, height, width, 1)`, classes 0 to 10.
        predictions: classes by the model's name, `(batch, height, width)`.
    """
    rows = {"truth": truth[..., 0], **predictions}
    shape = (1 + len(rows), len(images))
    figure, grid = plt.subplots(
        *shape, figsize=(1.7 * shape[1], 1.9 * shape[0]), squeeze=False
    )
    for ax, image in zip(grid[0], images, strict=True):
        show(ax, image[..., 0], "image" if ax is grid[0, 0] else "")
    for axes, (name, classes) in zip(grid[1:], rows.items(), strict=True):
        for ax, scene in zip(axes, classes, strict=True):
            ax.imshow(
                scene, cmap=_COLORS, vmin=0, vmax=10, interpolation="nearest"
            )
            ax.set_title(name if ax is axes[0] else "", fontsize=9)
            ax.set_axis_off()
    figure.legend(
        handles=[
            Patch(color=_COLORS(digit + 1), label=str(digit))
            for digit in range(10)
        ],
        loc="lower center",
        ncols=10,
        fontsize=8,
        handlelength=1,
        columnspacing=1,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_sampling(
    path: pathlib.Path,
    images: np.ndarray,
    boxes: list[tuple[float, float, float, float]],
    models: dict[str, keras.Model],
    layer_names: tuple[str, ...],
) -> None:
    """Draws where models sample for the centre of a box; a row per model.

    Args:
        path: PNG file to write.
        images: `(batch, height, width, 1)`, gray values 0 to 255.
        boxes: for each image one box `(x, y, width, height)` in pixels.
        models: models by name.
        layer_names: successive convolutions of each model.
    """
    figure, grid = plt.subplots(
        len(models),
        len(images),
        figsize=(1.9 * len(images), 2.1 * len(models)),
        squeeze=False,
    )
    for axes, (name, model) in zip(grid, models.items(), strict=True):
        for ax, image, (x, y, width, height) in zip(
            axes, images, boxes, strict=True
        ):
            visualization.plot_sampling(
                model,
                image,
                (y + (height - 1) / 2, x + (width - 1) / 2),
                [model.get_layer(name) for name in layer_names],
                ax=ax,
            )
            ax.set_title(name if ax is axes[0] else "", fontsize=9)
            ax.add_patch(
                Rectangle(
                    (x - 0.5, y - 0.5),
                    width,
                    height,
                    fill=False,
                    edgecolor="yellow",
                    linewidth=0.8,
                )
            )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
