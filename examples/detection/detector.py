# SPDX-License-Identifier: Apache-2.0
"""Defines a small Deformable R-FCN: network, losses, detections.

Source: Dai et al. 2016, "R-FCN", arXiv:1605.06409; Dai et al. 2017,
"Deformable Convolutional Networks", arXiv:1703.06211.

One graph trains, evaluates, compiles with XLA and exports to ONNX and LiteRT:
all images have the same number of proposals, and missing proposals are padding.
Boxes are `(x1, y1, x2, y2)` in pixels, where x2 and y2 lie beyond the last
pixel. A padding box is -1 throughout, as Keras pads boxes.
"""

import functools

import keras
import tensorflow as tf
from keras.utils import bounding_boxes

import tf_deform

# A dimension is an integer where the graph knows it, else a scalar tensor.
Size = int | tf.Tensor

ARMS = ("plain", "dcn", "dpool", "both")

STRIDE = 4  # Pixels per cell of the feature map, down and across.
# Anchors as (width, height) in pixels. The digits' boxes are 8 to 30 pixels
# wide (5 % to 95 %) and mostly higher than wide.
ANCHORS = ((9, 11), (14, 18), (22, 28))
BINS = 3  # Bins of a region, down and across.

# Proposals are the best anchors by score; anchors that overlap a better anchor
# are left out.
CANDIDATES = 128
PROPOSALS = 32
# Whole pixels rarely overlap by exactly this share. Runtimes would decide
# differently about an overlap that equals the bound.
PROPOSAL_OVERLAP = 0.6999
# The model learns from the proposals of an image that have the largest loss.
HARD_EXAMPLES = 16
# An anchor belongs to an object from the first overlap on, and is background
# below the second overlap; a proposal belongs to an object from the third on.
ANCHOR_OBJECT, ANCHOR_BACKGROUND, PROPOSAL_OBJECT = 0.5, 0.4, 0.5
# The model learns boxes in these units: shifts in tenths of the size,
# logarithms of the size in fifths.
VARIANCE = (0.1, 0.1, 0.2, 0.2)
MAX_DELTA = 10.0  # In the units of `VARIANCE`: exp(2) times the size.

MAX_DETECTIONS = 20
DETECTION_OVERLAP = 0.4999
MIN_SCORE = 0.01


def make_anchors(rows: Size, columns: Size) -> tf.Tensor:
    """Returns `(rows * columns * anchors, 4)` boxes around all cells."""
    x, y = (
        STRIDE * (tf.range(cells, dtype="float32") + 0.5)
        for cells in (columns, rows)
    )
    centers = tf.stack(tf.meshgrid(x, y), axis=-1)[:, :, None]
    sizes = tf.constant(ANCHORS, "float32")
    boxes = tf.concat((centers - sizes / 2, centers + sizes / 2), axis=-1)
    return tf.reshape(boxes, (-1, 4))


def decode(
    anchors: tf.Tensor, deltas: tf.Tensor, height: Size, width: Size
) -> tf.Tensor:
    """Returns the boxes that deltas make of anchors, cut at the image's edge.

    Args:
        anchors: `(n, 4)` or `(batch, n, 4)` boxes.
        deltas: `(batch, n, 4)`.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        `(batch, n, 4)` finite boxes for any finite deltas.
    """
    boxes = bounding_boxes.decode_deltas_to_boxes(
        anchors,
        tf.clip_by_value(deltas, -MAX_DELTA, MAX_DELTA),
        anchor_format="xyxy",
        box_format="xyxy",
        variance=VARIANCE,
    )
    corner = tf.cast((width, height, width, height), "float32")
    return tf.clip_by_value(boxes, 0, corner)


def encode(anchors: tf.Tensor, boxes: tf.Tensor) -> tf.Tensor:
    """Returns the deltas, `(batch, n, 4)`, that make boxes of anchors."""
    return bounding_boxes.encode_box_to_deltas(
        anchors,
        boxes,
        anchor_format="xyxy",
        box_format="xyxy",
        variance=VARIANCE,
    )


