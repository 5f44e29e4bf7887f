# SPDX-License-Identifier: Apache-2.0
"""Implements the segmenter: a class for each pixel of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform import _image_files, _keras, _squares
from tf_deform._keras import keras
from tf_deform.models import _backbones, _pyramid, _serving
from tf_deform.models._detector import _check_names
from tf_deform.models._output_stride import set_output_stride
from tf_deform.ops._arguments import integer, positive


@keras.saving.register_keras_serializable(package="tf_deform")
class Enlarge(keras.layers.UpSampling2D):
    """Enlarges maps bilinearly, also if the graph does not know their size.

    Keras 3.15's own layer tests whether the new size is positive, which is
    unknown while a graph is made (keras-team/keras#22079).

    Args:
        size, data_format, interpolation, kwargs: As in
            `keras.layers.UpSampling2D`.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        size = list(inputs.shape[1:3])
        if None in size:
            return tf.image.resize(inputs, tf.shape(inputs)[1:3] * self.size)
        size = [pixels * factor for pixels, factor in zip(size, self.size)]
        return tf.image.resize(inputs, size)


@_keras.register
class Segmenter(keras.Model):
    """Tells the class of each pixel, from the coarsest map of a backbone.

        hidden = relu(convolution 1x1 (map))            filters
        logits = enlarge(convolution 1x1 (hidden))      num_classes

    The backbone's coarsest map has a stride of `output_stride` pixels: stages
    that would go beyond are dilated instead, by
    `tf_deform.models.set_output_stride`. Logits are enlarged bilinearly to the
    image's size.

        backbone = tf_deform.models.backbone("resnet50", "imagenet", 512)
        model = tf_deform.models.Segmenter(backbone, num_classes=21)
        tf_deform.make_deformable(model, "c4-", offset_dilation_rate=1)
        model.compile(optimizer)
        model.fit(batches)  # images, and masks of class ids

    By default it learns by the cross-entropy of all pixels but those of
    `ignore_class`; a batch of these alone has a loss of 0. In mixed precision
    logits and loss are float32.

    Source: DeepLab as in Dai et al. 2017, "Deformable Convolutional Networks",
    arXiv:1703.06211, section 4.1; dilated stages: Chen et al. 2017,
    arXiv:1706.05587, section 3.1.

    Args:
        backbone: A model of images whose last output, by its name "P2" to "P5"
            or by its stride, is the coarsest; or what
            `tf_deform.models.backbone` takes. A backbone that is coarser than
            `output_stride` is copied, and must not be deformable yet.
        num_classes: Number of classes, the background included.
        output_stride: 8, 16 or 32; or 4, if the backbone's is.
        ignore_class: The id of pixels that do not count, or None.
        image_size: Height and width of the images in pixels.
        class_names: The names of the classes, or None. They are kept in files.
        filters: Channels of the hidden layer.
        tile: Pixels of the squares that `predict_image` cuts photographs into,
            if it is not told otherwise; those that the model learned from. None
            for whole photographs.
        kwargs: `name` and `dtype`, the policy of all layers but the backbone's.

    Call arguments:
        images: `(batch, image_size, image_size, 3)` RGB of 0 to 255, uint8 or a
            float type.

    Returns:
        Logits, `(batch, image_size, image_size, num_classes)` float32.

    Raises:
        TypeError: `backbone` is neither a model nor a name.
        ValueError: An argument is out of range; the backbone is not as coarse,
            or cannot be dilated.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        output_stride: int = 16,
        ignore_class: int | None = 255,
        image_size: int = 512,
        class_names: Sequence[str] | None = None,
        filters: int = 1024,
        tile: int | None = None,
        **kwargs: Any,
    ) -> None:
        num_classes = positive(num_classes, "num_classes")
        image_size = positive(image_size, "image_size")
        filters = positive(filters, "filters")
        output_stride = positive(output_stride, "output_stride")
        if output_stride not in (4, 8, 16, 32):
            raise ValueError(
                "Expected `output_stride` to be 4, 8, 16 or 32. Received: "
                f"{output_stride}"
            )
        if ignore_class is not None:
            ignore_class = integer(ignore_class, "ignore_class")
        class_names = _check_names(class_names, num_classes)
        name, dtype = kwargs.pop("name", None), kwargs.pop("dtype", None)
        if kwargs:
            raise TypeError(
                "Expected `name` and `dtype` as further arguments. Received: "
                f"{sorted(kwargs)}"
            )
        backbone = _pyramid.as_pyramid(backbone, image_size)
        backbone = _backbones.backbone(backbone, image_size=image_size)
        backbone = _with_stride(backbone, output_stride, image_size)
        image = keras.Input((image_size, image_size, 3), name="image")
        x = _last(backbone(image))
        x = _pyramid.convolution(
            filters, 1, activation="relu", dtype=dtype, name="hidden"
        )(x)
        # Where the network computes in 16 bits, logits have all 32.
        in_32 = {"dtype": "float32", "data_format": "channels_last"}
        x = keras.layers.Conv2D(num_classes, 1, name="score", **in_32)(x)
        x = Enlarge(
            output_stride, interpolation="bilinear", name="enlarge", **in_32
        )(x)
        # Maps of sizes that are no multiples reach over the image.
        rest = x.shape[1] - image_size
        if rest:
            x = keras.layers.Cropping2D(
                ((0, rest), (0, rest)), name="crop", **in_32
            )(x)
        super().__init__(image, x, name=name)
        self.backbone = backbone
        self.num_classes = num_classes
        self.output_stride = output_stride
        self.ignore_class = ignore_class
        self.image_size = image_size
        self.class_names = class_names
        self.filters = filters
        self.tile = None if tile is None else positive(tile, "tile")

    def get_config(self) -> dict[str, Any]:
        return {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "num_classes": self.num_classes,
            "output_stride": self.output_stride,
            "ignore_class": self.ignore_class,
            "image_size": self.image_size,
            "class_names": self.class_names,
            "filters": self.filters,
            "tile": self.tile,
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(
                self.get_layer("hidden").dtype_policy
            ),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Segmenter:
        config = dict(config)
        for name in ("backbone", "dtype"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, **kwargs: Any
    ) -> None:
        """Prepares the model for training.

        Args:
            optimizer: As in `keras.Model.compile`.
            loss: None for the cross-entropy without pixels of `ignore_class`.
            kwargs: As in `keras.Model.compile`: `metrics`, and so on.
        """
        if loss is None:
            loss = keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, ignore_class=self.ignore_class
            )
        super().compile(optimizer, loss, **kwargs)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras compiles no loaded model whose class has a `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def predict_image(
        self, image: np.ndarray, tile: int | None = None, overlap: float = 0.25
    ) -> np.ndarray:
        """Tells the class of each pixel of a photograph of any size.

        Args:
            image: `(height, width, 3)` uint8 RGB.
            tile: Pixels of the square tiles that the photograph is cut into,
                each of which is seen by the model in its own size. None: as the
                model's `tile` says.
            overlap: Share of a tile that the next one sees again, at least 0
                and below 1. A pixel's class comes from the tile whose centre is
                nearest.

        Returns:
            `(height, width)` int32 ids.

        Raises:
            ValueError: `image`, `tile` or `overlap` is something else.
        """
        tile = self.tile if tile is None else tile
        image, side, origins = _serving.cut(image, tile, overlap)
        height, width = image.shape[:2]
        ids = np.zeros((height, width), "int32")
        rows, columns = (sorted(set(axis)) for axis in zip(*origins))
        for y, x in origins:
            part = image[y : y + side, x : x + side]
            square, inner = _squares.place(part, side, self.image_size)
            logits = self.predict_on_batch(square[None])[0]
            found = _choose(logits, inner, tf.constant(part.shape[:2])).numpy()
            top, bottom = _own(rows, y, side, height)
            left, right = _own(columns, x, side, width)
            ids[top:bottom, left:right] = found[
                top - y : bottom - y, left - x : right - x
            ]
        return ids

    def _server(self) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
        """Returns what `tf_deform.models.serving` returns for a segmenter."""

        def read(data: tf.Tensor) -> tuple[tf.RaggedTensor, tf.Tensor]:
            pixels = _image_files.decode(data, channels=3)
            size = tf.shape(pixels)[:2]
            square, inner = _squares.place(
                pixels, tf.reduce_max(size), self.image_size
            )
            logits = self(square[None], training=False)[0]
            ids = _choose(logits, inner, size)
            return tf.RaggedTensor.from_tensor(ids), size

        def serve(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
            ids, sizes = tf.map_fn(
                read,
                image_bytes,
                fn_output_signature=(
                    tf.RaggedTensorSpec((None, None), "int32", 1),
                    tf.TensorSpec((2,), "int32"),
                ),
            )
            return {"ids": ids.to_tensor(-1), "sizes": sizes}

        signature = [tf.TensorSpec((None,), "string", name="image_bytes")]
        return tf.function(serve, input_signature=signature)


def _last(maps: dict[str, Any]) -> Any:
    return maps[max(maps, key=_pyramid.level_of)]


def _with_stride(
    backbone: keras.Model, output_stride: int, image_size: int
) -> keras.Model:
    """Returns a backbone whose last map has a stride."""
    spec = keras.KerasTensor((1, image_size, image_size, 3))
    map_ = _last(backbone.compute_output_spec(spec))
    found = _pyramid.stride_of(map_, image_size)
    if found > output_stride:
        return set_output_stride(backbone, output_stride)
    if found < output_stride:
        raise ValueError(
            f"Expected `output_stride` to be at most {found}, the stride of "
            f"the last map of {backbone.name!r}. Received: {output_stride}"
        )
    return backbone


def _own(
    starts: Sequence[int], start: int, side: int, extent: int
) -> tuple[int, int]:
    """Returns the pixels of an axis that are nearest to a tile's centre.

    Args:
        starts: Where tiles begin.
        start: Where the tile begins.
        side: Pixels of a tile.
        extent: Pixels of the photograph.
    """
    index = starts.index(start)
    first, end = 0, extent
    if index:
        first = (starts[index - 1] + side + start) // 2
    if index + 1 < len(starts):
        end = (start + side + starts[index + 1]) // 2
    return first, end


@tf.function
def _choose(logits: tf.Tensor, inner: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    """Returns the best class of each pixel of an image in its own size.

    Args:
        logits: `(image_size, image_size, num_classes)`, of the image at the top
            left of a square.
        inner: Height and width of the image in the square.
        size: Its own height and width.

    Returns:
        `(height, width)` int32.
    """
    maps = tf.transpose(logits[: inner[0], : inner[1]], (2, 0, 1))[..., None]

    # Logits of all classes in the size of a photograph would take gigabytes.
    def compare(
        index: tf.Tensor, best: tf.Tensor, ids: tf.Tensor
    ) -> tuple[tf.Tensor, ...]:
        found = tf.image.resize(maps[index], size)[..., 0]
        is_better = found > best
        return (
            index + 1,
            tf.where(is_better, found, best),
            tf.where(is_better, index, ids),
        )

    lowest = tf.fill(size, maps.dtype.min)
    _, _, ids = tf.while_loop(
        lambda index, *_: index < tf.shape(maps)[0],
        compare,
        (0, lowest, tf.zeros(size, "int32")),
    )
    return ids
