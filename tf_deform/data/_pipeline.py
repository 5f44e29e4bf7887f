# SPDX-License-Identifier: Apache-2.0
"""Makes endless batches for training out of photographs with annotations.

Example `j` of the stream, and so batch `i`, is a function of the seed and of
`j` alone: the order of an epoch comes from `(seed, epoch)`, and all random
numbers of an example come from `(seed, j)`. So a resumed run begins at batch
`start` without reading the photographs before it, and parallel work changes
nothing. (Keras' layers for colours draw from a state that counts calls: in a
parallel map the numbers would depend on which photograph is read first.)
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from tf_deform import _squares
from tf_deform.data import _tiles, _transforms
from tf_deform.data._transforms import Example

if TYPE_CHECKING:
    from tf_deform.data import Annotations, Photograph

# The functions here hold no Python that AutoGraph would have to rewrite.
_as_it_is = tf.autograph.experimental.do_not_convert

Read = Callable[[Any], np.ndarray]

_GIB = 1 << 30
# The share of examples that show the centre of an object, if any is cut off.
_AROUND_OBJECTS = 0.5


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Says what part of a photograph an example shows, and how."""

    size: int
    tile: int | None
    augment: bool
    scale: tuple[float, float]
    flips: str
    colour: float
    min_visible: float

    def __post_init__(self) -> None:
        low, high = self.scale
        valid = {
            "size >= 1": self.size >= 1,
            "tile >= 1 or None": self.tile is None or self.tile >= 1,
            "0 < scale[0] <= scale[1]": 0 < low <= high,
            'flips of "none", "horizontal" or "all"': self.flips
            in ("none", "horizontal", "all"),
            "0 <= colour <= 1": 0 <= self.colour <= 1,
            "0 <= min_visible <= 1": 0 <= self.min_visible <= 1,
        }
        for text, holds in valid.items():
            if not holds:
                raise ValueError(f"Expected {text}. Received: {self}")


def detection_batches(
    annotations: Annotations,
    size: int,
    batch_size: int,
    *,
    augment: bool = True,
    seed: int = 0,
    start: int = 0,
    shuffle: bool = True,
    tile: int | None = None,
    scale: tuple[float, float] = (0.8, 1.25),
    flips: str = "horizontal",
    colour: float = 0.2,
    min_visible: float = 0.4,
    cache_bytes: int = _GIB,
    read_image: Read | None = None,
) -> tf.data.Dataset:
    """Returns endless batches of photographs and boxes.

    Each photograph is fitted into a square at the top left, as `letterbox` does
    it, and its boxes with it. Each epoch shows all photographs once; a batch
    may span two epochs.

    Args:
        annotations: photographs with their objects. Objects that are crowds or
            difficult are left out.
        size: height and width of the images in pixels.
        batch_size: number of images in a batch.
        augment: whether scale, place, flips and colours are drawn anew for each
            example. Without it, a photograph whose longer side is `size`
            already does not change by a bit, nor do its boxes.
        seed: seed of order and augmentation.
        start: number of batches to leave out at the beginning. Nothing is read
            for them.
        shuffle: whether each epoch has an order of its own.
        tile: pixels of the photograph that become `size` pixels, for
            photographs too large to be shown whole; None shows them whole. An
            epoch has as many examples of a photograph as tiles cover it. With
            `augment` they lie anywhere, else on a grid.
        scale: by how much, at least and at most, everything is enlarged
            besides. What no longer fits into the square is cut off; half of the
            cuts keep the centre of an object drawn at random.
        flips: `"horizontal"`, left and right, for photographs as people take
            them; `"all"`, also up and down and rows for columns, for views from
            above; or `"none"`.
        colour: how much brightness, contrast, saturation and hue change, from 0
            to 1.
        min_visible: smallest share of the area of a box that must lie in the
            image. Other objects are dropped; boxes are clipped to the image.
        cache_bytes: how many bytes of decoded images to keep in memory as long
            as the dataset lives.
        read_image: function from a path to `(height, width, 3)` uint8; by
            default `tf_deform.data.read_image`.

    Returns:
        Dataset of pairs: images, `(batch, size, size, 3)` float32 RGB from 0 to
        255, and a dictionary of `"boxes"`, `(batch, m, 4)` float32 x1, y1, x2,
        y2 in pixels of the image, and `"labels"`, `(batch, m)` int32. No image
        has more than `m` objects, and `m >= 1`. Rows without an object are -1
        in both; only the label tells.

    Raises:
        ValueError: There is no photograph, or an argument is out of range.
        tf.errors.InvalidArgumentError: While iterating: a photograph cannot be
            read, or has not the size that was annotated. The text names it.
    """
    settings = _Settings(size, tile, augment, scale, flips, colour, min_visible)
    objects = [_find_objects(photo) for photo in annotations.photographs]
    count = max([1, *(_most_objects(boxes, settings) for boxes, _ in objects)])

    def finish(example: Example) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        boxes, labels = _transforms.pad_objects(example, count)
        return example.image, {"boxes": boxes, "labels": labels}

    files = _Files(annotations.photographs, cache_bytes)
    return _batches(
        files,
        settings,
        objects,
        [files.reader("path", 3, read_image or _default("read_image"))],
        finish,
        batch_size=batch_size,
        seed=seed,
        start=start,
        shuffle=shuffle,
    )


