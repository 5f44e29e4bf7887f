# SPDX-License-Identifier: Apache-2.0
"""Tests how layers store their weights, alike on Keras 2 and 3.

`across_test.py` tests whole files.
"""

from __future__ import annotations

import h5py
import keras_files
import numpy as np
import pytest
import tensorflow as tf
from layer_cases import built
from operands import random

from tf_deform import _keras
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D


def stored_in(folder, model):
    """Returns the arrays of a `.weights.h5` by layer, and its path."""
    path = folder / "model.weights.h5"
    model.save_weights(str(path))
    found = {}

    def add(name, item):
        parts = name.split("/")
        if isinstance(item, h5py.Dataset) and parts[0] == "layers":
            found.setdefault(parts[1], set()).add(parts[-1])

    with h5py.File(path) as file:
        file.visititems(add)
    return found, path


def test_one_stored_form(tmp_path):
    found, _ = stored_in(tmp_path, keras_files.make("regions"))
    branch = {"offset_kernel", "offset_bias"}
    assert found["deformable_conv2d"] == {"0", "1"} | branch
    assert found["deformable_conv2d_1"] == {"0"}
    assert found["deformable_roi_align"] == {"0", "1", "2", "3"}
    assert found["deformable_roi_pooling"] == {"0", "1"}
    assert found["deformable_psroi_pooling"] == {"0", "1"}


@pytest.mark.parametrize(
    "moves",
    [
        {"offset_kernel": "2", "offset_bias": "3"},  # as Keras 2 numbers
        {"offset_bias": None},
        {"offset_kernel": None, "offset_bias": None},
        {"1": None},
    ],
    ids=["numbered", "half a branch", "no branch", "no bias"],
)
def test_other_forms_are_refused(moves, tmp_path):
    model = keras_files.make("convolution")
    _, path = stored_in(tmp_path, model)
    with h5py.File(path, "a") as file:
        group = file["layers/deformable_conv2d/vars"]
        for old, new in moves.items():
            if new is not None:
                group[new] = group[old][()]
            del group[old]
    keras_files.fill(model)
    before = model.get_layer("own").get_weights()
    with pytest.raises(ValueError, match="Expected|unable"):
        model.load_weights(str(path))
    after = model.get_layer("own").get_weights()
    np.testing.assert_equal(after, before)


@keras.saving.register_keras_serializable(package="either_files_test")
class Scaled(DeformableConv2D):
    """Has a weight that Keras 3's Conv2D would leave out."""

    def build(self, shape):
        super().build(shape)
        self.scale = self.add_weight(name="scale", shape=(), initializer="ones")


def test_further_weights_of_a_subclass(tmp_path):
    """Tests that no weight is left out without an error."""
    image = keras.Input((8, 9, 3))
    model = keras.Model(image, Scaled(4, 3)(image))
    keras_files.fill(model)
    values = model.get_weights()
    path = str(tmp_path / "model.weights.h5")
    model.save_weights(path)
    model.set_weights([0 * value for value in values])
    if _keras.KERAS_2:
        model.load_weights(path)
        np.testing.assert_equal(model.get_weights(), values)
    else:
        with pytest.raises(ValueError, match="Expected 3 weights"):
            model.load_weights(path)


def test_checkpoints_hold_every_weight(tmp_path):
    """Tests names under which both Keras 2 and 3 find a weight."""
    two = {"units": (8, 4), "modulation": "sigmoid"}
    layers = {
        "conv2d": built("conv2d", "own")[0],
        "align": built("align", "own", units=(8,))[0],
        "modulated": built("align", "own", **two)[0],
    }
    path = tf.train.Checkpoint(**layers).write(str(tmp_path / "checkpoint"))
    names = [name for name, _ in tf.train.list_variables(path)]
    weights = [weight for layer in layers.values() for weight in layer.weights]
    assert len([n for n in names if "ATTRIBUTES" in n]) == len(weights)
    convolution = layers["conv2d"]
    children = convolution._trackable_children()
    assert children["kernel"] is children["_kernel"] is convolution._kernel


@pytest.mark.parametrize("kind", ["keras", "h5"])
def test_a_layer_inside_of_a_wrapper(kind, tmp_path):
    frames = keras.Input((3, 8, 9, 3))
    layer = keras.layers.TimeDistributed(DeformableConv2D(4, 3))
    model = keras.Model(frames, layer(frames))
    keras_files.fill(model)
    model.save(tmp_path / f"model.{kind}")
    loaded = keras.models.load_model(tmp_path / f"model.{kind}")
    x = random(2, 3, 8, 9, 3)
    np.testing.assert_array_equal(loaded(x), model(x))


def test_a_plain_file_is_refused(tmp_path):
    """Tests that the error says how to load the file of a plain model."""
    image = keras.Input((8, 9, 3))
    plain = keras.Model(image, keras.layers.Conv2D(4, 3)(image))
    model = keras.Model(image, DeformableConv2D(4, 3)(image))
    path = str(tmp_path / "model.weights.h5")
    plain.save_weights(path)
    with pytest.raises((ValueError, KeyError)):
        model.load_weights(path)
    assert model(random(1, 8, 9, 3)).shape == (1, 6, 7, 4)