def match(
    boxes: tf.Tensor, truth: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Finds for each box the object that it overlaps most.

    Args:
        boxes: `(batch, n, 4)` boxes.
        truth: `(batch, m, 4)` boxes of the objects.

    Returns:
        `(batch, n, m)` intersection over union, 0 where either is padding;
        `(batch, n)` the largest of each row and, int64, the object's index.
    """
    overlaps = bounding_boxes.compute_iou(boxes, truth, "xyxy")
    return (
        overlaps,
        tf.reduce_max(overlaps, axis=-1),
        tf.argmax(overlaps, axis=-1),
    )


def suppress(
    boxes: tf.Tensor,
    scores: tf.Tensor,
    size: int,
    max_overlap: float,
    min_score: float = 0.0,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
    """Chooses the best boxes of each class that overlap no better box much.

    It does the same as `tf.image.combined_non_max_suppression`, which XLA,
    LiteRT and ONNX do not have, but drops boxes of no area. It has one step for
    each box to choose and no loop, so that every runtime chooses the same
    boxes. Among equal scores the score of the first class comes first.

    Args:
        boxes: `(batch, n, 4)` boxes, the same for all classes.
        scores: `(batch, n, classes)`.
        size: number of boxes to choose.
        max_overlap: intersection over union with a better box; a box with a
            larger overlap is dropped.
        min_score: bound that a score must exceed, at least 0.

    Returns:
        `(batch, size, 4)` boxes, `(batch, size)` scores and int32 classes, the
        best first, and int32 `(batch,)`, the number of chosen boxes: all others
        are 0.
    """
    _, count, classes = keras.ops.shape(scores)
    x1, y1, x2, y2 = tf.unstack(boxes, axis=-1)
    area = tf.maximum(x2 - x1, 0.0) * tf.maximum(y2 - y1, 0.0)
    # Avoids `greater`, which is true of NaN in OpenVINO.
    real = tf.less(min_score, scores) & (area > 0)[..., None]
    scores = tf.where(real, scores, 0.0)
    scores = tf.reshape(tf.transpose(scores, (0, 2, 1)), (-1, classes * count))

    # Avoids a division, which is undefined for boxes of no area. This also
    # drops a box once it is chosen.
    width, height = (
        tf.minimum(end[:, :, None], end[:, None])
        - tf.maximum(start[:, :, None], start[:, None])
        for start, end in ((x1, x2), (y1, y2))
    )
    common = tf.maximum(width, 0.0) * tf.maximum(height, 0.0)
    union = area[:, :, None] + area[:, None] - common
    index = tf.range(count)
    goes = (common > max_overlap * union) | (index[:, None] == index)
    goes = tf.cast(goes, scores.dtype)

    chosen, best_scores = [], []
    for _ in range(size):
        best = tf.argmax(scores, axis=-1, output_type="int32")
        chosen.append(best)
        best_scores.append(tf.reduce_max(scores, axis=-1))
        # tensorflow.js cannot run `tf.one_hot` of a single class.
        of_class = tf.equal(best[:, None] // count, tf.range(classes))
        of_class = tf.cast(of_class, scores.dtype)
        of_box = tf.gather(goes, best % count, batch_dims=1)
        of_both = of_class[:, :, None] * of_box[:, None]
        scores *= 1 - tf.reshape(of_both, (-1, classes * count))
    chosen, scores = tf.stack(chosen, axis=1), tf.stack(best_scores, axis=1)
    boxes = tf.gather(boxes, chosen % count, batch_dims=1)
    real = scores > 0
    return (
        tf.where(real[..., None], boxes, 0.0),
        scores,
        tf.where(real, chosen // count, 0),
        tf.reduce_sum(tf.cast(real, "int32"), axis=-1),
    )


@keras.saving.register_keras_serializable(package="tf_deform_examples")
class Proposals(keras.layers.Layer):
    """Proposes boxes that may hold objects: the best anchors, moved."""

    def compute_output_shape(self, objectness_shape, deltas_shape):
        return (objectness_shape[0], PROPOSALS, 4)

    def call(self, objectness: tf.Tensor, deltas: tf.Tensor) -> tf.Tensor:
        """Chooses proposals, which do not pass gradients on.

        Args:
            objectness: `(batch, rows, columns, anchors)` logits.
            deltas: `(batch, rows, columns, 4 * anchors)`.

        Returns:
            `(batch, PROPOSALS, 4)` boxes, the best first, then padding.
        """
        _, rows, columns, count = keras.ops.shape(objectness)
        count = rows * columns * count
        objectness = tf.reshape(tf.stop_gradient(objectness), (-1, count))
        deltas = tf.reshape(tf.stop_gradient(deltas), (-1, count, 4))
        # A small image has fewer anchors than candidates.
        scores = tf.pad(tf.sigmoid(objectness), ((0, 0), (0, CANDIDATES)))
        scores, best = tf.math.top_k(scores, CANDIDATES)
        best = tf.minimum(best, count - 1)
        anchors = tf.gather(make_anchors(rows, columns), best)
        deltas = tf.gather(deltas, best, batch_dims=1)
        boxes = decode(anchors, deltas, STRIDE * rows, STRIDE * columns)
        boxes, _, _, valid = suppress(
            boxes, scores[..., None], PROPOSALS, PROPOSAL_OVERLAP
        )
        real = tf.sequence_mask(valid, PROPOSALS)
        return tf.where(real[..., None], boxes, -1.0)


@keras.saving.register_keras_serializable(package="tf_deform_examples")
class RegionHead(keras.layers.Layer):
    """Pools regions position-sensitively, and averages their bins.

    Args:
        num_classes: number of classes, background included.
        deformable: whether the bins move.
    """

    def __init__(self, num_classes: int, deformable: bool, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.deformable = deformable
        pooling = functools.partial(
            tf_deform.layers.DeformablePSROIPooling,
            pooled_size=BINS,
            spatial_scale=1 / STRIDE,
        )
        self.score_pooling = pooling(num_classes, name="score_pooling")
        self.box_pooling = pooling(4, name="box_pooling")

    def compute_output_shape(
        self, score_maps_shape, box_maps_shape, features_shape, boxes_shape
    ):
        regions = tuple(boxes_shape[:2])
        return (*regions, self.num_classes), (*regions, 4)

    def call(
        self,
        score_maps: tf.Tensor,
        box_maps: tf.Tensor,
        features: tf.Tensor,
        boxes: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Classifies regions and refines their boxes.

        Args:
            score_maps: `(batch, rows, columns, num_classes * BINS**2)`.
            box_maps: `(batch, rows, columns, 4 * BINS**2)`.
            features: `(batch, rows, columns, channels)`, from which the
                displacements of bins are predicted.
            boxes: `(batch, n, 4)` regions.

        Returns:
            `(batch, n, num_classes)` logits and `(batch, n, 4)` deltas, all 0
            for padding.
        """
        rois = to_rois(boxes)
        features = features if self.deformable else None
        outputs = []
        for pooling, maps in (
            (self.score_pooling, score_maps),
            (self.box_pooling, box_maps),
        ):
            bins = pooling(maps, rois, trans_inputs=features)
            votes = tf.reduce_mean(bins, axis=(1, 2))
            outputs.append(
                tf.reshape(votes, (-1, boxes.shape[1], votes.shape[-1]))
            )
        return tuple(outputs)


def to_rois(boxes: tf.Tensor) -> tf.Tensor:
    """Converts boxes to regions as the pooling takes them, with its padding.

    Args:
        boxes: `(batch, n, 4)`.

    Returns:
        `(batch * n, 5)`: index of the image, or -1, and the first and the last
        pixel, x before y.
    """
    padding = boxes[..., 2:3] < 0
    images = tf.range(tf.shape(boxes)[0], dtype=boxes.dtype)[:, None, None]
    images = tf.where(padding, -1.0, images)
    rois = tf.concat((images, boxes - (0.0, 0.0, 1.0, 1.0)), axis=-1)
    return tf.reshape(rois, (-1, 5))


@keras.saving.register_keras_serializable(package="tf_deform_examples")
class Detector(keras.Model):
    """Detects objects in small images by a Deformable R-FCN.

    The backbone has two convolutions of stride 2 and three more convolutions;
    in the arms "dcn" and "both" the last two are deformable. In the arms
    "dpool" and "both" the bins of a region move. The arms are alike in all
    other respects.

    The model is called with `(batch, height, width, 1)` uint8 gray values and
    returns the operands of the losses; see `detect` for detections.

    Args:
        arm: one of `ARMS`.
        num_classes: number of classes, background included.
        image_size: height and width of the images in pixels, a multiple of
            `STRIDE`; or None for images of any height and width. It has no
            part in the weights.
    """

    def __init__(
        self,
        arm: str,
        num_classes: int = 11,
        image_size: int | None = 64,
        **kwargs,
    ):
        if arm not in ARMS:
            raise ValueError(
                f"Expected `arm` to be one of {ARMS}. Received: {arm!r}"
            )
        if image_size is not None and (
            image_size < STRIDE or image_size % STRIDE
        ):
            raise ValueError(
                f"Expected `image_size` to be a multiple of {STRIDE} or None. "
                f"Received: {image_size}"
            )
        convolution = keras.layers.Conv2D
        if arm in ("dcn", "both"):
            convolution = functools.partial(
                tf_deform.layers.DeformableConv2D, modulation="2sigmoid"
            )

        def block(x, layer, filters, name, strides=1):
            x = layer(
                filters,
                3,
                strides=strides,
                padding="same",
                use_bias=False,
                name=name,
            )(x)
            return keras.layers.ReLU()(
                keras.layers.BatchNormalization(momentum=0.9)(x)
            )

        def score(x, filters, name, **kwargs):
            return keras.layers.Conv2D(filters, 1, name=name, **kwargs)(x)

        image = keras.Input(
            (image_size, image_size, 1), dtype="uint8", name="image"
        )
        x = keras.layers.Rescaling(1 / 255)(image)
        x = block(x, keras.layers.Conv2D, 24, "conv1", strides=2)
        x = block(x, keras.layers.Conv2D, 48, "conv2", strides=2)
        x = block(x, keras.layers.Conv2D, 48, "conv3")
        x = block(x, convolution, 48, "conv4")
        features = block(x, convolution, 48, "conv5")

        x = block(features, keras.layers.Conv2D, 48, "rpn")
        # Few anchors belong to an object, so the first scores are low.
        rarely = keras.initializers.Constant(-4.0)
        objectness = score(
            x, len(ANCHORS), "objectness", bias_initializer=rarely
        )
        deltas = score(x, 4 * len(ANCHORS), "anchor_deltas")
        proposals = Proposals(name="proposals")(objectness, deltas)
        objectness = keras.layers.Reshape((-1,))(objectness)
        deltas = keras.layers.Reshape((-1, 4))(deltas)

        score_maps = score(features, num_classes * BINS**2, "score_maps")
        box_maps = score(features, 4 * BINS**2, "box_maps")
        head = RegionHead(num_classes, arm in ("dpool", "both"), name="head")
        logits, box_deltas = head(score_maps, box_maps, features, proposals)
        super().__init__(
            image,
            {
                "objectness": objectness,
                "anchor_deltas": deltas,
                "proposals": proposals,
                "logits": logits,
                "box_deltas": box_deltas,
                "maps": (score_maps, box_maps, features),
            },
            **kwargs,
        )
        self.arm = arm
        self.num_classes = num_classes
        self.image_size = image_size
        # Traces `_detect` as one graph for any number of images.
        self.detect = tf.function(
            self._detect,
            [tf.TensorSpec((None, image_size, image_size, 1), "uint8")],
        )
        self.trackers = {
            name: keras.metrics.Mean(name)
            for name in ("rpn_class", "rpn_box", "class", "box")
        }

    def get_config(self) -> dict:
        return {
            "arm": self.arm,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return cls(**config)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ) -> tf.Tensor:
        """Returns the sum of the losses of anchors and of proposals.

        Args:
            x: not used.
            y: `{"boxes": (batch, m, 4), "labels": (batch, m)}`, the objects:
                boxes and classes from 1 on, padded with -1.
            y_pred: outputs of the model.
            sample_weight: not used.
            training: not used.
        """
        # Boxes that lie outside of the image altogether become padding.
        _, rows, columns, _ = keras.ops.shape(y_pred["maps"][0])
        objects = bounding_boxes.clip_to_image_size(
            y, STRIDE * rows, STRIDE * columns
        )
        labels = objects["labels"]
        truth = tf.where(labels[..., None] > 0, objects["boxes"], -1.0)
        losses = {
            **self._anchor_losses(make_anchors(rows, columns), truth, y_pred),
            **self._proposal_losses(truth, labels, y_pred),
        }
        for name, loss in losses.items():
            self.trackers[name].update_state(loss)
        return tf.add_n(list(losses.values()))

    def _anchor_losses(
        self, anchors: tf.Tensor, truth: tf.Tensor, y_pred: dict
    ) -> dict:
        """Returns focal loss of all anchors, box loss of the objects' anchors.

        Both are sums, divided by the number of anchors that belong to an
        object.
        """
        overlaps, overlap, index = match(
            tf.repeat(anchors[None], tf.shape(truth)[0], axis=0), truth
        )
        # An object that no anchor overlaps enough gets the anchors that overlap
        # it most.
        nearest = tf.reduce_max(overlaps, axis=1, keepdims=True)
        nearest = (overlaps == nearest) & (overlaps > 0)
        positive = (overlap >= ANCHOR_OBJECT) | tf.reduce_any(nearest, axis=-1)
        judged = positive | (overlap < ANCHOR_BACKGROUND)
        positive = tf.cast(positive, "float32")
        scale = 1 / tf.maximum(tf.reduce_sum(positive), 1.0)
        focal = keras.losses.BinaryFocalCrossentropy(
            from_logits=True, apply_class_balancing=True, reduction="sum"
        )
        huber = keras.losses.Huber(reduction="sum")
        targets = encode(anchors, tf.gather(truth, index, batch_dims=1))
        return {
            "rpn_class": scale
            * focal(
                positive[..., None],
                y_pred["objectness"][..., None],
                tf.cast(judged, "float32"),
            ),
            "rpn_box": scale
            * huber(targets, y_pred["anchor_deltas"], positive),
        }

    def _proposal_losses(
        self, truth: tf.Tensor, labels: tf.Tensor, y_pred: dict
    ) -> dict:
        """Returns losses of the proposals on which their sum is largest."""
        proposals = y_pred["proposals"]
        logits, deltas = y_pred["logits"], y_pred["box_deltas"]
        _, overlap, index = match(proposals, truth)
        real = tf.cast(proposals[..., 2] >= 0, "float32")
        positive = tf.cast(overlap >= PROPOSAL_OBJECT, "float32")
        labels = tf.gather(labels, index, batch_dims=1)
        labels = tf.where(positive > 0, labels, tf.zeros_like(labels))
        targets = encode(proposals, tf.gather(truth, index, batch_dims=1))
        class_loss = real * keras.losses.sparse_categorical_crossentropy(
            labels, logits, from_logits=True
        )
        box_loss = real * positive * 4 * keras.losses.huber(targets, deltas)
        _, hard = tf.math.top_k(
            tf.stop_gradient(class_loss + box_loss), HARD_EXAMPLES
        )
        hardest = functools.partial(tf.gather, indices=hard, batch_dims=1)
        return {
            "class": tf.reduce_mean(hardest(class_loss)),
            "box": tf.reduce_mean(hardest(box_loss)),
        }

    def _detect(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """Detects objects.

        Args:
            images: `(batch, height, width, 1)` uint8 gray values, one image or
                more.

        Returns:
            "boxes" `(batch, MAX_DETECTIONS, 4)` in pixels, "scores" and int32
            "labels" `(batch, MAX_DETECTIONS)`, the best first, and int32
            "valid" `(batch,)`: the number of detections; the rest of the rows
            is 0.
        """
        _, height, width, _ = keras.ops.shape(images)
        outputs = self(images, training=False)
        proposals = outputs["proposals"]
        boxes = decode(proposals, outputs["box_deltas"], height, width)
        scores = tf.nn.softmax(outputs["logits"])[..., 1:]
        scores = tf.where(proposals[..., 2:3] < 0, 0.0, scores)
        boxes, scores, classes, valid = suppress(
            boxes, scores, MAX_DETECTIONS, DETECTION_OVERLAP, MIN_SCORE
        )
        real = tf.sequence_mask(valid, MAX_DETECTIONS)
        return {
            "boxes": boxes,
            "scores": scores,
            "labels": tf.where(real, classes + 1, 0),
            "valid": valid,
        }