def segmentation_batches(
    annotations: Annotations,
    size: int,
    batch_size: int,
    *,
    augment: bool = True,
    seed: int = 0,
    start: int = 0,
    shuffle: bool = True,
    tile: int | None = None,
    scale: tuple[float, float] = (0.5, 2.0),
    flips: str = "horizontal",
    colour: float = 0.2,
    cache_bytes: int = _GIB,
    read_image: Read | None = None,
    read_mask: Read | None = None,
) -> tf.data.Dataset:
    """Returns endless batches of photographs and masks.

    Arguments do what they do in `detection_batches`, but what is cut off is
    drawn without regard to objects.

    Args:
        annotations: photographs with their masks.
        size, batch_size, augment, seed, start: as there.
        shuffle, tile: as there.
        scale: by how much, at least and at most, everything is enlarged.
        flips, colour, cache_bytes, read_image: as there.
        read_mask: function from `Photograph.mask` to `(height, width, 1)` ids
            from 0 to 255; by default `tf_deform.data.read_mask`.

    Returns:
        Dataset of pairs: images, `(batch, size, size, 3)` float32 RGB from 0 to
        255, and masks, `(batch, size, size, 1)` int32. The ids are those of the
        files, and 255 (void) where the photograph does not reach.

    Raises:
        ValueError: There is no photograph, one has no mask, or an argument is
            out of range.
        tf.errors.InvalidArgumentError: While iterating: a photograph or a mask
            cannot be read, or has not the size that was annotated. The text
            names it.
    """
    settings = _Settings(size, tile, augment, scale, flips, colour, 0.0)
    for photo in annotations.photographs:
        if photo.mask is None:
            raise ValueError(
                "Expected a mask for each photograph. Received none for "
                f"{photo.path}"
            )
    files = _Files(annotations.photographs, cache_bytes)
    return _batches(
        files,
        settings,
        [_NO_OBJECTS] * len(annotations.photographs),
        [
            files.reader("path", 3, read_image or _default("read_image")),
            files.reader("mask", 1, read_mask or _default("read_mask")),
        ],
        lambda example: (example.image, example.mask),
        batch_size=batch_size,
        seed=seed,
        start=start,
        shuffle=shuffle,
    )


def examples_per_epoch(
    annotations: Annotations, tile: int | None = None
) -> int:
    """Returns how many examples the batches of one epoch have together.

    It is the number of photographs or, with `tile`, of the tiles that cover
    them. See `detection_batches`.

    Args:
        annotations: the photographs.
        tile: pixels of the photograph that an example shows.
    """
    return len(_parts(annotations.photographs, tile)[0])


# An image's boxes, (n, 4) float32, and labels, (n,) int32.
_Objects = tuple[np.ndarray, np.ndarray]
_NO_OBJECTS = (np.zeros((0, 4), "float32"), np.zeros((0,), "int32"))


def _find_objects(photo: Photograph) -> _Objects:
    """Returns the objects that are trained on."""
    kept = ~(np.asarray(photo.crowd, bool) | np.asarray(photo.difficult, bool))
    boxes = np.asarray(photo.boxes, "float32").reshape(-1, 4)
    return boxes[kept], np.asarray(photo.labels, "int32")[kept]


def _most_objects(boxes: np.ndarray, settings: _Settings) -> int:
    """Returns a number of objects that no part of a photograph exceeds."""
    if settings.tile is None:
        return len(boxes)
    scale = settings.scale[0] if settings.augment else 1.0
    widest = round(settings.tile / scale) + 1
    return _tiles.most_objects(boxes, widest, settings.min_visible)


def _default(name: str) -> Read:
    """Returns a reader of `tf_deform.data`."""
    from tf_deform.data import _images

    return getattr(_images, name)


