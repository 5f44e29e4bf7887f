# SPDX-License-Identifier: Apache-2.0
"""Tests exports and training of KerasHub's models that were made deformable.

`docs/surgery.md` has the same for networks of usual size.
"""

import functools

import hub_exports
import keras
import numpy as np
import pytest
import zoo

import tf_deform

SMALL = {
    "ResNetBackbone": zoo.tiny_resnet,
    "RetinaNetObjectDetector": lambda: zoo.retinanet(zoo.tiny_resnet, 4),
    "DeepLabV3ImageSegmenter": lambda: zoo.deeplab(zoo.tiny_resnet, 4),
    "DFineBackbone": lambda: zoo.d_fine(size=96, decoder_layers=1),
}


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name",
    [
        slow("ResNetBackbone"),
        "RetinaNetObjectDetector",
        "DeepLabV3ImageSegmenter",
        slow("DFineBackbone"),
    ],
)
def test_exports(name, tmp_path):
    """Tests files of every format, which a new process reads."""
    model = SMALL[name]()
    # Few layers, as formats without the op take long to trace.
    stages = "c3-c5" if name == "DFineBackbone" else "c4"
    tf_deform.make_deformable(model, stages, verbose=False)
    assert type(model).__name__ == name
    found = hub_exports.examine(model, tmp_path)
    assert found.keys() == set(hub_exports.FORMATS)
    assert max(found.values()) <= 1e-5, found


def labels(name, count):
    rng = np.random.default_rng(3)
    if name == "DeepLabV3ImageSegmenter":
        return rng.integers(0, 4, (count, 64, 64, 1))
    corner = rng.uniform(0, 24, (count, 3, 2))
    boxes = np.concatenate([corner, corner + 30], -1).astype("float32")
    return {"boxes": boxes, "labels": rng.integers(0, 4, (count, 3))}


@pytest.mark.parametrize(
    "name", ["RetinaNetObjectDetector", "DeepLabV3ImageSegmenter"]
)
def test_fit(name, tmp_path):
    """Tests Keras' own loop, and a file of a model with its optimizer."""
    keras.utils.set_random_seed(0)
    model = SMALL[name]()
    tf_deform.make_deformable(model, verbose=False)
    options = {}
    if name == "DeepLabV3ImageSegmenter":
        options["loss"] = keras.losses.SparseCategoricalCrossentropy(True)
        options["metrics"] = []
    optimizer = tf_deform.training.deformable_optimizer(
        keras.optimizers.SGD(0.01, global_clipnorm=1.0)
    )
    model.compile(optimizer=optimizer, **options)
    images = np.random.default_rng(2).uniform(0, 255, (4, 64, 64, 3))
    logs = model.fit(
        images.astype("float32"), labels(name, 4), batch_size=2, epochs=2,
        verbose=0,
    ).history  # fmt: skip
    assert logs["loss"][-1] < logs["loss"][0]
    changed = tf_deform.deformable_layers(model)
    assert len(changed) == 6
    for layer in changed:
        assert np.abs(layer.offset_kernel.numpy()).max() > 0
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    for one, two in zip(model.variables, other.variables, strict=True):
        np.testing.assert_array_equal(one, two)
