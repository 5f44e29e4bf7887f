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


def sampling_locations(
    model: keras.Model,
    image: np.ndarray,
    cell: tuple[int, int],
    layer_names: tuple[str, ...],
) -> np.ndarray:
    """Returns where successive convolutions of stride 1 sample for one output.

    The last layer reads its input at `K` locations; the layer before it reads
    at `K` further locations to compute each of these, and so on. At a location
    between cells the offsets of the nearest cell are used.

    Args:
        model: a model with one input.
        image: `(height, width, 1)`, input of the model.
        cell: row and column of the output of the last layer, in cells.
        layer_names: successive `Conv2D` or `DeformableConv2D` layers of `model`
            with stride 1, "same" padding and one offset group.

    Returns:
        `(n, 2)`, (y, x) in cells of the first layer's input. `n` is `K` to the
        power of the number of layers, without samples that start outside of the
        map.
    """
    layers = [model.get_layer(name) for name in layer_names]
    inputs = keras.Model(model.input, [layer.input for layer in layers])
    features = inputs(image[None])
    locations = np.array([cell], dtype=float)
    for layer, feature in zip(
        reversed(layers), reversed(features), strict=True
    ):
        rows, columns = (
            np.arange(size) - (size - 1) / 2 for size in layer.kernel_size
        )
        base = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
        base = base.reshape(-1, 2) * layer.dilation_rate
        height, width = feature.shape[1:3]
        offset = np.zeros((height, width, len(base), 2))
        if getattr(layer, "offset_kernel", None) is not None:
            branch = keras.ops.conv(
                feature,
                layer.offset_kernel,
                padding="same",
                dilation_rate=layer.dilation_rate,
            )
            branch = branch + layer.offset_bias
            branch = keras.ops.convert_to_numpy(branch)
            # The displacements come first, (dy, dx) per tap; a modulation may
            # follow.
            offset = branch[0, ..., : 2 * len(base)].reshape(offset.shape)
        nearest = np.rint(locations).astype(int)
        inside = np.all((nearest >= 0) & (nearest < (height, width)), axis=1)
        locations, (y, x) = locations[inside], nearest[inside].T
        locations = (locations[:, None] + base + offset[y, x]).reshape(-1, 2)
    return locations


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
        layer_names: see `sampling_locations`. The input of these layers must
            come from two 3x3 convolutions of stride 2 with "same" padding.
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
            center = np.array((y + (height - 1) / 2, x + (width - 1) / 2))
            # For an even size TensorFlow pads "same" at the end only. So cell i
            # of such a convolution has its centre at pixel 2 i + 1, and cell i
            # of two convolutions at pixel 2 (2 i + 1) + 1.
            cell = np.rint((center - 3) / 4).astype(int)
            cell = np.clip(cell, 0, np.array(image.shape[:2]) // 4 - 1)
            points = 4 * sampling_locations(model, image, cell, layer_names) + 3
            show(ax, image[..., 0], name if ax is axes[0] else "")
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
            ax.plot(points[:, 1], points[:, 0], "o", color="red", markersize=2)
            ax.plot(4 * cell[1] + 3, 4 * cell[0] + 3, "+", color="cyan")
            # Leaves a margin to show points outside of the image, which read
            # zeros.
            ax.set_xlim(-8.5, image.shape[1] + 7.5)
            ax.set_ylim(image.shape[0] + 7.5, -8.5)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
