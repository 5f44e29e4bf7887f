# SPDX-License-Identifier: Apache-2.0
"""Writes small models in every format of this process' Keras, and reads them.

    python tests/lib/keras_files.py FOLDER

writes a folder for each kind of model. `tests/build/golden/keras_2.tar.xz` and
`keras_3.tar.xz` hold such folders, written by the oldest that are supported:
Keras 2.15.0 (TensorFlow 2.15.1) and Keras 3.5.0 (TensorFlow 2.18.1).
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

import tf_deform
from tf_deform._keras import KERAS_2, keras
from tf_deform._loader import op_library
from tf_deform.layers import (
    DeformableConv2D,
    DeformablePSROIPooling,
    DeformableROIAlign,
    DeformableROIPooling,
)

layers = keras.layers
SIZE = (14, 15, 3)
# Stock layers; a convolution that is called as stock layers are; and layers of
# several arguments.
KINDS = ("stock", "convolution", "regions")


def make(kind: str) -> keras.Model:
    """Returns a new model of one of `KINDS`."""
    image = keras.Input(SIZE, name="image")
    inputs = [image]
    x = layers.Conv2D(4, 3, use_bias=False, name="first")(image)
    x = layers.BatchNormalization(name="norm")(x)
    if kind == "stock":
        x = layers.Conv2D(4, 3, name="own")(x)
    else:
        x = DeformableConv2D(4, 3, modulation="sigmoid", name="own")(x)
    x = layers.Conv2D(4, 3, activation="softplus", name="last")(x)
    if kind == "regions":
        rois = keras.Input((5,), name="rois")
        offset = keras.Input((8, 9, 18), name="offset")
        inputs += [rois, offset]
        given = DeformableConv2D(4, 3, use_bias=False, name="given")
        maps = given(layers.ZeroPadding2D(1)(x), offset)
        pooled = [
            DeformableROIAlign(2, 1.0, units=(3,), name="align")(x, rois),
            DeformableROIPooling(2, 1.0, name="pool")(x, rois),
            DeformablePSROIPooling(1, 2, 1.0, name="psroi")(
                x, rois, trans_inputs=maps
            ),
        ]
        x = layers.Concatenate()(pooled)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def inputs_of(kind: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(2, *SIZE))]
    if kind == "regions":
        inputs.append([[0, 1, 1, 5, 6], [1, 2, 1, 6, 5]])
        inputs.append(rng.normal(size=(2, 8, 9, 18)))
    return [np.asarray(value, "float32") for value in inputs]


def fill(model: keras.Model) -> None:
    """Sets weights that all differ, so that none can be taken for another."""
    rng = np.random.default_rng(0)
    for weight in model.weights:
        is_variance = "variance" in weight.name
        low, high = (0.5, 1.0) if is_variance else (-0.3, 0.3)
        weight.assign(rng.uniform(low, high, weight.shape))


def run(model: Callable, kind: str) -> np.ndarray:
    inputs = inputs_of(kind)
    outputs = model(inputs if len(inputs) > 1 else inputs[0])
    return np.asarray(outputs).astype("float32")


def train(model: keras.Model, kind: str) -> None:
    """Trains a compiled model, and checks that every weight changes."""
    before = model.get_weights()
    inputs, target = tuple(inputs_of(kind)), np.ones((2, 2), "float32")
    data = (inputs if len(inputs) > 1 else inputs[0], target)
    model.fit(tf.data.Dataset.from_tensors(data), verbose=0)
    for weight, old, new in zip(model.weights, before, model.get_weights()):
        assert np.any(old != new), weight.name


def own_layers(model: keras.Model) -> dict[str, Any]:
    """Returns the layers of this package by name."""
    return {
        layer.name: layer
        for layer in model.layers
        if type(layer).__module__.startswith("tf_deform.")
    }


def serving(path: pathlib.Path) -> Callable:
    """Returns a SavedModel's signature as a function of `inputs_of`."""
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    specs = signature.structured_input_signature[1]

    def call(inputs: Any) -> tf.Tensor:
        inputs = inputs if isinstance(inputs, list) else [inputs]
        # Keras' own exports number the inputs.
        named = {
            name: tf.constant(value)
            for name, spec in specs.items()
            for value in inputs
            if spec.shape.is_compatible_with(value.shape)
        }
        (output,) = signature(**named).values()
        return output

    return call


def write(folder: pathlib.Path, kind: str) -> None:
    """Writes a trained model in every format that this Keras has."""
    folder.mkdir(parents=True)
    model = make(kind)
    fill(model)
    model.compile("sgd", "mean_squared_error")
    train(model, kind)
    np.save(folder / "expected.npy", run(model, kind))
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    model.save_weights(str(folder / "model.weights.h5"))
    if KERAS_2:
        model.save(folder / "saved")
        model.save_weights(str(folder / "weights.h5"))
    model.export(str(folder / "exported"))
    tf_deform.export.saved_model(
        model,
        folder / "serving",
        "portable" if op_library() is None else "native",
        image_bytes=False,
        sample=inputs_of(kind),
        verbose=False,
    )
    tf.train.Checkpoint(model=model).write(str(folder / "checkpoint"))
    if kind != "stock":
        tf.train.Checkpoint(**own_layers(model)).write(str(folder / "layers"))


if __name__ == "__main__":
    for kind in KINDS:
        write(pathlib.Path(sys.argv[1]) / kind, kind)
