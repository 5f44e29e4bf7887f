# SPDX-License-Identifier: Apache-2.0
"""Tests the mean overlap of masks."""

import numpy as np
import pytest
import tensorflow as tf

from tf_deform._keras import KERAS_2, keras

if KERAS_2:
    pytest.skip("for Keras 3", allow_module_level=True)

from tf_deform.training import MeanIoU  # noqa: E402


def expected(truth, found, classes, ignored):
    """Returns the overlap of each class, by sets of pixels."""
    truth, found = (
        np.where(truth == ignored, -1, mask).ravel() for mask in (truth, found)
    )
    return [
        ((truth == c) & (found == c)).sum()
        / ((truth == c) | (found == c)).sum()
        if ((truth == c) | (found == c)).any()
        else np.nan
        for c in range(classes)
    ]


@pytest.mark.parametrize("ignored", [255, 2, None])
@pytest.mark.parametrize("dense", [False, True])
def test_random_masks(ignored, dense):
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 4, (3, 7, 5, 1)).astype("int32")
    found = rng.integers(0, 4, (3, 7, 5)).astype("int32")
    if ignored == 255:
        truth[rng.random(truth.shape) < 0.2] = 255
    # Of five classes, the last one is in no mask.
    metric = MeanIoU(5, ignored, sparse_y_pred=not dense)
    for one, other in zip(np.split(truth, 3), np.split(found, 3)):
        metric.update_state(one, np.eye(5)[other] if dense else other)
    each = expected(truth[..., 0], found, 5, ignored)
    np.testing.assert_allclose(metric.per_class(), each, rtol=1e-12)
    assert float(metric.result()) == pytest.approx(np.nanmean(each), rel=1e-5)
    metric.reset_state()
    assert np.isnan(metric.per_class()).all()


def test_more_pixels_than_float32_counts():
    metric = MeanIoU(2)
    metric.update_state([0, 1, 1], [0, 1, 0])
    metric.counts.assign(metric.counts * 2**40)
    metric.update_state([0, 1], [0, 1])
    n = 2**40
    np.testing.assert_array_equal(metric.counts, [[n + 1, 0], [n, n + 1]])
    each = [(n + 1) / (2 * n + 1), (n + 1) / (2 * n + 1)]
    np.testing.assert_allclose(metric.per_class(), each, rtol=1e-15)
    metric.reset_state()
    ones = tf.ones((2**12, 2**11), tf.int32)
    for _ in range(3):  # 3 * 2^23 pixels, in which float32 would stand still
        metric.update_state(ones, ones)
    metric.update_state([1], [1])
    assert int(metric.counts[1, 1]) == 3 * 2**23 + 1


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_in_training(policy, tmp_path):
    keras.mixed_precision.set_global_policy(policy)
    model = keras.Sequential(
        [keras.Input((4, 4, 3)), keras.layers.Conv2D(3, 1)]
    )
    model.compile(
        "sgd",
        loss=keras.losses.SparseCategoricalCrossentropy(True, ignore_class=255),
        metrics=[MeanIoU(3, sparse_y_pred=False)],
    )
    images = np.random.default_rng(0).normal(size=(5, 4, 4, 3))
    masks = np.array(images.argmax(-1)[..., None], "int32")
    masks[:, 0] = 255
    model.optimizer.learning_rate = 0.0
    history = model.fit(
        images, masks, verbose=0, validation_data=(images, masks)
    ).history
    found = np.argmax(model.predict(images, verbose=0), -1)
    mean = np.nanmean(expected(masks[..., 0], found, 3, 255))
    assert history["val_mean_iou"][0] == pytest.approx(mean, rel=1e-5)
    model.save(tmp_path / "m.keras")
    keras.saving.load_model(tmp_path / "m.keras")
    copy = MeanIoU.from_config(MeanIoU(3, 7, False, "a").get_config())
    assert (copy.num_classes, copy.ignore_class, copy.name) == (3, 7, "a")
    assert not copy.sparse_y_pred


def test_perfect_masks_and_none():
    metric = MeanIoU(4)
    assert float(metric.result()) == 0
    metric.update_state([0, 2, 255], [0, 2, 1])
    assert float(metric.result()) == 1
    np.testing.assert_array_equal(metric.per_class(), [1, np.nan, 1, np.nan])


@pytest.mark.parametrize("true, found", [(3, 0), (0, 3), (-1, 0), (0, 255)])
def test_ids_that_are_no_class(true, found):
    metric = MeanIoU(3)
    with pytest.raises(tf.errors.InvalidArgumentError):
        metric.update_state([true], [found])


def test_weights_are_refused():
    with pytest.raises(ValueError, match="no weights of pixels"):
        MeanIoU(3).update_state([1], [1], [0.5])


def test_with_xla():
    metric = MeanIoU(3)

    @tf.function(jit_compile=True)
    def count(true, found):
        metric.update_state(true, found)

    count(tf.constant([[0, 1], [2, 255]]), tf.constant([[0, 2], [2, 1]]))
    np.testing.assert_array_equal(
        metric.counts, [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    )
