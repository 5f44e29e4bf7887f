# SPDX-License-Identifier: Apache-2.0
"""Tests the model of the segmentation example; `runs_test.py` tests runs."""

import keras
import numpy as np
import pytest
import segmentation
import tensorflow as tf
from detection_test import displace, random_images

from tf_deform import _loader
from tf_deform.demo import _digit_scenes as digit_scenes


def make_model(image_size: int | None) -> keras.Model:
    """Makes a deformable model that displaces samples, like a trained model."""
    keras.utils.set_random_seed(2)
    model = segmentation.build_model("dcn-v2", image_size)
    displace(model)
    return model


@pytest.mark.skipif(
    not _loader.supports_jit(), reason="built without the bridge to XLA"
)
@pytest.mark.parametrize("image_size", [64, None])
def test_xla_gives_the_same_logits(image_size):
    model = make_model(image_size)
    images = random_images(2, 64, 64, 1)
    compiled = tf.function(model, jit_compile=True)(images)
    np.testing.assert_allclose(compiled, model(images), atol=1e-4)


def test_any_image_size_is_the_same_network(tmp_path):
    fixed, free = make_model(64), segmentation.build_model("dcn-v2", None)
    fixed.save_weights(tmp_path / "fixed.weights.h5")
    free.load_weights(tmp_path / "fixed.weights.h5")
    free.save(tmp_path / "free.keras")
    free = keras.saving.load_model(tmp_path / "free.keras")
    predict = tf.function(
        lambda images: free(images, training=False),
        [tf.TensorSpec((None, None, None, 1), "uint8")],
    )
    images = random_images(2, 64, 64, 1)
    np.testing.assert_array_equal(predict(images), fixed(images))
    logits = predict(random_images(2, 48, 80, 1))
    assert logits.shape == (2, 48, 80, digit_scenes.NUM_CLASSES)
