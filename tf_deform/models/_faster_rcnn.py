# SPDX-License-Identifier: Apache-2.0
"""Implements Faster R-CNN with a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tf_deform._keras import keras
from tf_deform.layers import DeformableROIAlign
from tf_deform.models import _boxes, _pyramid
from tf_deform.models._detector import Detector
from tf_deform.ops import deformable_roi_align
from tf_deform.ops._arguments import positive

POOLINGS = ("align", "deform", "moddeform")
_BINS = 7  # of a region, down and across
# A region of this size, in pixels, is pooled from the map of stride 4 to 8.
_FINEST = 56.0


@keras.saving.register_keras_serializable(package="tf_deform")
class FasterRCNN(Detector):
    """Detects objects by a Faster R-CNN with a feature pyramid.

        backbone = tf_deform.models.backbone("resnet50", "imagenet")
        tf_deform.make_deformable(backbone, "c3-c5")
        model = tf_deform.models.FasterRCNN(backbone, num_classes=3)
        model.compile(optimizer=tf_deform.training.deformable_optimizer(sgd))
        model.fit(batches)  # of images, {"boxes": ..., "labels": ...}
        model.predict_image(photograph)

    Anchors on a pyramid of maps propose regions; each region is pooled from the
    map that suits its size, classified and moved. All numbers of boxes are
    fixed and padded with -1, so that one graph trains, predicts, compiles with
    XLA and is exported. Boxes are float32 x1, y1, x2, y2 in pixels whatever the
    dtype policy; x2 and y2 lie beyond the last pixel.

    The defaults are MMDetection's `faster-rcnn_r50_fpn_1x_coco`, but for
    `candidates`. For small
    objects choose small `anchor_scales`; for a few classes and a CPU, fewer
    channels, units, proposals and samples.

    The class scores are a softmax with a background class. The biases of
    classes, and those of anchors' scores, start at -4.6: one in a hundred.

    Source: Ren et al. 2015, "Faster R-CNN", arXiv:1506.01497; Lin et al. 2016,
    "Feature Pyramid Networks for Object Detection", arXiv:1612.03144;
    deformable pooling: Dai et al. 2017, arXiv:1703.06211, section 2.2; its
    modulation: Zhu et al. 2018, arXiv:1811.11168, section 3.2.

    Args:
        backbone: A model from `(batch, size, size, 3)` RGB of 0 to 255 to maps
            of strides 4, 8, 16 and 32, or some of them without a gap: a
            dictionary "P2" to "P5", or a list that ends with P5. Or a name, see
            `tf_deform.models.backbone`.
        num_classes: Number of classes, without background.
        pooling: "align": ROIAlign. "deform": bins are displaced, by a branch
            for each map. "moddeform": bins are displaced and weighted. Branches
            start at zero; train them at a hundredth of the rate, as published
            (`tf_deform.training.deformable_optimizer(optimizer, 0.01)`), or
            they may move the bins about before anything is learned.
        image_size: Height and width of the images in pixels.
        class_names: Names of the classes, which the model's file keeps.
        fpn_channels: Channels of the pyramid's maps.
        head_units: Units of the two hidden layers of the regions.
        anchor_scales: Roots of the anchors' areas, in strides of their map.
        anchor_ratios: Heights of the anchors over their widths.
        min_anchor_overlap: Least intersection over union from which on an
            object that no anchor overlaps by .7 gets the anchors that overlap
            it most; 0: every object gets some.
        candidates: Number of the best anchors of each map, of which those go
            that overlap a better one. MMDetection takes 2000 in training; their
            overlaps with each other take memory by the square.
        proposals: Number of regions that all maps together propose for an
            image.
        samples: Number of regions of an image that training draws.
        max_detections: Number of detections of an image.
        min_score: Score that a detection must exceed.
        max_overlap: Intersection over union with a better detection of its
            class from which on a detection goes.
        seed: Draws samples in training, together with the step.
        tile: Pixels of the squares that `predict_image` cuts photographs into,
            if it is not told otherwise; those that the model learned from. None
            for whole photographs.
        kwargs: `name` and `dtype`, the policy of all layers but the backbone's.

    Raises:
        TypeError: `backbone` is neither a model nor a name.
        ValueError: An argument is out of range, or the backbone has no such
            maps.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        pooling: str = "align",
        image_size: int = 640,
        class_names: Sequence[str] | None = None,
        *,
        fpn_channels: int = 256,
        head_units: int = 1024,
        anchor_scales: Sequence[float] = (8,),
        anchor_ratios: Sequence[float] = (0.5, 1, 2),
        min_anchor_overlap: float = 0.3,
        candidates: int = 1000,
        proposals: int = 1000,
        samples: int = 512,
        max_detections: int = 100,
        min_score: float = 0.05,
        max_overlap: float = 0.5,
        seed: int = 0,
        tile: int | None = None,
        **kwargs: Any,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(
                f"Expected `pooling` to be one of {POOLINGS}. Received: "
                f"{pooling!r}"
            )
        self.pooling = pooling
        self.fpn_channels = positive(fpn_channels, "fpn_channels")
        self.head_units = positive(head_units, "head_units")
        self.samples = positive(samples, "samples")
        super().__init__(
            backbone,
            num_classes,
            image_size=image_size,
            class_names=class_names,
            anchor_scales=anchor_scales,
            anchor_ratios=anchor_ratios,
            min_anchor_overlap=min_anchor_overlap,
            candidates=candidates,
            proposals=proposals,
            proposal_overlap=0.7,
            max_detections=max_detections,
            min_score=min_score,
            max_overlap=max_overlap,
            seed=seed,
            tile=tile,
            **kwargs,
        )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "pooling": self.pooling,
            "fpn_channels": self.fpn_channels,
            "head_units": self.head_units,
            "samples": self.samples,
        }

    def _build(self, maps: Mapping[str, Any]) -> dict[str, Any]:
        dtype = self.dtype_policy
        pyramid = _pyramid.build_fpn(maps, self.fpn_channels, dtype)
        objectness, deltas = _pyramid.build_rpn(
            pyramid, self.shapes_of_a_cell, self.fpn_channels, dtype
        )
        self._anchor_maps = list(pyramid.values())
        pooled = {name: pyramid[name] for name in maps}
        self._scales = [
            1 / _pyramid.stride_of(x, self.image_size) for x in pooled.values()
        ]
        self.poolings = []
        if self.pooling != "align":
            # Passed only where it is needed: "deform" has no factors.
            extra = {}
            if self.pooling == "moddeform":
                extra["modulation"] = "sigmoid"
            for (name, x), scale in zip(pooled.items(), self._scales):
                layer = DeformableROIAlign(
                    _BINS,
                    scale,
                    data_format="channels_last",
                    dtype=dtype,
                    name=f"pooling_{name}",
                    **extra,
                )
                layer.build(x.shape, (None, 5))
                self.poolings.append(layer)
        self.head = self._build_head()
        return {
            "objectness": objectness,
            "deltas": deltas,
            "maps": list(pooled.values()),
        }

    def _build_head(self) -> keras.Model:
        """Builds two hidden layers, and the layers of classes and boxes."""
        dtype = self.dtype_policy
        bins = keras.Input(
            (_BINS, _BINS, self.fpn_channels),
            dtype=self.compute_dtype,
            name="bins",
        )
        x = keras.layers.Flatten(data_format="channels_last", dtype=dtype)(bins)
        for index in (1, 2):
            x = keras.layers.Dense(
                self.head_units,
                activation="relu",
                dtype=dtype,
                name=f"head_hidden_{index}",
            )(x)
        outputs = []
        prior = _pyramid.prior_of_classes(self.num_classes)
        for name, units, deviation, bias in (
            ("head_classes", self.num_classes + 1, 0.01, prior),
            ("head_boxes", 4 * self.num_classes, 0.001, "zeros"),
        ):
            layer = keras.layers.Dense(
                units,
                kernel_initializer=keras.initializers.RandomNormal(
                    stddev=deviation
                ),
                bias_initializer=bias,
                dtype=dtype,
                name=name,
            )
            outputs.append(layer(x))
        return keras.Model(bins, outputs, name="head")

    def _judge(
        self, maps: Any, boxes: tf.Tensor, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        count = boxes.shape[1]
        bins = self._pool(maps, boxes)
        logits, deltas = self.head(bins, training=training)
        logits = tf.reshape(logits, (-1, count, self.num_classes + 1))
        deltas = tf.reshape(deltas, (-1, count, self.num_classes, 4))
        return tf.cast(logits, "float32"), tf.cast(deltas, "float32")

    def _pool(self, maps: Any, boxes: tf.Tensor) -> tf.Tensor:
        """Pools each region from the map that suits its size.

        Source: Lin et al. 2016, "Feature Pyramid Networks for Object
        Detection", arXiv:1612.03144, Eq. 1, with 224 pixels for a stride of 16.

        Each map pools all regions, those of other maps as padding, which costs
        next to nothing, so that shapes do not depend on boxes.

        Returns:
            `(batch * n, bins, bins, channels)`.
        """
        finest = round(math.log2(1 / self._scales[0]))
        size = tf.sqrt(tf.maximum(_boxes.area(boxes), 1e-6))
        level = tf.math.log(size / _FINEST + 1e-6) / math.log(2)
        level = tf.floor(level) + 2 - finest
        level = tf.clip_by_value(level, 0, len(maps) - 1)
        bins = []
        for index, x in enumerate(maps):
            rois = _boxes.to_rois(boxes, tf.equal(level, index))
            if self.poolings:
                pooled = self.poolings[index](x, rois)
            else:
                pooled = deformable_roi_align(
                    x,
                    rois,
                    pooled_size=_BINS,
                    spatial_scale=self._scales[index],
                )
            bins.append(pooled)
        return tf.add_n(bins)

    def _choose_regions(
        self,
        boxes: tf.Tensor,
        index: tf.Tensor,
        positive: tf.Tensor,
        real: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        """Draws `samples` regions of each image, a quarter of objects."""
        positive, negative = self._sample(
            positive, real & ~positive, self.samples, self.samples // 4, 1
        )
        # Puts the chosen ones first.
        order = tf.cast(positive, "int32") * 2 + tf.cast(negative, "int32")
        order = tf.pad(order, ((0, 0), (0, self.samples)))
        chosen, places = tf.math.top_k(order, self.samples)
        places = tf.minimum(places, tf.shape(boxes)[1] - 1)
        boxes, index = (
            tf.gather(x, places, batch_dims=1) for x in (boxes, index)
        )
        boxes = tf.where(chosen[..., None] > 0, boxes, -1.0)
        return boxes, index, chosen > 1, chosen > 0

    def _reduce(
        self, real: tf.Tensor, class_loss: tf.Tensor, box_loss: tf.Tensor
    ) -> dict:
        scale = 1 / tf.maximum(tf.reduce_sum(real), 1.0)
        return {
            "class": scale * tf.reduce_sum(real * class_loss),
            "box": scale * tf.reduce_sum(box_loss),
        }
