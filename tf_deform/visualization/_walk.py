# SPDX-License-Identifier: Apache-2.0
"""Runs a model on images, and finds where in the image its cells lie."""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import tensorflow as tf

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D
from tf_deform.layers._roi_layer import ROILayer
from tf_deform.models import _surgery
from tf_deform.ops._arguments import received
from tf_deform.visualization import _sampling

# A layer that is measured is asked for the places that so many cells read, in
# the middle: of a map that is enlarged 16 times, the cells of two pixels.
_CELLS = 32


@dataclasses.dataclass(frozen=True)
class Grid:
    """Tells where the cells of a map lie in another map, or in the image.

    Cell i has its centre at `start + step * i`, in pixels of the other, for
    (y, x).
    """

    start: tuple[float, float] = (0.0, 0.0)
    step: tuple[float, float] = (1.0, 1.0)

    def place(self, cells: Any) -> np.ndarray:
        """Returns the centres of cells `(..., 2)`, which may be fractions."""
        return np.asarray(self.start) + np.asarray(self.step) * cells

    def cells(self, points: Any) -> np.ndarray:
        """Returns the cells at points `(..., 2)`, as fractions."""
        return (np.asarray(points) - self.start) / np.asarray(self.step)

    def within(self, outer: Grid) -> Grid:
        """Returns this grid in pixels of what the other map lies in."""
        start = outer.place(self.start).tolist()
        step = np.multiply(outer.step, self.step).tolist()
        return Grid((start[0], start[1]), (step[0], step[1]))


