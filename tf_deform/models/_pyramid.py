# SPDX-License-Identifier: Apache-2.0
"""Builds the parts of a detector between its backbone and its regions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform._keras import KerasTensor, keras
from tf_deform.models import _backbones

_NAME = re.compile("P[2-9]")  # of a map of stride 4 or more

# The bias that scores of objects start with: one in a hundred.
# Source: Lin et al. 2017, "Focal Loss", arXiv:1708.02002, section 3.3.
_PRIOR = -4.6

Maps = dict[str, KerasTensor]


def as_pyramid(backbone: Any, image_size: int) -> keras.Model:
    """Returns a model whose outputs are a dictionary of maps, "P2" and so on.

    Args:
        backbone: A model with such outputs, or with 2 to 4 outputs of which
            the last is P5; or what `tf_deform.models.backbone` takes.
        image_size: Pixels.

    Raises:
        TypeError: It is neither a model nor a name.
        ValueError: It has no such outputs.
    """
    outputs = getattr(backbone, "output", None)
    if isinstance(outputs, (list, tuple)) and 1 < len(outputs) < 5:
        first = 6 - len(outputs)
        outputs = {f"P{first + i}": x for i, x in enumerate(outputs)}
        backbone = keras.Model(backbone.inputs, outputs, name=backbone.name)
    elif not isinstance(outputs, Mapping):
        return _backbones.backbone(backbone, image_size=image_size)
    if not all(_NAME.fullmatch(str(name)) for name in outputs):
        raise ValueError(
            'Expected `backbone` to have the outputs "P2" to "P5" or some of '
            f"them. Received: {backbone.name!r} with {sorted(outputs)}"
        )
    return backbone


def level_of(name: str) -> int:
    """Returns the number in a map's name."""
    return int(name[1:])


def stride_of(maps: KerasTensor, image_size: int) -> int:
    """Returns the stride of a map of an image, a power of two.

    Args:
        maps: A map that covers the image, or lacks a part of its border.
        image_size: Height and width of the image in pixels.
    """
    nearest = 2 ** round(math.log2(image_size / maps.shape[1]))
    # A small map may have much more than its share of the image.
    if math.ceil(image_size / (2 * nearest)) == maps.shape[1]:
        return 2 * nearest
    return nearest


def convolution(filters: int, size: int, **arguments: Any) -> Any:
    """Returns a convolution in channels last, whatever Keras' setting is."""
    return keras.layers.Conv2D(
        filters,
        size,
        padding="same",
        data_format="channels_last",
        **arguments,
    )


def build_fpn(maps: Mapping[str, KerasTensor], channels: int, dtype: Any):
    """Adds the coarser maps to the finer ones, all with the same channels.

    Source: Lin et al. 2016, "Feature Pyramid Networks for Object Detection",
    arXiv:1612.03144, section 3; the last map, every second pixel of the one
    before, section 4.1.

    Args:
        maps: Maps, the finest first, each half the size of the one before.
        channels: Number of channels of all results.
        dtype: Policy of the layers.

    Returns:
        Maps of the same names, and one more, of half the size of the last one.

    Raises:
        ValueError: Sizes are not halves.
    """
    options = {"data_format": "channels_last", "dtype": dtype}
    merged: Maps = {}
    above = None
    for name in reversed(maps):
        lateral = convolution(
            channels, 1, dtype=dtype, name=f"fpn_lateral_{name}"
        )
        x = lateral(maps[name])
        if above is not None:
            rows, columns = x.shape[1:3]
            up = keras.layers.UpSampling2D(2, **options)(above)
            extra = [[0, up.shape[1] - rows], [0, up.shape[2] - columns]]
            if not 0 <= extra[0][1] <= 1:
                raise ValueError(
                    f"Expected the map {name} to have twice the cells of the "
                    f"next one. Received: {rows} and {above.shape[1]}"
                )
            if extra != [[0, 0], [0, 0]]:  # of maps of odd sizes
                up = keras.layers.Cropping2D(extra, **options)(up)
            x = keras.layers.Add(dtype=dtype)([x, up])
        merged[name] = above = x
    outputs: Maps = {}
    for name in maps:
        smooth = convolution(
            channels, 3, dtype=dtype, name=f"fpn_output_{name}"
        )
        outputs[name] = smooth(merged[name])
    half = keras.layers.MaxPooling2D(1, 2, **options)
    outputs[f"P{level_of(name) + 1}"] = half(outputs[name])
    return outputs


def prior_of_classes(classes: int, cells: int = 1) -> Callable[..., tf.Tensor]:
    """Returns an initializer of the bias of scores that a softmax reads.

    Regions without an object are the most by far: each class starts with odds
    of one in a hundred against the background, which comes last.

    Args:
        classes: Number of classes, without background.
        cells: Number of biases of each class, and of the background.
    """

    def initialize(shape: Any, dtype: Any = None, **_: Any) -> tf.Tensor:
        values = np.repeat([_PRIOR] * classes + [0.0], cells)
        return tf.ensure_shape(tf.constant(values, dtype or "float32"), shape)

    return initialize


def build_rpn(
    maps: Mapping[str, KerasTensor], anchors: int, channels: int, dtype: Any
) -> tuple[list[KerasTensor], list[KerasTensor]]:
    """Judges the anchors of all maps by the same weights.

    Source: Ren et al. 2015, "Faster R-CNN", arXiv:1506.01497, section 3.1.

    Args:
        maps: Maps of the same channels.
        anchors: Number of anchors of a cell.
        channels: Channels of the hidden layer.
        dtype: Policy of the layers.

    Returns:
        For each map, `(batch, height * width * anchors)` logits, and
        `(batch, height * width * anchors, 4)` deltas, both in the compute
        dtype.
    """

    def make(filters: int, size: int, name: str, **arguments: Any) -> Any:
        start = keras.initializers.RandomNormal(stddev=0.01)
        return convolution(
            filters,
            size,
            kernel_initializer=start,
            dtype=dtype,
            name=name,
            **arguments,
        )

    hidden = make(channels, 3, "rpn_hidden", activation="relu")
    prior = keras.initializers.Constant(_PRIOR)
    score = make(anchors, 1, "rpn_objectness", bias_initializer=prior)
    move = make(4 * anchors, 1, "rpn_deltas")
    objectness, deltas = [], []
    for maps_of_level in maps.values():
        x = hidden(maps_of_level)
        flat = keras.layers.Reshape((-1,), dtype=dtype)
        rows = keras.layers.Reshape((-1, 4), dtype=dtype)
        objectness.append(flat(score(x)))
        deltas.append(rows(move(x)))
    return objectness, deltas
