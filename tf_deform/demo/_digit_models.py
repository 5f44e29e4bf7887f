# SPDX-License-Identifier: Apache-2.0
"""Makes the segmenters and detectors of digits that the demo compares."""

from __future__ import annotations

from typing import Any

from tf_deform import models
from tf_deform._keras import keras
from tf_deform.demo._digit_scenes import IMAGE_SIZE, NUM_CLASSES

DIGITS = tuple(str(digit) for digit in range(10))
DEFORMED = "conv[45]$"  # the last two convolutions of three, at a quarter
# What each arm has other than "plain": arguments of `digit_backbone`, whether
# its last convolutions are deformable, with which arguments of
# `make_deformable`, and how a detector pools.
SEGMENTERS = {
    "plain": {},
    "plain-wide": {"filters": (28, 56)},
    "plain-deep": {"depth": 4},
    "plain-dilated": {"dilation_rate": 2},
    "dcn-v1": {"deformable": {"modulation": None}},
    "dcn-v2": {"deformable": {}},
}
DETECTORS = {
    "plain": {},
    "dcn": {"deformable": {}},
    "dpool": {"pooling": "deform"},
    "both": {"deformable": {}, "pooling": "deform"},
}


def digit_backbone(
    filters: tuple[int, int] = (24, 48), depth: int = 3, dilation_rate: int = 1
) -> keras.Model:
    """Makes a small plain network for scenes of digits.

    It has two convolutions of stride 2 and `depth` more behind them, named
    "conv1" and on, each with a normalization.

    Args:
        filters: Of the first one and of all others.
        depth: Number of convolutions at a quarter of the size.
        dilation_rate: Of the last two.

    Returns:
        A model from `(batch, 64, 64, 3)` RGB of 0 to 255 to the map "P2".
    """
    image = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), name="image")
    x = keras.layers.Rescaling(1 / 255, dtype="float32")(image)
    for index in range(2 + depth):
        x = keras.layers.Conv2D(
            filters[min(index, 1)],
            3,
            strides=2 if index < 2 else 1,
            padding="same",
            dilation_rate=dilation_rate if index >= depth else 1,
            use_bias=False,
            name=f"conv{index + 1}",
        )(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    return keras.Model(image, {"P2": x}, name="digit_backbone")


def digit_detector_sizes() -> dict[str, Any]:
    """Returns the arguments of `RFCN` that suit scenes of digits.

    The digits' boxes are 8 to 30 pixels wide (5 % to 95 %) and mostly higher
    than wide, and a scene has few of them.
    """
    return {
        "channels": 48,
        "rpn_channels": 48,
        "bins": 3,
        "anchor_scales": (2.5, 4, 6.25),
        "anchor_ratios": (1.25,),
        "candidates": 128,
        "proposals": 32,
        "hard_examples": 16,
        "max_detections": 20,
        "min_score": 0.01,
        "max_overlap": 0.5,
    }


def build_segmenter(arm: str, seed: int) -> keras.Model:
    """Returns an untrained segmenter of one of `SEGMENTERS`."""
    options = dict(SEGMENTERS[arm])
    deformable = options.pop("deformable", None)
    keras.utils.set_random_seed(seed)
    model = models.Segmenter(
        digit_backbone(**options),
        NUM_CLASSES,
        output_stride=4,
        image_size=IMAGE_SIZE,
        class_names=("background", *DIGITS),
        filters=48,
    )
    return _deform(model, deformable)


def build_detector(arm: str, seed: int) -> keras.Model:
    """Returns an untrained detector of one of `DETECTORS`."""
    options = dict(DETECTORS[arm])
    deformable = options.pop("deformable", None)
    pooling = options.pop("pooling", "plain")
    keras.utils.set_random_seed(seed)
    model = models.RFCN(
        digit_backbone(**options),
        len(DIGITS),
        pooling,
        IMAGE_SIZE,
        DIGITS,
        seed=seed,
        **digit_detector_sizes(),
    )
    return _deform(model, deformable)


def _deform(model: keras.Model, options: dict[str, Any] | None) -> keras.Model:
    """Makes a model deformable, which then computes what it did before.

    It draws random numbers: before the rest of the model is made, the rest of
    all arms would not begin alike.
    """
    if options is not None:
        models.make_deformable(model, layers=DEFORMED, verbose=False, **options)
    return model
