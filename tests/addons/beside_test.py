# SPDX-License-Identifier: Apache-2.0
"""Tests tensorflow_addons and tf_deform in one process and in one model."""

import numpy as np
import pytest
import tensorflow as tf
from optimizer_test import data

from tf_deform import ops
from tf_deform._keras import keras
from tf_deform.layers import DeformableConv2D

tfa = pytest.importorskip(
    "tensorflow_addons",
    reason="tensorflow_addons runs with TensorFlow 2.15 alone",
    exc_type=ImportError,
)

BOTH = """
import sys
import numpy as np
import tensorflow as tf
for name in sys.argv[1:]:
    __import__(name)
import tensorflow_addons as tfa
import tf_deform

rng = np.random.default_rng(0)
x = rng.normal(size=(1, 8, 8, 2)).astype(np.float32)
kernel = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)
assert tf_deform._loader.op_library() is not None
got = tf_deform.ops.deformable_conv2d(
    x, kernel, np.zeros((1, 6, 6, 18), np.float32)
)
np.testing.assert_allclose(got, tf.nn.conv2d(x, kernel, 1, "VALID"), atol=1e-5)
# An op of the addons' own library, and one of its image library.
bags = tfa.layers.EmbeddingBag(5, 3)
assert bags(np.array([[0, 1]]), np.ones((1, 2), np.float32)).shape == (1, 3)
turned = tfa.image.adjust_hsv_in_yiq(np.abs(np.repeat(x, 2, -1)[..., :3]), 0.5)
assert np.all(np.isfinite(turned))
print("both")
"""


def has_addons_ops() -> bool:
    """Tells whether the addons' libraries load: not with tensorflow-cpu."""
    try:
        tfa.layers.EmbeddingBag(1, 1)(np.array([[0]]))
    except (tf.errors.NotFoundError, RuntimeError):
        return False
    return True


@pytest.mark.skipif(
    not has_addons_ops(),
    reason="the addons' own ops need the package tensorflow, not "
    "tensorflow-cpu",
)
@pytest.mark.parametrize(
    "order",
    [("tensorflow_addons", "tf_deform"), ("tf_deform", "tensorflow_addons")],
    ids=["addons first", "tf_deform first"],
)
def test_both_op_libraries_in_one_process(run_python, order):
    assert run_python(BOTH, *order).split()[-1] == "both"


def deformable(**kwargs) -> DeformableConv2D:
    kwargs = {"padding": "same", "modulation": "2sigmoid", **kwargs}
    return DeformableConv2D(4, 3, **kwargs)


def trained(layers, loss="mse", optimizer="adam") -> keras.Model:
    """Trains a model of layers for some steps, in which all weights move."""
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    model.add(keras.layers.Conv2D(2, 3, dtype="float32"))
    model.compile(optimizer, loss)
    before = model.get_weights()
    inputs, targets = data()
    model.fit(inputs, np.abs(targets) % 1, epochs=3, verbose=0)
    for old, new, weight in zip(before, model.get_weights(), model.weights):
        assert np.all(np.isfinite(new)), weight.name
        if weight.trainable and "offset_" in weight.name:
            assert np.any(old != new), weight.name
    return model


LAYERS = {
    "GroupNormalization": lambda: [
        deformable(),
        tfa.layers.GroupNormalization(2),
    ],
    "InstanceNormalization": lambda: [
        deformable(),
        tfa.layers.InstanceNormalization(),
    ],
    "FilterResponseNormalization and TLU": lambda: [
        deformable(),
        tfa.layers.FilterResponseNormalization(),
        tfa.layers.TLU(),
    ],
    "WeightNormalization": lambda: [
        tfa.layers.WeightNormalization(deformable(), data_init=False)
    ],
    "SpectralNormalization": lambda: [
        tfa.layers.SpectralNormalization(deformable())
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    trained(LAYERS[name]())


@pytest.mark.parametrize("file", ["model.keras", "model.h5", "folder"])
def test_files(tmp_path, file):
    model = trained(LAYERS["GroupNormalization"]())
    model.save(tmp_path / file)
    loaded = keras.models.load_model(tmp_path / file)
    images = data()[0]
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), model.predict(images, verbose=0)
    )


def test_focal_loss():
    """Tests what the example must set: by itself the loss is no number."""
    own = tfa.losses.SigmoidFocalCrossEntropy
    truth, scores = np.eye(4, dtype=np.float32), np.zeros((4, 4), np.float32)
    assert own()(truth, scores).shape == (4,)
    mean = own(reduction="sum_over_batch_size")
    assert mean(truth, scores).shape == ()
    trained([deformable()], mean)


@pytest.mark.parametrize("layers", [tfa.layers, keras.layers])
def test_group_normalization_needs_float32(layers):
    """Tests why the example sets the type: float16 gives zeros, in silence."""
    x = 400 * np.random.default_rng(0).normal(size=(1, 8, 8, 4))
    x = x.astype(np.float32)
    keras.mixed_precision.set_global_policy("mixed_float16")
    assert not np.any(layers.GroupNormalization(2)(x))
    right = layers.GroupNormalization(2, dtype="float32")(x)
    np.testing.assert_allclose(np.std(right), 1, rtol=1e-3)


def test_decay_is_not_scaled_by_the_rate():
    """Tests what the example says of AdamW, on a variable without gradient."""
    results = {}
    for kind in (tfa.optimizers.AdamW, keras.optimizers.AdamW):
        variable = tf.Variable(1.0)
        optimizer = kind(learning_rate=1e-3, weight_decay=1e-2)
        optimizer.apply_gradients([(tf.constant(0.0), variable)])
        results[kind] = float(variable)
    np.testing.assert_allclose(list(results.values()), [0.99, 0.99999])


def test_mixed_precision():
    keras.mixed_precision.set_global_policy("mixed_float16")
    norm = tfa.layers.GroupNormalization(2, dtype="float32")
    model = trained([deformable(), norm], optimizer=tfa.optimizers.LAMB(1e-2))
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    assert model.layers[0].compute_dtype == "float16"


def test_images():
    """Tests functions of images in front of an op, with gradients."""
    images = tf.constant(data()[0])
    flow = tf.zeros((4, 6, 6, 2)) + 0.5
    offset = tf.Variable(tf.zeros((4, 6, 6, 18)) + 0.25)
    kernel = tf.ones((3, 3, 2, 1))
    with tf.GradientTape() as tape:
        maps = tfa.image.rotate(images, 0.1, "bilinear")
        maps = tfa.image.translate(maps, [1.0, 0.5], "bilinear")
        maps = tfa.image.gaussian_filter2d(maps)
        maps = tfa.image.dense_image_warp(maps, flow)
        result = ops.deformable_conv2d(maps, kernel, offset, padding="same")
        loss = tf.reduce_mean(result**2)
    assert np.any(tape.gradient(loss, offset))
