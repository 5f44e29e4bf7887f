# SPDX-License-Identifier: Apache-2.0
"""Tests which weights of a deformable model are trained, on every Keras."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from surgery_models import (
    MAKERS,
    change,
    filled,
    images,
    make_functional,
    make_subclassed,
    refuse,
    trained,
)

import tf_deform
from tf_deform import _keras
from tf_deform._keras import KERAS_2, keras

every_model = pytest.mark.parametrize("make", MAKERS)


def trained_layers(model):
    return {x.name for x in model.layers if x.trainable_weights}


@every_model
def test_train_offsets_only(make):
    model = filled(make)
    change(model)
    chosen = tf_deform.train_only(model)
    assert len(chosen) == MAKERS[make]
    assert trained(model) == {"offset_kernel", "offset_bias"}
    assert len(model.trainable_weights) == 2 * MAKERS[make]
    before = model.get_weights()
    model.compile("sgd", "mean_squared_error")
    target = tf.nest.map_structure(lambda v: np.ones(v.shape), model(images()))
    model.fit(images(), target, verbose=0)
    for weight, old in zip(model.weights, before):
        moved = np.any(weight.numpy() != old)
        assert moved == _keras.name_of(weight).startswith("offset_")


def test_train_parts():
    model = filled(make_functional)
    change(model)
    every = {f"conv{i}" for i in range(5)} | {"head"}
    norms = {f"bn{i}" for i in range(5)}
    for what, frozen_norms, expected in (
        ("all", True, every),
        ("all", False, every | norms),
        ("c4-", True, {"conv4", "head"}),
        (
            "c3-",
            False,
            {"conv2", "bn2", "conv3", "bn3", "conv4", "bn4", "head"},
        ),
        ("c3", True, {"conv2", "conv3"}),
        ("c1-c2", False, {"conv0", "bn0", "conv1", "bn1"}),
        ("conv[01]|head", True, {"conv0", "conv1", "head"}),
        ("offsets", True, {"conv2", "conv4"}),
        ("all", False, every | norms),
    ):
        tf_deform.train_only(model, what, frozen_norms)
        assert trained_layers(model) == expected, what
        only = what == "offsets"
        assert (trained(model) == {"offset_kernel", "offset_bias"}) == only


def test_frozen_kernels_are_stored(tmp_path):
    """Tests what Keras does not save: the flags of variables."""
    for make in (make_functional, make_subclassed):
        model = filled(make)
        change(model)
        tf_deform.train_only(model)
        model.save(tmp_path / "model.keras")
        other = keras.models.load_model(tmp_path / "model.keras")
        for layer in tf_deform.deformable_layers(other):
            assert layer.freeze_kernel
            assert trained(layer) == {"offset_kernel", "offset_bias"}
        # Unfreezing a model does not undo it, `train_only` does.
        other.trainable = True
        (layer, *_) = tf_deform.deformable_layers(other)
        assert trained(layer) == {"offset_kernel", "offset_bias"}
        tf_deform.train_only(other, "all")
        assert "kernel" in trained(layer)


@pytest.mark.skipif(KERAS_2, reason="Keras 2 has no flags of variables")
def test_a_frozen_kernel_stays_frozen():
    model = filled(make_functional)
    conv = model.get_layer("conv4")
    conv.kernel.trainable = False
    change(model)
    assert trained(conv) == {"bias", "offset_kernel", "offset_bias"}
    conv = model.get_layer("conv2")
    assert trained(conv) == {"kernel", "bias", "offset_kernel", "offset_bias"}


@pytest.mark.skipif(KERAS_2, reason="Keras 2 has no flags of variables")
@pytest.mark.parametrize("make", [make_functional, make_subclassed])
def test_flags_set_by_hand_are_stored(make, tmp_path):
    model = filled(make)
    change(model)
    first, second, *others = tf_deform.deformable_layers(model)
    first.kernel.trainable = False
    second.freeze_kernel = True
    second.bias.trainable = True
    second.offset_kernel.trainable = False
    expected = [trained(layer) for layer in (first, second, *others)]
    assert expected[:2] == [
        {"bias", "offset_kernel", "offset_bias"},
        {"bias", "offset_bias"},
    ]
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    found = [trained(layer) for layer in tf_deform.deformable_layers(other)]
    assert found == expected
    # Flags of the usual kind are in no file, so that they cannot contradict.
    for layer in others:
        assert "trainable" not in layer.get_build_config()
    other.save(tmp_path / "again.keras")
    again = keras.models.load_model(tmp_path / "again.keras")
    found = [trained(layer) for layer in tf_deform.deformable_layers(again)]
    assert found == expected


def test_train_only_refuses():
    model = filled(make_functional)
    for what, error, match in (
        (3, TypeError, "`what` to be"),
        ("offsets", ValueError, "names none of the"),
        ("nothing like it", ValueError, "names none of the"),
        ("c8-c9", ValueError, "names none of the"),
        ("(", ValueError, "regular expressions"),
    ):
        refuse(
            model,
            error,
            match,
            lambda m, what=what: tf_deform.train_only(m, what),
        )
    with pytest.raises(TypeError, match="`model` to be a model"):
        tf_deform.train_only(None)
    change(model)
    model.compile("sgd", "mean_squared_error")
    model.fit(images(), np.zeros((2, 3)), verbose=0)
    refuse(model, ValueError, "has taken steps", tf_deform.train_only)
