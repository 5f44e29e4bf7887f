# SPDX-License-Identifier: Apache-2.0
"""Implements what the two-stage detectors have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tf_deform._keras import keras
from tf_deform.models import _boxes, _pyramid
from tf_deform.models._pyramid import stride_of
from tf_deform.ops._arguments import positive

# What the losses and detections are computed from: "objectness" and "deltas" of
# the anchors of each level, and "maps".
Outputs = Mapping[str, Any]

# An anchor belongs to an object from the first overlap on, and is background
# below the second one; a region belongs to an object from the third on.
_ANCHOR_OBJECT, _ANCHOR_BACKGROUND, _REGION_OBJECT = 0.7, 0.3, 0.5
_ANCHOR_DEVIATIONS = (1.0, 1.0, 1.0, 1.0)
_REGION_DEVIATIONS = (0.1, 0.1, 0.2, 0.2)
# Anchors of an image that the loss is taken of, and how many of them may belong
# to objects.
_ANCHOR_SAMPLES, _ANCHOR_POSITIVES = 256, 128
# Detections are chosen among this many pairs of a box and a class.
_CANDIDATES = 1000
# Whole pixels rarely overlap by exactly this much more than a bound. Runtimes
# would decide differently about an overlap that equals the bound.
_BESIDE = 1e-4


class Detector(keras.Model):
    """Proposes regions by anchors, classifies them, and moves their boxes.

    Subclasses define `_build(maps)`, `_judge(maps, boxes, training)` and
    `_region_losses(logits, deltas, ...)`.

    Args:
        backbone, num_classes, image_size, class_names: As in `FasterRCNN`.
        anchor_scales, anchor_ratios: As in `FasterRCNN`.
        min_anchor_overlap, candidates, proposals: As in `FasterRCNN`.
        max_detections: As in `FasterRCNN`.
        min_score, max_overlap, seed, tile: As in `FasterRCNN`.
        kwargs: `name` and `dtype`.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        image_size: int,
        class_names: Sequence[str] | None,
        anchor_scales: Sequence[float],
        anchor_ratios: Sequence[float],
        min_anchor_overlap: float,
        candidates: int,
        proposals: int,
        proposal_overlap: float,
        max_detections: int,
        min_score: float,
        max_overlap: float,
        seed: int,
        tile: int | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # Keras would cast images of 0 to 255 to 16 bits.
        self.autocast = False
        self.num_classes = positive(num_classes, "num_classes")
        self.image_size = positive(image_size, "image_size")
        self.class_names = _check_names(class_names, self.num_classes)
        self.anchor_scales = _check_numbers(anchor_scales, "anchor_scales")
        self.anchor_ratios = _check_numbers(anchor_ratios, "anchor_ratios")
        self.min_anchor_overlap = float(min_anchor_overlap)
        self.candidates = positive(candidates, "candidates")
        self.proposals = positive(proposals, "proposals")
        self.proposal_overlap = float(proposal_overlap)
        self.max_detections = positive(max_detections, "max_detections")
        self.min_score = float(min_score)
        self.max_overlap = float(max_overlap)
        self.seed = int(seed)
        self.tile = None if tile is None else positive(tile, "tile")
        self.backbone = self._prepare(
            _pyramid.as_pyramid(backbone, self.image_size)
        )
        image = keras.Input(
            (self.image_size, self.image_size, 3), dtype="float32", name="image"
        )
        maps = self.backbone(image)
        names = sorted(maps, key=_pyramid.level_of)
        outputs = self._build({name: maps[name] for name in names})
        self.trunk = keras.Model(image, outputs, name="trunk")
        self._anchors = [
            _boxes.make_anchors(
                tuple(x.shape[1:3]),
                stride_of(x, self.image_size),
                self.anchor_scales,
                self.anchor_ratios,
            )
            for x in self._anchor_maps
        ]
        self.trackers = {
            name: keras.metrics.Mean(name)
            for name in ("rpn_class", "rpn_box", "class", "box")
        }
        self.built = True

    def _prepare(self, backbone: keras.Model) -> keras.Model:
        return backbone

    @property
    def shapes_of_a_cell(self) -> int:
        return len(self.anchor_scales) * len(self.anchor_ratios)

    @property
    def inputs(self) -> list[Any]:
        return self.trunk.inputs

    @property
    def input(self) -> Any:
        return self.trunk.input

    def build(self, input_shape: Any = None) -> None:
        """Does nothing: the constructor has made all weights."""

    def get_config(self) -> dict[str, Any]:
        return {
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "class_names": self.class_names,
            "anchor_scales": self.anchor_scales,
            "anchor_ratios": self.anchor_ratios,
            "min_anchor_overlap": self.min_anchor_overlap,
            "candidates": self.candidates,
            "proposals": self.proposals,
            "max_detections": self.max_detections,
            "min_score": self.min_score,
            "max_overlap": self.max_overlap,
            "seed": self.seed,
            "tile": self.tile,
            "name": self.name,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Detector:
        config = dict(config)
        for name in ("backbone", "dtype"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)

    def anchors(self) -> np.ndarray:
        """Returns all anchors, `(n, 4)` float32 boxes in pixels."""
        return np.concatenate(self._anchors)

    def call(self, images: Any, training: bool = False) -> dict[str, Any]:
        """Detects objects, or returns what the losses are computed from.

        Args:
            images: `(batch, image_size, image_size, 3)` RGB values of 0 to 255,
                uint8 or a float type.
            training: Whether to return the latter.

        Returns:
            "boxes" `(batch, max_detections, 4)` float32 in pixels, "scores"
            float32 and "labels" int32 `(batch, max_detections)`, the best
            first, and "valid" `(batch,)` int32: the number of detections. The
            rest of the rows are boxes and labels of -1 and scores of 0.
        """
        images = tf.cast(images, "float32")
        outputs = self.trunk(images, training=training)
        return outputs if training else self._detect(outputs)

    def detect(self, images: Any) -> dict[str, np.ndarray]:
        """Returns what `call` returns for images, as arrays."""
        return self.predict_on_batch(np.asarray(images))

    def predict_image(
        self, image: np.ndarray, tile: int | None = None, overlap: float = 0.25
    ) -> dict[str, np.ndarray]:
        """Detects objects in a photograph of any size.

        Args:
            image: `(height, width, 3)` uint8 RGB.
            tile: Pixels of the square tiles that the photograph is cut into,
                each of which is seen by the model in its own size. None: as the
                model's `tile` says.
            overlap: Share of a tile that the next one sees again, at least
                below 1: objects up to this size are whole in some tile.

        Returns:
            "boxes" `(n, 4)` float32 in pixels of the photograph, "scores"
            `(n,)` float32 and "labels" `(n,)` int32, the best first. Each tile
            has up to `max_detections` of them, so that a photograph in tiles
            may have more: large ones hold more objects.

        Raises:
            ValueError: `image`, `tile` or `overlap` is something else.
        """
        from tf_deform.models import _serving

        tile = self.tile if tile is None else tile
        return _serving.predict_image(self, image, tile, overlap)

    # Detections.

    def _propose(self, outputs: Outputs) -> tf.Tensor:
        """Returns `(batch, proposals, 4)` boxes, the best first, then -1.

        Each level gives its best candidates; what overlaps a better one of the
        same level goes; of the rest of all levels the best are taken.
        """
        boxes, scores = [], []
        for objectness, deltas, anchors in zip(
            outputs["objectness"], outputs["deltas"], self._anchors
        ):
            objectness = tf.sigmoid(tf.cast(objectness, "float32"))
            objectness = tf.stop_gradient(objectness)
            deltas = tf.stop_gradient(tf.cast(deltas, "float32"))
            count = min(self.candidates, len(anchors))
            best, places = tf.math.top_k(objectness, count)
            anchors = tf.gather(tf.constant(anchors), places)
            deltas = tf.gather(deltas, places, batch_dims=1)
            found = _boxes.decode(anchors, deltas, _ANCHOR_DEVIATIONS)
            rest = self.candidates - count
            scores.append(tf.pad(best, ((0, 0), (0, rest))))
            found = _boxes.clip(found, self.image_size, self.image_size)
            boxes.append(tf.pad(found, ((0, 0), (0, rest), (0, 0))))
        levels, count = len(boxes), self.proposals
        boxes = tf.reshape(tf.stack(boxes, 1), (-1, self.candidates, 4))
        scores = tf.reshape(tf.stack(scores, 1), (-1, self.candidates))
        places, real = _boxes.suppress(
            boxes, scores, count, self.proposal_overlap + _BESIDE
        )
        boxes = tf.gather(boxes, places, batch_dims=1)
        scores = tf.gather(scores, places, batch_dims=1)
        scores = tf.where(real, scores, 0.0)
        boxes = tf.reshape(boxes, (-1, levels * count, 4))
        scores = tf.reshape(scores, (-1, levels * count))
        scores, places = tf.math.top_k(scores, count)
        boxes = tf.gather(boxes, places, batch_dims=1)
        return tf.where(scores[..., None] > 0, boxes, -1.0)

    def _detect(self, outputs: Outputs) -> dict[str, tf.Tensor]:
        proposals = self._propose(outputs)
        logits, deltas = self._judge(outputs["maps"], proposals, False)
        scores = tf.nn.softmax(logits)[..., : self.num_classes]
        likely = tf.less(self.min_score, scores) & (proposals[..., 2:3] >= 0)
        scores = tf.where(likely, scores, 0.0)
        count = scores.shape[1] * self.num_classes
        scores, places = tf.math.top_k(
            tf.reshape(scores, (-1, count)),
            min(count, max(_CANDIDATES, self.max_detections)),
        )
        region, label = places // self.num_classes, places % self.num_classes
        shared = deltas.shape[2] == 1
        deltas = tf.gather(
            tf.reshape(deltas, (-1, deltas.shape[1] * deltas.shape[2], 4)),
            region if shared else places,
            batch_dims=1,
        )
        boxes = tf.gather(proposals, region, batch_dims=1)
        boxes = _boxes.decode(boxes, deltas, _REGION_DEVIATIONS)
        boxes = _boxes.clip(boxes, self.image_size, self.image_size)
        places, real = _boxes.suppress(
            boxes,
            scores,
            self.max_detections,
            self.max_overlap + _BESIDE,
            label,
        )
        boxes, scores, label = (
            tf.gather(x, places, batch_dims=1) for x in (boxes, scores, label)
        )
        return {
            "boxes": tf.where(real[..., None], boxes, -1.0),
            "scores": tf.where(real, scores, 0.0),
            "labels": tf.where(real, label, -1),
            "valid": tf.reduce_sum(tf.cast(real, "int32"), -1),
        }

    def _build(self, maps: Mapping[str, Any]) -> dict[str, Any]:
        """Builds the trunk's outputs, sets `_anchor_maps`, makes the head."""
        raise NotImplementedError

    def _judge(
        self, maps: Any, boxes: tf.Tensor, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Classifies regions and moves their boxes.

        Args:
            maps: The trunk's.
            boxes: `(batch, n, 4)`.
            training: Whether the model is trained.

        Returns:
            Float32 `(batch, n, num_classes + 1)` logits, background last, and
            `(batch, n, num_classes or 1, 4)` deltas.
        """
        raise NotImplementedError

    # Losses.

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> tf.Tensor:
        """Returns the sum of the losses of anchors and of regions.

        Args:
            x: `(batch, image_size, image_size, 3)` images.
            y: `{"boxes": (batch, m, 4), "labels": (batch, m)}`, the objects.
                Padding has the label -1; objects without area within the image
                are left out.
            y_pred: What `call` returns.
            sample_weight: Not used.
            training: Whether `call` was told so.
        """
        if not training:  # `y_pred` are detections, which nothing else reads.
            y_pred = self.trunk(tf.cast(x, "float32"), training=False)
        truth, labels = self._read_objects(y)
        losses = {
            **self._anchor_losses(y_pred, truth),
            **self._losses_of_regions(y_pred, truth, labels, training),
        }
        for name, loss in losses.items():
            self.trackers[name].update_state(loss)
        # The rest are the penalties of regularizers.
        others = [tf.cast(loss, "float32") for loss in self.losses]
        # Chains of sums and `add_n` begin with whichever buffer is free: their
        # last bit depends on threads.
        return tf.reduce_sum(tf.stack([*losses.values(), *others]))

    def _read_objects(self, y: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns boxes and labels of objects, all others -1, at least one."""
        boxes, labels = (
            tf.cast(y["boxes"], "float32"),
            tf.cast(y["labels"], "int32"),
        )
        tf.debugging.assert_less(
            labels,
            self.num_classes,
            f"Expected labels below num_classes={self.num_classes}",
        )
        boxes = tf.pad(boxes, ((0, 0), (0, 1), (0, 0)))
        labels = tf.pad(labels, ((0, 0), (0, 1)), constant_values=-1)
        boxes = _boxes.clip(boxes, self.image_size, self.image_size)
        real = (labels >= 0) & tf.less(0.0, _boxes.area(boxes))
        return (
            tf.where(real[..., None], boxes, -1.0),
            tf.where(real, labels, -1),
        )

    def _random(self, like: tf.Tensor, stream: int) -> tf.Tensor:
        """Returns numbers of 0 to 1 that depend on seed and step alone.

        A run that goes on after a break thus draws what it would have drawn.
        """
        step = 0
        # A model that is not compiled has no such attribute.
        if getattr(self, "optimizer", None) is not None:
            step = tf.cast(self.optimizer.iterations, "int32")
        seed = tf.stack([self.seed + 1000 * stream, step])
        return tf.random.stateless_uniform(tf.shape(like), seed)

    def _anchor_losses(self, outputs: Outputs, truth: tf.Tensor) -> dict:
        """Returns the losses of a sample of anchors, and of their boxes.

        Both are sums, divided by the number of anchors in the sample.
        """
        anchors = tf.constant(self.anchors())
        objectness, deltas = (
            tf.cast(tf.concat(outputs[name], 1), "float32")
            for name in ("objectness", "deltas")
        )
        best, index, forced = _boxes.match(
            anchors, truth, self.min_anchor_overlap
        )
        positive = forced | (best >= _ANCHOR_OBJECT)
        negative = ~positive & (best < _ANCHOR_BACKGROUND)
        positive, negative = self._sample(
            positive, negative, _ANCHOR_SAMPLES, _ANCHOR_POSITIVES, 0
        )
        target = tf.gather(truth, index, batch_dims=1)
        target = tf.where(positive[..., None], target, anchors)
        target = _boxes.encode(anchors, target, _ANCHOR_DEVIATIONS)
        positive = tf.cast(positive, "float32")
        taken = positive + tf.cast(negative, "float32")
        scale = 1 / tf.maximum(tf.reduce_sum(taken), 1.0)
        class_loss = tf.nn.sigmoid_cross_entropy_with_logits(
            positive, objectness
        )
        box_loss = self._box_loss(target - deltas, 0)
        return {
            "rpn_class": scale * tf.reduce_sum(taken * class_loss),
            "rpn_box": scale * tf.reduce_sum(positive * box_loss),
        }

    def _sample(
        self,
        positive: tf.Tensor,
        negative: tf.Tensor,
        count: int,
        most: int,
        stream: int,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Draws `count` rows of each image, at most `most` positive ones."""
        width = positive.shape[1] or tf.shape(positive)[1]
        most, count = (
            min(x, width) if isinstance(width, int) else tf.minimum(x, width)
            for x in (most, count)
        )
        random = self._random(positive, stream)
        full = tf.fill(tf.shape(positive)[:1], most)
        positive = _boxes.choose(positive, random, most, full)
        rest = count - tf.reduce_sum(tf.cast(positive, "int32"), -1)
        return positive, _boxes.choose(negative, random, count, rest)

    def _losses_of_regions(
        self,
        outputs: Outputs,
        truth: tf.Tensor,
        labels: tf.Tensor,
        training: bool,
    ) -> dict:
        """Returns the losses of regions: of proposals and of the objects."""
        boxes = tf.concat([truth, self._propose(outputs)], 1)
        overlap = _boxes.overlaps(boxes, truth)
        index = tf.argmax(overlap, -1)
        real = boxes[..., 2] >= 0
        positive = tf.reduce_max(overlap, -1) >= _REGION_OBJECT
        boxes, index, positive, real = self._choose_regions(
            boxes, index, positive, real
        )
        target = tf.gather(truth, index, batch_dims=1)
        target = tf.where(positive[..., None], target, boxes)
        target = _boxes.encode(boxes, target, _REGION_DEVIATIONS)
        label = tf.gather(labels, index, batch_dims=1)
        label = tf.where(positive, label, self.num_classes)
        logits, deltas = self._judge(outputs["maps"], boxes, training)
        if deltas.shape[2] == 1:
            deltas = deltas[:, :, 0]
        else:
            own = tf.minimum(label, self.num_classes - 1)
            deltas = tf.gather(deltas, own, batch_dims=2)
        class_loss = tf.nn.sparse_softmax_cross_entropy_with_logits(
            label, logits
        )
        positive = tf.cast(positive, "float32")
        box_loss = positive * self._box_loss(target - deltas, 1)
        real = tf.cast(real, "float32")
        return self._reduce(real, class_loss, box_loss)

    def _choose_regions(
        self,
        boxes: tf.Tensor,
        index: tf.Tensor,
        positive: tf.Tensor,
        real: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the rows that go through the head."""
        return boxes, index, positive, real

    def _box_loss(self, error: tf.Tensor, stage: int) -> tf.Tensor:
        """Returns the loss, `(batch, n)`, of errors of deltas."""
        return tf.reduce_sum(tf.abs(error), -1)

    def _reduce(
        self, real: tf.Tensor, class_loss: tf.Tensor, box_loss: tf.Tensor
    ) -> dict:
        """Returns the losses of classes and boxes; padding is not `real`."""
        raise NotImplementedError


def _check_names(
    names: Sequence[str] | None, count: int
) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or len(names) != count:
        raise ValueError(
            f"Expected `class_names` to be num_classes={count} names. "
            f"Received: {names!r}"
        )
    return tuple(str(name) for name in names)


def _check_numbers(values: Sequence[float], name: str) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if not numbers or not all(0 < x < math.inf for x in numbers):
        raise ValueError(
            f"Expected `{name}` to be numbers above 0. Received: {values!r}"
        )
    return numbers
