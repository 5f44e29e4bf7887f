# SPDX-License-Identifier: Apache-2.0
"""Makes models for LiteRT whose numbers stay in a range, and images."""

import keras
import numpy as np
from operands import random

from tf_deform.layers import DeformableConv2D


def randomise(model):
    rng = np.random.default_rng(3)
    for weight in model.trainable_weights:
        taps = np.prod(weight.shape[:-1]) if len(weight.shape) > 1 else 100
        weight.assign(rng.normal(size=weight.shape) / np.sqrt(taps))
    return model


def small_model(size=(None, None), channels=3, batch=None, **arguments):
    image = keras.Input((*size, channels), batch_size=batch, name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(image)
    arguments = {"padding": "same", "modulation": "2sigmoid", **arguments}
    x = DeformableConv2D(8, 3, name="deformable", **arguments)(x)
    return randomise(keras.Model(image, keras.layers.Conv2D(4, 1)(x)))


def smooth(*shape, seed=0):
    """Draws images whose neighbouring pixels are alike, like a camera's."""
    images = random(*shape, seed=seed)
    for axis in (1, 2):
        images = sum(np.roll(images, n, axis) for n in range(-3, 4)) / 3
    return images.astype("float32")


def pooling_model(layer):
    features = keras.Input((20, 24, 6), name="features")
    rois = keras.Input((5,), name="rois")
    x = keras.layers.Conv2D(18, 3, padding="same")(features)
    x = keras.layers.Flatten()(layer(x, rois))
    return randomise(
        keras.Model([features, rois], keras.layers.Dense(5, name="last")(x))
    )


def make_rois(batch, number, seed=0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(0, 10, (number, 2))
    end = start + rng.uniform(4, 12, (number, 2))
    index = rng.integers(0, batch, (number, 1))
    return np.concatenate([index, start, end], 1).astype("float32")
