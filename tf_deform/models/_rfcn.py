# SPDX-License-Identifier: Apache-2.0
"""Implements R-FCN with deformable position-sensitive pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from tf_deform._keras import keras
from tf_deform.layers import DeformablePSROIPooling
from tf_deform.models import _boxes, _pyramid
from tf_deform.models._detector import Detector
from tf_deform.models._output_stride import set_output_stride
from tf_deform.ops._arguments import positive

POOLINGS = ("deform", "plain")
_STRIDE = 16  # pixels of the image for one of the maps, at most
# Up to these errors the losses of boxes are square, for anchors and regions.
# Source: Girshick 2015, "Fast R-CNN", arXiv:1504.08083, Eq. 3; 1/9 in Ren et
# al.'s code.
_SQUARE = (1 / 9, 1.0)


@keras.saving.register_keras_serializable(package="tf_deform")
class RFCN(Detector):
    """Detects objects by an R-FCN with deformable position-sensitive pooling.

        model = tf_deform.models.RFCN(backbone, num_classes=3)

    It is used as `FasterRCNN` is. Anchors on one map propose regions; each bin
    of a region reads maps of its own, and the bins' mean is the score, without
    layers for each region. The regions with the largest loss are learned from.

    The coarsest map has a stride of 16 pixels: a backbone whose last stage goes
    to 32 is dilated, see `set_output_stride`; make it deformable afterwards
    (`make_deformable(model, layers="conv5")`), with `offset_dilation_rate=1` as
    published. A backbone whose maps end earlier is taken as it is.

    Source: Dai et al. 2016, "R-FCN", arXiv:1605.06409; Dai et al. 2017,
    "Deformable Convolutional Networks", arXiv:1703.06211, sections 2.2 and 3.2;
    the numbers are those of the code published with the latter, for COCO, but
    for `candidates`. Bins move alike for all classes, and anchors that reach
    over the image's edge are learned from, too.

    Args:
        backbone: As in `FasterRCNN`. The coarsest map makes the maps of
            regions; anchors are judged on the one before if that is of the same
            size, else on the same.
        num_classes: Number of classes, without background.
        pooling: "deform": bins are displaced, by a branch that starts at zero.
            "plain": they are not.
        image_size: Height and width of the images in pixels.
        class_names: Names of the classes, which the model's file keeps.
        channels: Channels of the layer that all maps are made from.
        rpn_channels: Channels of the layer from which anchors are judged.
        bins: Bins of a region, down and across.
        anchor_scales: Roots of the anchors' areas, in strides of the map.
        anchor_ratios: Heights of the anchors over their widths.
        min_anchor_overlap: As in `FasterRCNN`.
        candidates: As in `FasterRCNN`. The published code takes 6000, whose
            overlaps with each other would take a GiB.
        proposals: Number of regions of an image.
        hard_examples: Number of regions of an image that are learned from.
        max_detections, min_score, max_overlap: As in `FasterRCNN`.
        seed, tile, kwargs: As in `FasterRCNN`.

    Raises:
        TypeError: `backbone` is neither a model nor a name.
        ValueError: An argument is out of range, or the backbone has no such
            maps or cannot be dilated.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        pooling: str = "deform",
        image_size: int = 640,
        class_names: Sequence[str] | None = None,
        *,
        channels: int = 1024,
        rpn_channels: int = 512,
        bins: int = 7,
        anchor_scales: Sequence[float] = (4, 8, 16, 32),
        anchor_ratios: Sequence[float] = (0.5, 1, 2),
        min_anchor_overlap: float = 0.0,
        candidates: int = 2000,
        proposals: int = 300,
        hard_examples: int = 128,
        max_detections: int = 100,
        min_score: float = 0.05,
        max_overlap: float = 0.3,
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
        self.channels = positive(channels, "channels")
        self.rpn_channels = positive(rpn_channels, "rpn_channels")
        self.bins = positive(bins, "bins")
        self.hard_examples = positive(hard_examples, "hard_examples")
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
            "channels": self.channels,
            "rpn_channels": self.rpn_channels,
            "bins": self.bins,
            "hard_examples": self.hard_examples,
        }

    def _prepare(self, backbone: keras.Model) -> keras.Model:
        """Makes the coarsest map one of 16 pixels, by dilation."""
        size = self.image_size
        image = keras.KerasTensor((1, size, size, 3))
        shape = list(backbone.compute_output_spec(image).values())[-1]
        if _pyramid.stride_of(shape, size) <= _STRIDE:
            return backbone
        return set_output_stride(backbone, _STRIDE)

    def _build(self, maps: Mapping[str, Any]) -> dict[str, Any]:
        dtype = self.dtype_policy
        *finer, coarsest = maps.values()
        # Anchors are judged on the last map before the dilated one.
        same = [x for x in finer if x.shape == coarsest.shape]
        same += [x for x in finer if x.shape[1:3] == coarsest.shape[1:3]]
        judged = same[-1] if same else coarsest
        objectness, deltas = _pyramid.build_rpn(
            {"P": judged}, self.shapes_of_a_cell, self.rpn_channels, dtype
        )
        self._anchor_maps = [judged]
        x = self._convolution(self.channels, "features", activation="relu")
        features = x(coarsest)
        cells = self.bins**2
        score_maps = self._convolution(
            cells * (self.num_classes + 1),
            "score_maps",
            bias_initializer=_pyramid.prior_of_classes(self.num_classes, cells),
        )(features)
        box_maps = self._convolution(4 * cells, "box_maps")(features)
        scale = 1 / _pyramid.stride_of(coarsest, self.image_size)
        maps = [score_maps, box_maps, features]
        self.poolings = []
        for output_dim, name in (
            (self.num_classes + 1, "score_pooling"),
            (4, "box_pooling"),
        ):
            layer = DeformablePSROIPooling(
                output_dim,
                self.bins,
                scale,
                data_format="channels_last",
                dtype=dtype,
                name=name,
            )
            given = {}
            if self.pooling == "deform":
                given["trans_inputs_shape"] = features.shape
            layer.build(maps[len(self.poolings)].shape, (None, 5), **given)
            self.poolings.append(layer)
        return {"objectness": objectness, "deltas": deltas, "maps": maps}

    def _convolution(self, filters: int, name: str, **arguments: Any) -> Any:
        return _pyramid.convolution(
            filters,
            1,
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
            dtype=self.dtype_policy,
            name=name,
            **arguments,
        )

    def _judge(
        self, maps: Any, boxes: tf.Tensor, training: bool
    ) -> tuple[tf.Tensor, tf.Tensor]:
        *maps, features = maps
        rois = _boxes.to_rois(boxes, last=1.0)
        if self.pooling == "plain":
            features = None
        count = boxes.shape[1] or tf.shape(boxes)[1]
        votes = []
        for layer, maps_of_layer in zip(self.poolings, maps):
            bins = layer(maps_of_layer, rois, trans_inputs=features)
            vote = tf.reduce_mean(tf.cast(bins, "float32"), (1, 2))
            votes.append(tf.reshape(vote, (-1, count, vote.shape[-1])))
        logits, deltas = votes
        return logits, deltas[:, :, None]

    def _box_loss(self, error: tf.Tensor, stage: int) -> tf.Tensor:
        error, bound = tf.abs(error), _SQUARE[stage]
        loss = tf.where(
            error < bound, error**2 / (2 * bound), error - bound / 2
        )
        return tf.reduce_sum(loss, -1)

    def _reduce(
        self, real: tf.Tensor, class_loss: tf.Tensor, box_loss: tf.Tensor
    ) -> dict:
        """Averages over the regions of each image whose loss is largest.

        Source: Shrivastava et al. 2016, "Training Region-based Object Detectors
        with Online Hard Example Mining", arXiv:1604.03540.
        """
        loss = tf.stop_gradient(real * (class_loss + box_loss))
        loss = tf.pad(loss, ((0, 0), (0, self.hard_examples)))
        least = tf.math.top_k(loss, self.hard_examples)[0][:, -1:]
        loss = loss[:, : -self.hard_examples]
        hard = tf.cast(loss >= least, "float32") * real
        scale = 1 / tf.maximum(tf.reduce_sum(hard), 1.0)
        return {
            "class": scale * tf.reduce_sum(hard * class_loss),
            "box": scale * tf.reduce_sum(hard * box_loss),
        }