@dataclasses.dataclass(frozen=True)
class Call:
    """Describes a call of a convolution.

    Attributes:
        layer: The convolution.
        name: Its path, with a number where it comes again.
        inputs, outputs: Where the cells of its input and of its output lie in
            the image.
        input_size: (height, width) of the input.
        locations: `(batch, out_h, out_w, offset_groups, taps, 2)`, (y, x) in
            pixels of the input.
        modulation: `(batch, out_h, out_w, offset_groups, taps)`.
        previous: The indices of the calls that come last before it: those that
            its input is made of, without the ones that another of them is made
            of. Several where parallel branches come together.
    """

    layer: Any
    name: str
    inputs: Grid
    outputs: Grid
    input_size: tuple[int, int]
    locations: np.ndarray
    modulation: np.ndarray
    previous: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Returns height and width of the output."""
        return self.locations.shape[1:3]

    def nearest(self, point: Sequence[float]) -> tuple[int, int]:
        """Returns the cell of the output that is nearest to a point."""
        cells = np.floor(self.outputs.cells(point) + 0.5)
        row, column = np.clip(cells, 0, np.array(self.size) - 1)
        return (int(row), int(column))


@dataclasses.dataclass(frozen=True)
class _Map:
    """Describes a map: where it lies, and the last calls it is made of."""

    grid: Grid
    size: tuple[int, int]
    last: tuple[int, ...] = ()


def choose(model: Any, layers: Any) -> tuple[Callable[[Any], bool], str]:
    """Returns which layers are asked for, and what to say if there are none.

    Raises:
        TypeError: `model` or `layers` has another type.
        ValueError: `model` has no weights yet.
    """
    if not isinstance(model, keras.layers.Layer):
        raise TypeError(
            f"Expected `model` to be a model of {keras.__name__} "
            f"{keras.__version__}. {received(model)}"
        )
    if not model.built:
        raise ValueError(
            f"Expected `model` to be built. Received: {model.name!r}, which "
            "has no weights yet. Call it on data first"
        )
    if layers is None:
        return lambda layer: isinstance(layer, DeformableConv2D), (
            "Expected a model with deformable convolutions, as "
            "`tf_deform.make_deformable` makes them, or with others that "
            f"`layers` names. Received: {model.name!r} without one"
        )
    if isinstance(layers, keras.layers.Layer):
        layers = [layers]
    if isinstance(layers, (list, tuple)) and any(
        isinstance(each, keras.layers.Layer) for each in layers
    ):
        for each in layers:
            _sampling.check_convolution(each)
        return lambda layer: any(layer is each for each in layers), (
            "Expected `layers` to be convolutions of the model. Received: "
            f"{[each.name for each in layers]}, none of which {model.name!r} "
            "calls"
        )
    select = _surgery.selector(layers, "layers")
    return lambda layer: _sampling.is_convolution(layer) and select(layer), (
        "Expected `layers` to name convolutions that the model calls. "
        f"Received: {layers!r}, which names none of {model.name!r}"
    )


def to_images(images: Any, rank: int = 4) -> tf.Tensor:
    """Returns images as a batch.

    Raises:
        ValueError: They have another rank, or there are none.
    """
    images = tf.convert_to_tensor(images)
    name = "images" if rank == 4 else "image"
    if images.shape.rank != rank or 0 in images.shape:
        axes = "batch, " * (rank == 4) + "height, width, channels"
        raise ValueError(
            f"Expected `{name}` to have the shape ({axes}), without zeros. "
            f"Received: {name}.shape={tuple(images.shape)}"
        )
    return images if rank == 4 else images[None]


def photographs(images: tf.Tensor, photos: Any = None) -> np.ndarray:
    """Returns what is shown for images, `(batch, height, width, 1 or 3)`.

    Raises:
        ValueError: `photos` do not fit the images.
    """
    if photos is not None:
        height, width = map_size(None, images)
        return check_photos(photos, (images.shape[0], height, width))
    photos = np.asarray(tf.cast(images, tf.float32))
    if keras.backend.image_data_format() == "channels_first":
        photos = np.moveaxis(photos, 1, -1)
    if photos.shape[-1] not in (1, 3):
        photos = photos.mean(-1, keepdims=True)
    # Values that are no colours are spread from black to white.
    if photos.min() < 0 or photos.max() > 255 or photos.max() <= 1:
        photos = photos - photos.min()
        photos = photos * (255 / max(photos.max(), 1e-12))
    return _to_bytes(photos)


def check_photos(photos: Any, shape: tuple[int, ...]) -> np.ndarray:
    photos = np.asarray(photos)
    shapes = [(*shape, channels) for channels in (1, 3)]
    if photos.shape not in shapes or photos.dtype.kind not in "uif":
        raise ValueError(
            f"Expected photographs to be numbers of the shape {shapes[0]} or "
            f"{shapes[1]}. Received: shape={photos.shape}, "
            f"dtype={photos.dtype}"
        )
    return _to_bytes(photos)


def _to_bytes(photos: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(photos), 0, 255).astype("uint8")


def walk(model: Any, images: tf.Tensor, layers: Any = None) -> list[Call]:
    """Returns the calls of a model's convolutions on images, in their order.

    Args:
        model: A model with one input.
        images: What it is called with, a batch.
        layers: The convolutions that are asked for. None: the deformable ones.

    Raises:
        ValueError: The model does not run on the images, or calls none of these
            layers on maps of the whole image.
    """
    wanted, complaint = choose(model, layers)
    walker = _Walker(wanted, images, map_size(model, images))
    original = keras.layers.Layer.__call__

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = original(self, *args, **kwargs)
        walker.note(self, args, kwargs, outputs)
        return outputs

    walker.run = original
    in_graphs = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        with mock.patch.object(keras.layers.Layer, "__call__", record):
            model(images, training=False)
    finally:
        tf.config.run_functions_eagerly(in_graphs)
        _keras.clear_losses(model)
    if not walker.calls:
        raise ValueError(complaint)
    return walker.calls


class _Walker:
    """Notes the maps of a model while it runs, and calls of convolutions."""

    run: Callable[..., Any]

    def __init__(
        self,
        wanted: Callable[[Any], bool],
        images: tf.Tensor,
        size: tuple[int, int],
    ) -> None:
        self.calls: list[Call] = []
        self._names: collections.Counter = collections.Counter()
        self._wanted = wanted
        self._batch = images.shape[0]
        # Tensors have no hash; an id is a tensor's while it lives.
        self._known: dict[int, tuple[weakref.ref, _Map]] = {}
        self._by_size: dict[tuple[int, int], _Map] = {}
        self._latest = _Map(Grid(), size)
        self._keep(images, self._latest)

    def note(self, layer: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        """Notes what a layer returned, unless a layer within has."""
        before = self._maps(layer, (args, kwargs))
        after = self._maps(layer, outputs)
        after = [each for each in after if self._find(each[0]) is None]
        if not before or not after or isinstance(layer, ROILayer):
            return
        sources = [self._map(*each) for each in before]
        last = self._merge(sources)
        if _sampling.is_convolution(layer) and self._wanted(layer):
            last = self._call(layer, args, kwargs, sources[0], last)
        for tensor, size in after:
            if _keras.sublayers(layer):
                guess = self._guess(size)
                found = _Map(guess.grid, size, self._merge([*sources, guess]))
            else:
                grid = self._step(layer, args, kwargs, before, size)
                found = _Map(grid.within(sources[0].grid), size, last)
            self._keep(tensor, found)

    def _call(
        self,
        layer: Any,
        args: Any,
        kwargs: Any,
        source: _Map,
        last: tuple[int, ...],
    ) -> tuple[int, ...]:
        names = ("inputs", "offset", "modulator")
        given = {**dict(zip(names, args)), **kwargs}
        given = {name: given[name] for name in names if name in given}
        locations, modulation = _sampling.sample(layer, **given)
        grid = _window(layer, source.size).within(source.grid)
        name = _keras.path_of(layer)
        self._names[name] += 1
        if self._names[name] > 1:
            name += f" ({self._names[name]})"
        self.calls.append(
            Call(
                layer,
                name,
                source.grid,
                grid,
                source.size,
                locations,
                modulation,
                last,
            )
        )
        return (len(self.calls) - 1,)

    def _merge(self, sources: Sequence[_Map]) -> tuple[int, ...]:
        """Returns the last calls that maps are made of together."""
        last = {index for each in sources for index in each.last}
        inner, found = set(), list(last)
        while found:
            new = set(self.calls[found.pop()].previous) - inner
            inner |= new
            found += new
        return tuple(sorted(last - inner))

    def _step(
        self, layer: Any, args: Any, kwargs: Any, before: Any, size: Any
    ) -> Grid:
        """Returns where a layer's cells lie in its input."""
        tensor, source = before[0]
        if _is_window(layer) and max(size) <= max(source):
            return _window(layer, source)
        if size == source:
            return Grid()
        if len(before) == 1:
            found = _measure(
                lambda: self.run(layer, *args, **kwargs), tensor, layer
            )
            if found is not None:
                return found
        return _centred(source, size)

    def _maps(self, layer: Any, values: Any) -> list[tuple[Any, Any]]:
        """Returns maps of the whole image, with their sizes."""
        found = []
        for value in tf.nest.flatten(values):
            if isinstance(value, (tf.Tensor, tf.Variable)):
                size = map_size(layer, value)
                if size is not None and value.shape[0] == self._batch:
                    found.append((value, size))
        return found

    def _find(self, tensor: Any) -> _Map | None:
        reference, found = self._known.get(id(tensor), (None, None))
        return found if reference and reference() is tensor else None

    def _map(self, tensor: Any, size: tuple[int, int]) -> _Map:
        return self._find(tensor) or self._guess(size)

    def _guess(self, size: tuple[int, int]) -> _Map:
        """Returns what a map is that no layer has returned.

        It is what TensorFlow's ops between layers made. Of the size of another
        map, it is taken to lie where the last such map does, and otherwise, to
        have the centre of the last map.
        """
        found = self._by_size.get(size)
        if found is None:
            latest = self._latest
            grid = _centred(latest.size, size).within(latest.grid)
            found = _Map(grid, size, latest.last)
        return found

    def _keep(self, tensor: Any, found: _Map) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), found)
        self._by_size[found.size] = self._latest = found


