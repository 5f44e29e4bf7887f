# SPDX-License-Identifier: Apache-2.0
"""Tests RFCN; `faster_rcnn_test.py` tests what it shares with FasterRCNN."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from detectors import make_backbone, make_rfcn, measure, train

from tf_deform.models import RFCN


@pytest.mark.parametrize(
    "pooling", ["deform", pytest.param("plain", marks=pytest.mark.slow)]
)
def test_learns(pooling):
    keras.utils.set_random_seed(1)
    model = train(make_rfcn(pooling), 400)
    found, wrong = measure(model)
    assert found > 0.8 and wrong < 0.2
    for layer in model.poolings:
        assert (layer.offset_kernel is None) == (pooling == "plain")
        if pooling == "deform":
            assert np.abs(layer.offset_kernel).max() > 1e-4


def test_coarsest_maps_are_those_of_stride_16():
    backbone = make_backbone(3, 5, 4)
    model = RFCN(backbone, 3, image_size=128, channels=8, bins=2)
    scores, boxes, features = model.trunk.output["maps"]
    assert scores.shape == (None, 8, 8, 16) and boxes.shape == (None, 8, 8, 16)
    assert features.shape == (None, 8, 8, 8)
    assert model.backbone.output["P5"].shape[1:] == (None, None, 20)
    dilated = model.backbone.get_layer("conv5b").dilation_rate
    assert tuple(dilated) == (2, 2)
    # Anchors are judged on the map before.
    assert model._anchor_maps[0].shape == (None, 8, 8, 16)
    np.testing.assert_allclose(
        np.sqrt(
            np.diff(model.anchors()[::3].reshape(-1, 2, 2), axis=1).prod(-1)
        ).min(),
        64,
        1e-5,
    )


def test_the_regions_with_the_largest_loss_count():
    model = make_rfcn(hard_examples=2)
    class_loss = tf.constant([[1.0, 5.0, 3.0, 9.0], [0.5, 0.25, 0.0, 0.0]])
    box_loss = tf.constant([[0.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    real = tf.constant([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found = model._reduce(real, class_loss, box_loss)
    assert float(found["class"]) == pytest.approx((5 + 3 + 0.5) / 3)
    assert float(found["box"]) == pytest.approx(4 / 3)


def test_the_layer_that_judges_anchors_has_the_channels_asked_for(tmp_path):
    path = tmp_path / "model.keras"
    for given, channels in (({"rpn_channels": 7}, 7), ({}, 512)):
        make_rfcn(**given).save(path)
        model = keras.saving.load_model(path)
        assert model.rpn_channels == channels
        weights = model.trunk.get_layer("rpn_hidden").kernel
        assert weights.shape == (3, 3, 24, channels)


def test_files_from_before_there_was_a_choice_have_512():
    config = make_rfcn(rpn_channels=7).get_config()
    del config["rpn_channels"]
    assert RFCN.from_config(config).rpn_channels == 512


def test_bad_rpn_channels():
    with pytest.raises(ValueError, match="`rpn_channels`.*Received: 0"):
        make_rfcn(rpn_channels=0)


def test_bad_pooling():
    with pytest.raises(ValueError, match="pooling.*'align'"):
        make_rfcn("align")
