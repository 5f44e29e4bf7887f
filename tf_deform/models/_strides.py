# SPDX-License-Identifier: Apache-2.0
"""Measures at which stride of the image each layer of a model works."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import tensorflow as tf

from tf_deform import _keras
from tf_deform._keras import keras

# Pixels, of sizes that a model leaves open. Strides come out as they are with
# any size that is large beside them.
_SIZE = 256
# Layers that make one pixel of a map, if it stays a map.
_MEANS = (
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
)
OPEN = 99  # ends a range of stages that has no end


@dataclasses.dataclass(frozen=True)
class Call:
    """Describes a call of a layer on maps.

    Attributes:
        layer: The layer.
        before, after: Binary logarithms of the strides of its input and its
            output: 3 for a pixel of the map for each 8 x 8 pixels of the
            image.
        is_inside: Whether the call comes before the model's maps grow finer
            again, as in a pyramid or a decoder.
        source: The layer whose output is the input, or None.
    """

    layer: Any
    before: int
    after: int
    is_inside: bool
    source: Any = None


def measure(model: Any) -> list[Call]:
    """Returns the calls of all layers on maps, in their order.

    Nothing is computed: the model is traced once.

    Raises:
        ValueError: The model cannot be traced.
    """
    found: list[tuple[Any, Any, Any]] = []
    original = keras.layers.Layer.__call__

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, *args, **kwargs)
        first = args[0] if args else next(iter(kwargs.values()), None)
        found.append((self, first, outputs))
        return outputs

    inputs = _signature(model)
    specs = [_spec(value) for value in _keras.tree.flatten(inputs)]

    def run(*images: tf.Tensor) -> Any:
        return model(
            _keras.tree.pack_sequence_as(inputs, list(images)), training=False
        )

    with mock.patch.object(keras.layers.Layer, "__call__", record):
        try:
            tf.function(run, autograph=False).get_concrete_function(*specs)
        except Exception as error:
            shapes = ", ".join(str(tuple(spec.shape)) for spec in specs)
            raise ValueError(
                f"Expected model {model.name!r} to run on inputs of the shapes "
                f"{shapes}, by which its strides are measured. Received: "
                f"{type(error).__name__}: {error}. Say which layers by `layers`"
            ) from error
        finally:
            _keras.clear_losses(model)  # tensors of the trace
    return list(_calls(found))


def _calls(found: Sequence[tuple[Any, Any, Any]]) -> Iterator[Call]:
    levels: dict[tuple[int, int], int] = {}
    coarsest = 0
    is_inside = True
    # Tensors are compared by identity; `found` keeps them alive.
    sources: dict[int, Any] = {}
    means: set[int] = set()
    padded: dict[int, tuple[int, int]] = {}  # sizes before padding
    for layer, inputs, outputs in found:
        source = sources.get(id(inputs))
        sources[id(outputs)] = layer
        # A map's mean that weighs its channels is no coarser map.
        if id(inputs) in means or isinstance(layer, _MEANS):
            means.add(id(outputs))
            continue
        sizes = [_spatial(layer, value) for value in (inputs, outputs)]
        if None in sizes:
            continue
        if not levels:
            levels[sizes[0]] = 0
        before = _level(levels, sizes[0], next(iter(levels)))
        # Padding may double a small map, but makes no finer one.
        if isinstance(layer, keras.layers.ZeroPadding2D):
            levels.setdefault(sizes[1], before)
            padded[id(outputs)] = sizes[0]
        after = _level(levels, sizes[1], padded.get(id(inputs), sizes[0]))
        # A model's own call comes after those of its layers.
        if is_convolution(layer) and not _keras.sublayers(layer):
            is_inside = is_inside and after >= coarsest
            coarsest = max(coarsest, after)
        yield Call(layer, before, after, is_inside, source)


def _level(
    levels: dict[tuple[int, int], int],
    size: tuple[int, int],
    known: tuple[int, int],
) -> int:
    """Returns the level of maps of a size, beside that of a known one.

    Maps grow coarser step by step: of 40 pixels, stride 32 leaves 2, and not
    1.25, while the last step from 3 to 2 is one of 2.
    """
    if size not in levels:
        ratio = max(known) / max(*size, 1)
        step = round(math.log2(ratio)) if ratio else 0
        levels[size] = levels[known] + step
    return levels[size]


def _spatial(layer: Any, value: Any) -> tuple[int, int] | None:
    """Returns height and width of maps, or None."""
    shape = getattr(value, "shape", None)
    if shape is None or len(shape) != 4:
        return None
    data_format = getattr(layer, "data_format", None)
    data_format = data_format or keras.backend.image_data_format()
    height, width = shape[2:] if data_format == "channels_first" else shape[1:3]
    return None if None in (height, width) else (int(height), int(width))


def is_convolution(layer: Any) -> bool:
    """Tells whether a layer is any kind of two-dimensional convolution."""
    size = getattr(layer, "kernel_size", None)
    return isinstance(size, (tuple, list)) and len(size) == 2


def _signature(model: Any) -> Any:
    """Returns the structure of a model's inputs, with their shapes."""
    try:
        inputs = model.input
    except (AttributeError, ValueError):
        inputs = None
    if inputs is not None:
        return inputs
    shape = _keras.shape_of_build(model)
    if shape is None:
        raise ValueError(
            f"Expected model {model.name!r} to have one input, or to have been "
            "built by a call with one. Received: a model whose input is not "
            "known. Say which layers by `layers`"
        )
    return tf.TensorSpec(shape, keras.backend.floatx())


def _spec(value: Any) -> tf.TensorSpec:
    shape = list(value.shape)
    sizes = [1] + [_SIZE] * (len(shape) - 1)
    known = [
        size if known is None else known for size, known in zip(sizes, shape)
    ]
    return tf.TensorSpec(known, value.dtype)


def parse(stages: Any) -> range | None:
    """Returns the levels of a text such as "c3-c5", "c5" or "c4-"."""
    found = isinstance(stages, str) and re.fullmatch(
        r"c(\d)(-(?:c(\d))?)?", stages
    )
    if not found:
        return None
    first, rest, last = found.groups()
    if rest and not last:
        return range(int(first), OPEN)
    return range(int(first), int(last or first) + 1)
