# SPDX-License-Identifier: Apache-2.0
"""Tests `set_output_stride` on every Keras."""

from __future__ import annotations

import numpy as np
import pytest
from surgery_models import change, filled, head, make_subclassed, refuse

import tf_deform
from tf_deform._keras import keras

layers = keras.layers
SIZE = 192


def make(by="kernel", nested=False):
    """Makes a network of stride 32 that grows coarser in one of five ways."""
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Conv2D(4, 3, 4, padding="same", name="stem")(image)
    for level in (3, 4, 5):
        options = dict(padding="same", activation="softplus")
        if by == "kernel":
            x = layers.Conv2D(4, 3, 2, name=f"c{level}_0", **options)(x)
        elif by == "padding":
            x = layers.ZeroPadding2D(1, name=f"pad{level}")(x)
            x = layers.Conv2D(4, 3, 2, name=f"c{level}_0")(x)
        elif by == "padding at the end":
            x = layers.ZeroPadding2D(((0, 1), (0, 1)), name=f"pad{level}")(x)
            x = layers.Conv2D(4, 3, 2, name=f"c{level}_0")(x)
        elif by == "cutting":
            x = layers.Conv2D(4, 2, 2, name=f"c{level}_0")(x)
        else:
            x = layers.MaxPooling2D(3, 2, padding="same")(x)
        x = layers.Conv2D(4, 3, name=f"c{level}_1", **options)(x)
        x = layers.ZeroPadding2D(1, name=f"between{level}")(x)
        x = layers.Conv2D(4, 3, name=f"c{level}_2")(x)
    model = keras.Model(image, x)
    if not nested:
        return model
    image = keras.Input((SIZE, SIZE, 3))
    return keras.Model(image, layers.Conv2D(2, 1)(model(image)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize(
    "by", ["kernel", "padding", "padding at the end", "cutting", "pooling"]
)
def test_every_old_cell_keeps_its_value(by, stride, nested):
    model = filled(lambda: make(by, nested))
    if by == "pooling" and stride == 8:
        refuse(
            model,
            ValueError,
            "a MaxPooling2D, which cannot be dilated",
            lambda model: tf_deform.set_output_stride(model, 8),
        )
        return
    weights = model.get_weights()
    images = np.random.default_rng(0).normal(size=(1, SIZE, SIZE, 3))
    images = images.astype("float32")
    coarse = np.array(model(images))
    made = tf_deform.set_output_stride(model, stride)
    factor = 32 // stride
    fine = np.array(made(images))
    assert fine.shape[1:3] == tuple(factor * n for n in coarse.shape[1:3])
    # "same" pads even maps at the end alone, so that cells lie at the end of
    # their pixels.
    phase = {"padding": 0, "cutting": factor // 2 - 1}.get(by, factor - 1)
    fine = fine[:, phase::factor, phase::factor]
    # Borders read more zeros in the finer maps.
    inner = (slice(None), slice(2, -2), slice(2, -2))
    largest = np.abs(coarse).max()
    np.testing.assert_allclose(fine[inner], coarse[inner], atol=1e-5 * largest)
    np.testing.assert_equal(model.get_weights(), weights)
    np.testing.assert_array_equal(np.array(model(images)), coarse)


def test_it_becomes_deformable(tmp_path):
    made = tf_deform.set_output_stride(filled(make), 16)
    report = change(made, stages="c4", offset_dilation_rate=1)
    assert {one.path for one in report.changed} == {
        *("c4_0", "c4_1", "c4_2", "c5_0", "c5_1", "c5_2")
    }
    (last,) = [x for x in tf_deform.deformable_layers(made) if x.name == "c5_2"]
    assert tuple(last.dilation_rate) == (2, 2)
    assert last.offset_dilation_rate == (1, 1)
    made.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    images = np.ones((1, SIZE, SIZE, 3), "float32")
    np.testing.assert_array_equal(np.array(other(images)), made(images))


def test_keras_applications():
    model = keras.applications.ResNet50(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    made = tf_deform.set_output_stride(model, 8)
    assert made.output_shape == (None, 8, 8, 2048)
    rates = {
        x.name: x.dilation_rate for x in made.layers if "_2_conv" in x.name
    }
    assert {rates[f"conv{i}_block2_2_conv"] for i in (2, 3)} == {(1, 1)}
    assert rates["conv4_block6_2_conv"] == (2, 2)
    assert rates["conv5_block3_2_conv"] == (4, 4)


def make_dense():
    image = keras.Input((7,))
    return keras.Model(image, layers.Dense(3)(image))


def make_with(layer):
    image = keras.Input((64, 64, 3))
    x = layers.Conv2D(4, 3, 8, padding="same")(image)
    x = layer(layers.Conv2D(4, 3, 2, padding="same")(x))
    return keras.Model(image, x)


def deformable(x):
    x = layers.Conv2D(4, 3, 2, padding="same")(x)
    return tf_deform.layers.DeformableConv2D(4, 3, padding="same")(x)


@pytest.mark.parametrize(
    "made,stride,error,match",
    [
        (make, 4, ValueError, "`output_stride` to be 16 or 8"),
        (make, True, ValueError, "`output_stride` to be 16 or 8"),
        (make, "8", ValueError, "`output_stride` to be 16 or 8"),
        (make_subclassed, 8, ValueError, "functional or sequential"),
        (make_dense, 8, ValueError, "coarser than output_stride=8.*is 1$"),
        (
            lambda: make_with(layers.Conv2D(4, 3, 3)),
            16,
            ValueError,
            r"strides \(3, 3\), not 2",
        ),
        (
            lambda: make_with(layers.Resizing(2, 2)),
            16,
            ValueError,
            "coarser in another way",
        ),
        (
            lambda: make_with(deformable),
            16,
            ValueError,
            "DeformableConv2D, whose displacements .* first, and then `make_d",
        ),
    ],
)
def test_what_is_refused(made, stride, error, match):
    refuse(
        filled(made),
        error,
        match,
        lambda model: tf_deform.set_output_stride(model, stride),
    )


def test_bad_models():
    with pytest.raises(TypeError, match="`model` to be a model"):
        tf_deform.set_output_stride(None, 8)
    model = filled(make)
    tf_deform.set_output_stride(model, 16)
    image = keras.Input((SIZE, SIZE, 3))
    x = keras.Model(image, head(model(image)))
    with pytest.raises(ValueError, match="coarser"):
        tf_deform.set_output_stride(tf_deform.set_output_stride(x, 16), 16)
