# SPDX-License-Identifier: Apache-2.0
"""Writes a page that shows where a model looks for the pixel pointed at."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _files
from tf_deform._keras import keras
from tf_deform.visualization import _walk

_TEMPLATE = pathlib.Path(__file__).with_name("explorer.html")
# Places are rounded to so many pixels of the photograph, to the next number if
# the page would be larger.
_LARGEST = 5_000_000
_PRECISIONS = (1 / 16, 1 / 4, 1)
_WEIGHT_STEP = 1 / 128
_MOST = 2**15 - 1
_QUALITY = 85  # of the photographs, as JPEG


def explorer(
    model: keras.Model,
    images: Any,
    path: str | os.PathLike,
    photos: Any = None,
    layers: Any = None,
    title: str = "Where it looks",
) -> None:
    """Writes a page to point at a pixel and see where a model samples for it.

    For the pixel under the pointer, or under a cross that arrow keys move, the
    page shows every deformable layer's sampling points with their weights, and
    what the whole stack reaches: the points of the layers before that the
    points are made of, down to the first one's. The numbers stand in tables,
    too. The page is one file that needs no other and no network; any browser
    since 2023 shows it.

        tf_deform.visualization.explorer(model, images, "explorer.html")

    Locations are rounded, to 1/16 pixel, or to up to a pixel where the page
    would be larger than 5 MB; the page tells by how much.

    Args:
        model: A built model with one input.
        images: What the model is called with, `(batch, height, width,
            channels)`, or channels first if that is Keras' format of images.
        path: The file to write.
        photos: `(batch, height, width, 1 or 3)`, values 0 to 255: what is
            shown, of the size of `images`. None: `images`, whose values are
            spread from black to white unless they are 0 to 255 already.
        layers: The convolutions that are shown. None: all deformable ones. A
            regular expression of their paths, several, a function of a layer,
            or layers, which may be plain.
        title: The page's title.

    Raises:
        TypeError: An argument has another type.
        ValueError: Shapes do not fit, or the model calls none of the layers.
        OSError: The file cannot be written.
    """
    path = _files.to_path(path)
    if not isinstance(title, str):
        raise TypeError(f"Expected `title` to be a str. Received: {title!r}")
    _walk.choose(model, layers)
    images = _walk.to_images(images)
    shown = _walk.photographs(images, photos)
    calls = _walk.walk(model, images, layers)
    for precision in _PRECISIONS:
        page = _page(calls, shown, title, precision)
        if len(page) <= _LARGEST:
            break
    with _files.writing(path) as target:
        target.write_text(page, encoding="utf-8")


def _page(
    calls: Sequence[_walk.Call],
    photos: np.ndarray,
    title: str,
    precision: float,
) -> str:
    layers, fields = [], []
    for call in calls:
        taps = _taps(call.layer)
        regular = call.inputs.cells(call.outputs.place(_cells(call.size)))
        moved = call.locations - (regular[:, :, None, None, :] + taps)
        pixels = precision / max(call.inputs.step)
        steps = [_step(moved, pixels), _step(call.modulation, _WEIGHT_STEP)]
        weights = call.modulation[..., None] / steps[1]
        values = np.concatenate((moved / steps[0], weights), -1)
        # Neighbours are alike, and compressed best side by side.
        fields.append(_whole(np.transpose(values, (0, 5, 3, 4, 1, 2))))
        layers.append(
            {
                "name": call.name,
                "size": call.size,
                "start": call.outputs.start,
                "step": call.outputs.step,
                "inputStart": call.inputs.start,
                "inputSize": call.input_size,
                "scale": call.inputs.step,
                "groups": call.locations.shape[3],
                "taps": taps.tolist(),
                "previous": call.previous,
                "offsetStep": steps[0],
                "weightStep": steps[1],
            }
        )
    data = {
        "title": title,
        "layers": layers,
        "height": photos.shape[1],
        "width": photos.shape[2],
        "images": [
            {
                "photo": _base64(
                    tf.io.encode_jpeg(photo, quality=_QUALITY).numpy()
                ),
                "fields": _base64(
                    _compressed([each[index] for each in fields])
                ),
            }
            for index, photo in enumerate(photos)
        ],
    }
    # "<" could end the script that holds the data.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text)


def _cells(size: Sequence[int]) -> np.ndarray:
    return np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)


def _taps(layer: Any) -> np.ndarray:
    """Returns the regular places of taps around a window's centre."""
    axes = [
        rate * (np.arange(count) - (count - 1) / 2)
        for count, rate in zip(layer.kernel_size, layer.dilation_rate)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)


def _step(values: np.ndarray, wanted: float) -> float:
    """Returns the number of which 16-bit numbers are multiples."""
    finite = np.where(np.isfinite(values), abs(values), 0)
    return max(float(finite.max(initial=0)) / _MOST, wanted)


def _whole(values: np.ndarray) -> np.ndarray:
    """Returns whole numbers; what is no number becomes the least one."""
    values = np.where(np.isfinite(values), np.rint(values), -_MOST - 1)
    return values.astype("<i2")


def _compressed(fields: Sequence[np.ndarray]) -> bytes:
    """Compresses numbers: low bytes first, as high bytes are mostly alike."""
    content = np.concatenate([each.reshape(-1) for each in fields])
    return zlib.compress(content.view("u1").reshape(-1, 2).T.tobytes(), 9)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