class _Files:
    """Reads files, and keeps some of them decoded in memory.

    The first ones that fit are kept and none is given up for another: as each
    epoch reads every file, no other choice would be hit more often.

    Attributes:
        photographs: photographs of which the files are.
    """

    def __init__(self, photographs: Sequence[Photograph], limit: int) -> None:
        self.photographs = photographs
        self._rest = limit
        self._kept: dict[tuple[str, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Keeps nothing from now on."""
        with self._lock:
            self._kept.clear()
            self._rest = 0

    def reader(
        self, field: str, channels: int, read: Read
    ) -> Callable[[tf.Tensor], tf.Tensor]:
        """Returns a function from the index of a photograph to pixels.

        Args:
            field: `"path"` or `"mask"`, which names the file.
            channels: number of channels.
            read: function from the field to pixels.
        """

        def get(index: np.ndarray) -> np.ndarray:
            key = field, int(index)
            pixels = self._kept.get(key)
            if pixels is None:
                photo = self.photographs[key[1]]
                shape = photo.height, photo.width, channels
                pixels = _read(read, getattr(photo, field), shape)
                with self._lock:
                    if key not in self._kept and pixels.nbytes <= self._rest:
                        self._kept[key] = pixels
                        self._rest -= pixels.nbytes
            # TensorFlow takes over the memory of an array that happens to lie
            # at a multiple of 64 bytes, and may write there.
            return pixels.copy()

        def load(index: tf.Tensor) -> tf.Tensor:
            # Op determinism gives up parallel reading where ops have a state.
            pixels = tf.numpy_function(get, [index], "uint8", stateful=False)
            return tf.ensure_shape(pixels, (None, None, channels))

        return load


def _read(read: Read, file: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns uint8 pixels, or raises a ValueError that names the file."""
    path = str(getattr(file, "path", file))
    try:
        pixels = np.asarray(read(file))
    except Exception as error:
        if isinstance(error, ValueError) and path in str(error):
            raise
        raise ValueError(
            f"Expected a file that can be read. Received: {path}: {error}"
        ) from None
    if pixels.shape != shape:
        raise ValueError(
            f"Expected (height, width, channels) {shape}, as annotated. "
            f"Received: {path} of {pixels.shape}"
        )
    if pixels.dtype != "uint8":
        low, high = pixels.min(), pixels.max()
        if low < 0 or high > 255:
            raise ValueError(
                "Expected values from 0 to 255. Received: "
                f"{path} of {low} to {high}"
            )
    return pixels.astype("uint8", copy=False)


def _parts(
    photographs: Sequence[Photograph], tile: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples of an epoch.

    Returns:
        `(n,)` int64 indices of photographs, and `(n, 2)` int32 places (y, x) of
        the tiles that cover them.
    """
    indices, origins = [], []
    for index, photo in enumerate(photographs):
        found = [(0, 0)]
        if tile is not None:
            found = _squares.tiles(photo.height, photo.width, tile, 0.0)
        indices += [index] * len(found)
        origins += found
    return np.array(indices, "int64"), np.array(origins, "int32")


def _order(count: int, seed: int, start: int, shuffle: bool) -> tf.data.Dataset:
    """Returns pairs: the number of an example, and its place in the epoch."""

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        order = tf.range(tf.constant(count, "int64"))
        if shuffle:
            # No number of an example is negative, so seeds occur once.
            order = tf.random.experimental.stateless_shuffle(
                order, tf.stack([tf.constant(seed, "int64"), -1 - number])
            )
        return tf.data.Dataset.from_tensor_slices(order)

    first, rest = divmod(start, count)
    epochs = tf.data.Dataset.range(first, np.iinfo("int64").max)
    return epochs.flat_map(_as_it_is(epoch)).skip(rest).enumerate(start)


def _batches(
    files: _Files,
    settings: _Settings,
    objects: Sequence[_Objects],
    readers: Sequence[Callable[[tf.Tensor], tf.Tensor]],
    finish: Callable[[Example], Any],
    *,
    batch_size: int,
    seed: int,
    start: int,
    shuffle: bool,
) -> tf.data.Dataset:
    """Returns the batches of what `finish` makes of examples.

    Args:
        files: photographs, and what is kept of them as long as the dataset
            lives.
        settings: how examples are made of them.
        objects: boxes and labels of each photograph.
        readers: functions from an index to an image and, if there are two, to a
            mask.
        finish: function from an example to an element of the dataset.
        batch_size, seed, start, shuffle: see `detection_batches`.
    """
    photographs = files.photographs
    if not photographs or batch_size < 1 or start < 0:
        raise ValueError(
            "Expected photographs, batch_size >= 1 and start >= 0. Received: "
            f"{len(photographs)} photographs, batch_size={batch_size}, "
            f"start={start}"
        )
    indices, origins = _parts(photographs, settings.tile)
    with tf.device("/CPU:0"):
        indices, origins = tf.constant(indices), tf.constant(origins)
        boxes = tf.constant(np.concatenate([boxes for boxes, _ in objects]))
        labels = tf.constant(np.concatenate([labels for _, labels in objects]))
        ends = tf.constant(np.cumsum([0, *(len(b) for b, _ in objects)]))

    def make(number: tf.Tensor, place: tf.Tensor) -> Any:
        index = indices[place]
        image, *mask = (read(index) for read in readers)
        own = slice(ends[index], ends[index + 1])
        mask = [tf.cast(ids, "int32") for ids in mask]
        example = Example(image, boxes[own], labels[own], *mask)
        key = tf.stack([tf.constant(seed, "int64"), number])
        return finish(_view(example, settings, key, origins[place]))

    batches = (
        _order(int(indices.shape[0]), seed, start * batch_size, shuffle)
        .map(_as_it_is(make), tf.data.AUTOTUNE, deterministic=True)
        .batch(batch_size, drop_remainder=True)
        .prefetch(2)
    )
    # TensorFlow keeps a `numpy_function` as long as the process lives.
    weakref.finalize(batches, files.forget)
    return batches


def _view(
    example: Example, settings: _Settings, key: tf.Tensor, origin: tf.Tensor
) -> Example:
    """Returns what is seen of a photograph, in a square.

    `side` pixels of the photograph become `size` pixels.

    Args:
        example: whole photograph.
        settings: sizes and strengths.
        key: `(2,)` int64 seed of the random numbers.
        origin: `(2,)` int32 place of the tile if nothing is random.
    """
    size = settings.size
    extent = tf.shape(example.image)[:2]
    side = settings.tile or tf.reduce_max(extent)
    numbers = tf.random.stateless_uniform((12,), key)
    scale, place, chosen, flips, colour = tf.split(numbers, (1, 2, 2, 3, 4))
    if settings.augment:
        low, high = settings.scale
        larger = low * (high / low) ** scale[0]
        side = tf.cast(side, "float32") / larger
        side = tf.cast(tf.maximum(tf.round(side), 1.0), "int32")
    shape = tf.minimum(side, extent)
    if settings.augment:
        origin = _draw_origin(example.boxes, extent, shape, place, chosen)
    example = _transforms.crop(example, origin, shape, settings.min_visible)
    example = _transforms.resize(example, _squares.fit(shape, side, size))
    if settings.augment:
        if settings.colour:
            example = _transforms.recolour(
                example, 2.0 * colour - 1.0, settings.colour
            )
        kinds = {"none": 0, "horizontal": 1, "all": 3}[settings.flips]
        example = _transforms.flip(
            example, *tf.unstack(flips[:kinds] < 0.5, kinds)
        )
    return _transforms.pad(example, size)


def _draw_origin(
    boxes: tf.Tensor,
    extent: tf.Tensor,
    shape: tf.Tensor,
    place: tf.Tensor,
    chosen: tf.Tensor,
) -> tf.Tensor:
    """Draws where a part of a photograph begins.

    Half of the parts have the centre of an object within, drawn at random, so
    that photographs of few objects are not shown in vain.

    Args:
        boxes: `(n, 4)` float32 objects.
        extent, shape: `(2,)` int32 sizes (y, x) of photograph and part.
        place: `(2,)` random numbers from 0 to 1 for the place.
        chosen: two more, for whether to keep an object, and for which.
    """
    last = extent - shape
    count = tf.shape(boxes)[0]
    # If there is no object, a row of zeros is read and not used.
    which = tf.cast(chosen[1] * tf.cast(count, "float32"), "int32")
    x1, y1, x2, y2 = tf.unstack(tf.pad(boxes, [[0, 1], [0, 0]])[which])
    centre = tf.cast(tf.stack([y1 + y2, x1 + x2]) / 2.0, "int32")
    around = (count > 0) & (chosen[0] < _AROUND_OBJECTS)
    low = tf.where(around, tf.clip_by_value(centre - shape + 1, 0, last), 0)
    high = tf.where(around, tf.clip_by_value(centre, 0, last), last)
    span = tf.cast(high - low + 1, "float32")
    return low + tf.cast(place * span, "int32")