def map_size(layer: Any, value: Any) -> tuple[int, int] | None:
    shape = value.shape
    if shape.rank != 4:
        return None
    data_format = getattr(layer, "data_format", None)
    data_format = data_format or keras.backend.image_data_format()
    height, width = shape[2:] if data_format == "channels_first" else shape[1:3]
    return (height, width) if height and width else None


def _is_window(layer: Any) -> bool:
    """Tells whether a layer reads a window of pixels for each cell."""
    taps = _taps(layer)
    return (
        isinstance(taps, (list, tuple))
        and len(taps) == 2
        and len(getattr(layer, "strides", ())) == 2
        and hasattr(layer, "padding")
    )


def _taps(layer: Any) -> Any:
    return getattr(layer, "kernel_size", getattr(layer, "pool_size", None))


def _window(layer: Any, size: Sequence[int]) -> Grid:
    """Returns where the centres of a layer's windows lie in its input."""
    taps = _taps(layer)
    rates = getattr(layer, "dilation_rate", (1, 1))
    before = _sampling.paddings(layer.padding, size, taps, layer.strides, rates)
    start = [
        rate * (count - 1) / 2 - added
        for rate, count, (added, _) in zip(rates, taps, before)
    ]
    return Grid((start[0], start[1]), tuple(map(float, layer.strides)))


def _centred(source: Sequence[int], size: Sequence[int]) -> Grid:
    """Returns a grid that covers a map of another size."""
    step = [before / after for before, after in zip(source, size)]
    return Grid(((step[0] - 1) / 2, (step[1] - 1) / 2), (step[0], step[1]))


def _measure(
    run: Callable[[], Any], tensor: tf.Tensor, layer: Any
) -> Grid | None:
    """Measures by gradients where a layer's cells lie in its input.

    A cell lies at the centroid of the pixels that it reads, weighted by how
    much it reads; a line is laid through two means of these.

    Returns:
        The grid; None if there is no gradient, or one pixel alone.
    """
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(tensor)
        outputs = tf.nest.flatten(run())[0]
    first = getattr(layer, "data_format", None) == "channels_first"
    axes = (2, 3) if first else (1, 2)
    shape = outputs.shape.as_list()
    start, step = [], []
    for axis, other in zip(axes, axes[::-1]):
        cells = range(shape[axis])
        if len(cells) > _CELLS:
            cells = cells[len(cells) // 2 - _CELLS // 2 :][:_CELLS]
        found = []
        for cell in cells:
            mask = np.zeros(shape, "float32")
            index: list[Any] = [slice(None)] * 4
            index[axis], index[other] = cell, shape[other] // 2
            mask[tuple(index)] = 1
            gradient = tape.gradient(
                outputs, tensor, tf.cast(mask, outputs.dtype)
            )
            if gradient is None:
                return None
            share = np.abs(np.asarray(gradient, "float64"))
            share = share.sum(tuple({0, 1, 2, 3} - {axis}))
            if share.sum() > 0:  # A cell of padding reads nothing.
                middle = np.arange(len(share)) @ share / share.sum()
                found.append((cell, middle))
        if len(found) < 2 or tensor.shape[axis] == 1:
            return None
        # Steps of an enlarged map are even if each half has all of them.
        half = len(found) // 2
        found = np.array(found)[: 2 * half].reshape(2, half, 2).mean(1)
        slope = np.divide(*(found[1] - found[0])[::-1])
        offset = found[0, 1] - slope * found[0, 0]
        start.append(float(offset))
        step.append(float(slope))
    return Grid((start[0], start[1]), (step[0], step[1]))
